"""Letters and digits of matplotlib's fonts, shifted, bent, with noise: 62 classes, no download."""

import functools
import string
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Le
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from scaletrain.errors import UserError, unknown
from scaletrain.needs import CountsSamples
from scaletrain.training.randomness import mixed_bits, seed_of

CHARACTERS = string.digits + string.ascii_uppercase + string.ascii_lowercase
FONTS = (
    "DejaVuSans", "DejaVuSans-Bold", "DejaVuSans-Oblique", "DejaVuSans-BoldOblique",
    "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSansMono-Oblique", "DejaVuSansMono-BoldOblique",
    "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSerif-Italic", "DejaVuSerif-BoldItalic",
    "STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta",
    "cmr10", "cmb10", "cmss10", "cmtt10",
)  # fmt: skip
# Of different families: slanted, bold, both, and a typewriter's.
HELD_OUT = ("DejaVuSans-Oblique", "DejaVuSerif-Bold", "STIXGeneralBolIta", "cmtt10")
# Larger data sets are drawn when they are read, not beforehand.
_MAX_PIXELS_IN_MEMORY = 50_000_000
_CHUNK = 1024  # samples that are drawn at once
# Of all pixels, about: they make images of zero mean and unit variance.
_MEAN, _STD = 0.07, 0.22


def data(
    *,
    samples: Annotated[int, Ge(1), CountsSamples()] = 6200,
    test_samples: Annotated[int, Ge(1)] = 2480,
    size: Annotated[int, Ge(8)] = 24,
    classes: Annotated[int, Ge(2), Le(62)] = 62,
    test_fonts: list[str] = [],  # noqa: B006 (never changed)
    shift: Annotated[float, Ge(0)] = 0.08,
    bend: Annotated[float, Ge(0)] = 0.04,
    noise: Annotated[float, Ge(0)] = 0.1,
    seed: int = 0,
) -> tuple[Dataset, Dataset]:
    """Return (train, test): images (1, size, size) float32, targets int64.

    The fonts of the test set are in no training image. A sample is a function of its number and the
    seed alone: it is the same on every rank, and a larger set begins with the smaller one.

    Args:
        samples: of the training set; classes take turns.
        test_samples: of the test set.
        size: pixels of each side.
        classes: the first of 0-9, A-Z, a-z.
        test_fonts: fonts for testing, all others are for training; empty: ``HELD_OUT``.
        shift: largest shift, as a part of the side. Turns and widths vary, too.
        bend: strength of the distortion, as a part of the side.
        noise: standard deviation of the pixels' noise, of ink that is at most 1.
        seed: of all samples.

    Raises:
        UserError: there is no such font, or none is left for training.
    """
    held_out = test_fonts or HELD_OUT
    for name in held_out:
        if name not in FONTS:
            raise unknown("data.test_fonts", name, FONTS)
    train_fonts = [name for name in FONTS if name not in held_out]
    if not train_fonts:
        raise UserError("data.test_fonts: leaves no font for training (allowed: fewer)")
    look = Look(size, classes, shift, bend, noise)
    train = Glyphs(samples, train_fonts, look, seed_of(seed, "train"))
    test = Glyphs(test_samples, held_out, look, seed_of(seed, "test"))
    return _in_memory(train), _in_memory(test)


class Look(NamedTuple):
    """How glyphs look."""

    size: int  # pixels of each side
    classes: int
    shift: float  # parts of the side
    bend: float  # parts of the side
    noise: float  # standard deviation


