"""Two views of one thing: the halves of a glyph, or a glyph and a tone. Nothing is downloaded."""

from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from scaletrain.needs import CountsSamples
from scaletrain.training.data import glyphs
from scaletrain.training.randomness import seed_of

_BANDS = 32  # of a tone's spectrum
_OVERTONES = 4


def data(
    *,
    views: Literal["halves", "tone"] = "halves",
    samples: Annotated[int, Ge(1), CountsSamples()] = 4000,
    test_samples: Annotated[int, Ge(1)] = 1000,
    size: Annotated[int, Ge(8)] = 16,
    classes: Annotated[int, Ge(2), Le(62)] = 10,
    noise: Annotated[float, Ge(0)] = 0.3,
    seed: int = 0,
) -> tuple[Dataset, Dataset]:
    """Return (train, test) of (first view, second view, target int64), views float32 vectors.

    Halves: the left and the right half of a glyph, (size * size / 2,) each; size is even. Tone: a
    glyph (size * size,), and the spectrum (32,) of a tone whose pitch goes with the class. What is
    drawn and what is heard vary by themselves: the class is all that they share.

    Args:
        views: of which kind.
        samples: of the training set.
        test_samples: of the test set, in fonts that are in no training image.
        size: pixels of a glyph's side.
        classes: the first of 0-9, A-Z, a-z.
        noise: standard deviation of the noise in both views.
        seed: of all samples.
    """
    drawn = glyphs.data(
        samples=samples,
        test_samples=test_samples,
        size=size,
        classes=classes,
        noise=noise,
        seed=seed,
    )
    parts = []
    for name, part in zip(("train", "test"), drawn, strict=True):
        images, targets = _all(part)
        if views == "halves":
            first, second = images.chunk(2, dim=-1)
        else:
            first, second = images, _tones(targets, classes, noise, seed_of(seed, "tones", name))
        parts.append(TensorDataset(first.flatten(1), second.flatten(1), targets))
    return parts[0], parts[1]


def _all(dataset: Dataset) -> tuple[Tensor, Tensor]:
    """Return all images and targets of glyphs."""
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[0], dataset.tensors[1]
    lazy = cast(Any, dataset)
    return lazy.draw(np.arange(len(lazy)))


def _tones(targets: Tensor, classes: int, noise: float, seed: int) -> Tensor:
    """Return the spectra of tones: (n, 32) float32, in bands that are equally wide in pitch.

    The fundamental lies in the lower half, and overtones above it. Loudness and pitch vary a
    little.
    """
    indices = np.arange(len(targets))
    chance = glyphs.uniform(seed, indices, 2 + _BANDS)
    spread = (targets + 0.5 + 0.8 * (chance[:, 0] - 0.5)) / classes
    bands = torch.arange(_BANDS).float()
    spectrum = torch.zeros(len(targets), _BANDS)
    for overtone in range(1, _OVERTONES + 1):
        # A band is a quarter of an octave.
        place = _BANDS / 2 * spread + 4 * np.log2(overtone)
        peak = torch.exp(-0.5 * (bands - place[:, None]) ** 2)
        spectrum += peak * (0.6 + 0.8 * chance[:, 1:2]) / overtone
    # Uniform noise of this width has the standard deviation ``noise``.
    return 2 * spectrum + noise * 12**0.5 * (chance[:, 2:] - 0.5)
