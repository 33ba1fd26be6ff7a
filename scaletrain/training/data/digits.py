"""1,797 handwritten digits, 8 x 8 grey, from scikit-learn's wheel: nothing is downloaded."""

import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Lt
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from scaletrain.needs import CountsSamples


def data(
    *,
    test_samples: Annotated[int, Ge(1), Lt(1797), CountsSamples(of=1797)] = 360,
    size: Annotated[int, Ge(8)] = 8,
) -> tuple[Dataset, Dataset]:
    """Return (train, test): images (1, size, size) float32, targets int64.

    Images have zero mean and unit variance over the training images. The split is a fixed
    permutation, the same for every run and every seed. The digits come from the UCI repository.

    Args:
        test_samples: images of the test set; the others are for training.
        size: pixels of each side; images of 8 pixels are enlarged, linear between their pixels.
    """
    rows = torch.from_numpy(_rows())
    pixels, labels = rows[:, :-1], rows[:, -1]
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1797))
    images = pixels.float().view(-1, 1, 8, 8)[order]
    if size != 8:
        images = nn.functional.interpolate(images, size=(size, size), mode="bilinear")
    targets = labels.long()[order]
    train = images[test_samples:]
    # By the training images alone: the test set must not shape what the model sees.
    images = (images - train.mean()) / train.std()
    return (
        TensorDataset(images[test_samples:], targets[test_samples:]),
        TensorDataset(images[:test_samples], targets[:test_samples]),
    )


def _rows() -> np.ndarray:
    """Return (1797, 65) float64: 64 pixels and the label of each digit.

    It reads the file that ``load_digits`` reads: importing scikit-learn would take a second of
    every worker's start.
    """
    spec = find_spec("sklearn")
    assert spec is not None and spec.origin is not None
    with gzip.open(
        Path(spec.origin).with_name("datasets") / "data" / "digits.csv.gz", "rt"
    ) as file:
        return np.loadtxt(file, delimiter=",")