class Glyphs(Dataset):
    """Glyphs that are drawn when they are read.

    Args:
        length: number of samples.
        fonts: of which each sample has one.
        look: of the images.
        seed: of the samples.
    """

    def __init__(self, length: int, fonts: Sequence[str], look: Look, seed: int):
        self._length = length
        self._look = look
        self._seed = seed
        drawn = [letters(font, look.size) for font in fonts]
        self._letters = torch.stack(drawn)  # (fonts, 62, size, size)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self._length:
            raise IndexError(index)  # ends a loop over the data set
        images, targets = self.draw(np.array([index]))
        return images[0], targets[0]

    def draw(self, indices: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Return samples.

        Args:
            indices: (n,) int64, their numbers.

        Returns:
            Images (n, 1, size, size) float32, and targets (n,) int64.
        """
        look, size = self._look, self._look.size
        targets = indices % look.classes
        chance = uniform(seed_of(self._seed, "look"), indices, 40)
        font = (chance[:, 0] * len(self._letters)).long()
        straight = self._letters[font, torch.from_numpy(targets)][:, None]
        # 1. Where each pixel comes from, in coordinates from -1 to 1: turned, sheared, stretched,
        # shifted, and bent by a coarse grid of displacements.
        signed = 2 * chance - 1
        turn, shear = 0.2 * signed[:, 1], 0.2 * signed[:, 2]
        wide, high = 1.05 + 0.15 * signed[:, 3], 1.05 + 0.15 * signed[:, 4]
        right, down = 2 * look.shift * signed[:, 5], 2 * look.shift * signed[:, 6]
        cos, sin = turn.cos(), turn.sin()
        rows = [
            torch.stack([wide * cos, wide * (shear - sin), right], 1),
            torch.stack([high * sin, high * cos, down], 1),
        ]
        places = nn.functional.affine_grid(
            torch.stack(rows, 1), [len(indices), 1, size, size], align_corners=False
        )
        coarse = signed[:, 8:40].view(-1, 2, 4, 4)
        bent = nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=True)
        places = places + 2 * look.bend * bent.permute(0, 2, 3, 1)
        # 2. The ink, more or less of it, and noise.
        ink = nn.functional.grid_sample(straight, places, align_corners=False)
        ink = ink * (0.6 + 0.4 * chance[:, 7]).view(-1, 1, 1, 1)
        if look.noise:
            ink = ink + look.noise * self._noise(indices)
        return (ink - _MEAN) / _STD, torch.from_numpy(targets)

    def _noise(self, indices: NDArray[np.int64]) -> Tensor:
        """Return (n, 1, size, size) with unit variance: the sum of four uniform numbers."""
        size = self._look.size
        # One draw of 64 bits has four numbers of 16 bits.
        bits = random_bits(seed_of(self._seed, "noise"), indices, size * size)
        parts = bits.view(np.uint16).reshape(len(indices), 1, size, size, 4)
        total = parts.astype(np.float32).sum(-1) / 65535
        return torch.from_numpy((total - 2) * np.float32(3**0.5))


def _in_memory(glyphs: Glyphs) -> Dataset:
    """Return all samples, drawn now, if there are not too many."""
    size = glyphs._look.size
    if len(glyphs) * size * size > _MAX_PIXELS_IN_MEMORY:
        return glyphs
    images, targets = [], []
    for first in range(0, len(glyphs), _CHUNK):
        some = glyphs.draw(np.arange(first, min(first + _CHUNK, len(glyphs))))
        images.append(some[0])
        targets.append(some[1])
    return TensorDataset(torch.cat(images), torch.cat(targets))


def random_bits(seed: int, indices: NDArray[np.int64], count: int) -> NDArray[np.uint64]:
    """Return random numbers of samples, a function of the seed and each sample's number.

    Args:
        seed: 64 bits.
        indices: (n,) int64, the samples' numbers.
        count: numbers of each sample.

    Returns:
        (n, count) uint64.
    """
    places = indices[:, None] * count + np.arange(count)
    key = np.array([[seed]], dtype=np.uint64)
    return mixed_bits(places.ravel(), key).reshape(len(indices), count)


def uniform(seed: int, indices: NDArray[np.int64], count: int) -> Tensor:
    """Return (n, count) float32 from 0 to 1, as ``random_bits`` does."""
    # 24 bits are what float32 can hold.
    high = random_bits(seed, indices, count) >> np.uint64(40)
    return torch.from_numpy(high.astype(np.float32) / 2**24)


@functools.cache
def font(name: str, height: int) -> ImageFont.FreeTypeFont:
    """Return a font of matplotlib's.

    Importing matplotlib would take a second of every worker's start, so its files are looked for.

    Args:
        name: one of ``FONTS``.
        height: pixels of a line.
    """
    spec = find_spec("matplotlib")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).with_name("mpl-data") / "fonts" / "ttf"
    return ImageFont.truetype(folder / f"{name}.ttf", height)


@functools.cache
def letters(name: str, size: int) -> Tensor:
    """Return all characters of a font upright: (62, size, size) float32, ink from 0 to 1.

    They stand on one line, so that small letters stay smaller than capitals.
    """
    face = font(name, round(0.8 * size))
    drawn = []
    for character in CHARACTERS:
        image = Image.new("L", (size, size))
        middle, line = size / 2, 0.75 * size
        ImageDraw.Draw(image).text((middle, line), character, fill=255, font=face, anchor="ms")
        drawn.append(np.asarray(image))
    return torch.from_numpy(np.stack(drawn)).float() / 255
