"""Glyphs on a canvas with their exact boxes: for detectors. Nothing is downloaded."""

from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from scaletrain.errors import UserError
from scaletrain.needs import CountsSamples
from scaletrain.training.data import glyphs
from scaletrain.training.randomness import seed_of
from scaletrain.training.workload import Data

_TRIES = 20  # places that are tried for a glyph before it is left out


class Scene(NamedTuple):
    """A canvas, or a batch of them, with the glyphs on it."""

    image: Any  # (1, size, size) float32; in a batch (n, 1, size, size)
    boxes: Any  # (k, 4) float32: left, top, right, bottom in pixels; in a batch a list of them
    labels: Any  # (k,) int64; in a batch a list of them


def data(
    *,
    samples: Annotated[int, Ge(1), CountsSamples()] = 2000,
    test_samples: Annotated[int, Ge(1)] = 400,
    size: Annotated[int, Ge(32)] = 64,
    classes: Annotated[int, Ge(1), Le(62)] = 10,
    most_glyphs: Annotated[int, Ge(1)] = 4,
    least_height: Annotated[int, Gt(7)] = 14,
    most_height: Annotated[int, Gt(7)] = 28,
    noise: Annotated[float, Ge(0)] = 0.05,
    seed: int = 0,
) -> Data:
    """Return (train, test) of ``Scene``, and how a batch is made: boxes and labels stay lists.

    Fonts of the test set are in no training image, as for ``glyphs``. Boxes do not overlap, and are
    exact: every border touches ink. They are half open, so that right - left is the width.

    Args:
        samples: canvases of the training set.
        test_samples: of the test set.
        size: pixels of each side.
        classes: the first of 0-9, A-Z, a-z.
        most_glyphs: on a canvas; there is at least one.
        least_height: of a line of the font, in pixels.
        most_height: likewise.
        noise: standard deviation of the pixels' noise; ink is 1.
        seed: of all samples.

    Raises:
        UserError: no height lies between the least and the most.
    """
    if least_height > most_height:
        raise UserError(
            f"data.least_height: {least_height} is not allowed"
            f" (allowed: 8 to {most_height}, data.most_height)"
        )
    fonts = tuple(name for name in glyphs.FONTS if name not in glyphs.HELD_OUT)
    heights = range(least_height, most_height + 1)
    look = Look(size, classes, most_glyphs, heights, noise)
    train = Canvases(samples, fonts, look, seed_of(seed, "train canvases"))
    test = Canvases(test_samples, glyphs.HELD_OUT, look, seed_of(seed, "test canvases"))
    return Data(train, test, collate)


class Look(NamedTuple):
    """What canvases look like."""

    size: int  # pixels of each side
    classes: int
    most_glyphs: int
    heights: range  # of fonts, in pixels
    noise: float  # standard deviation


class Canvases(Dataset):
    """Canvases that are drawn when they are read, each a function of its number and the seed."""

    def __init__(self, length: int, fonts: tuple[str, ...], look: Look, seed: int):
        self._length = length
        self._fonts = fonts
        self._look = look
        self._seed = seed

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self._length:
            raise IndexError(index)  # ends a loop over the data set
        look = self._look
        random = np.random.Generator(np.random.PCG64(seed_of(self._seed, index)))
        canvas = np.zeros((look.size, look.size), dtype=np.float32)
        boxes: list[tuple[int, int, int, int]] = []
        labels: list[int] = []
        for _ in range(random.integers(1, look.most_glyphs + 1)):
            label = int(random.integers(look.classes))
            name = self._fonts[random.integers(len(self._fonts))]
            ink = _ink(name, int(random.choice(look.heights)), label)
            box = _free_place(ink, boxes, look.size, random)
            if box is not None:
                left, top, right, bottom = box
                canvas[top:bottom, left:right] = ink
                boxes.append(box)
                labels.append(label)
        canvas += look.noise * random.standard_normal(canvas.shape, dtype=np.float32)
        return Scene(
            torch.from_numpy(canvas)[None],
            torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
            torch.tensor(labels, dtype=torch.int64),
        )


def _ink(name: str, height: int, label: int) -> NDArray[np.float32]:
    """Return a character without its margins: every border has ink in it."""
    mask = glyphs.font(name, height).getmask(glyphs.CHARACTERS[label], mode="L")
    ink = np.asarray(mask, dtype=np.uint8).reshape(mask.size[::-1])
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    whole = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return whole.astype(np.float32) / np.float32(255)


def _free_place(
    ink: NDArray[np.float32],
    taken: list[tuple[int, int, int, int]],
    size: int,
    random: np.random.Generator,
) -> tuple[int, int, int, int] | None:
    """Return a box that overlaps no other; None if none was found, or the glyph is too large."""
    height, width = ink.shape
    if max(height, width) > size:
        return None
    for _ in range(_TRIES):
        left = int(random.integers(size - width + 1))
        top = int(random.integers(size - height + 1))
        box = (left, top, left + width, top + height)
        if not any(_overlap(box, other) for other in taken):
            return box
    return None


def _overlap(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> bool:
    apart_across = one[2] <= other[0] or other[2] <= one[0]
    apart_down = one[3] <= other[1] or other[3] <= one[1]
    return not (apart_across or apart_down)


def collate(scenes: list[Scene]) -> Scene:
    """Return a batch: images in one tensor, boxes and labels as lists of different lengths."""
    images: list[Tensor] = [scene.image for scene in scenes]
    boxes = [scene.boxes for scene in scenes]
    labels = [scene.labels for scene in scenes]
    return Scene(torch.stack(images), boxes, labels)
