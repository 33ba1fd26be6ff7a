"""CIFAR-10 or CIFAR-100 from their binary files: 32 x 32 pixels in colour."""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, TensorDataset

from scaletrain.errors import UserError
from scaletrain.needs import IsFile, IsFolder

_PIXELS = 3 * 32 * 32
_FILES = {
    10: ([f"data_batch_{number}.bin" for number in range(1, 6)], ["test_batch.bin"]),
    100: (["train.bin"], ["test.bin"]),
}


def data(
    *, folder: Annotated[str, IsFolder()], classes: Literal[10, 100] = 10
) -> tuple[Dataset, Dataset]:
    """Return (train, test): images (3, 32, 32) float32, targets int64.

    Each colour has zero mean and unit variance over the training images.

    Args:
        folder: with the unpacked binary version, ``data_batch_1.bin`` and so on, or ``train.bin``
            and ``test.bin``.
        classes: 10: CIFAR-10; 100: the fine labels of CIFAR-100.

    Raises:
        UserError: a file is missing, is no whole number of images, or has an unknown label.
    """
    train_names, test_names = _FILES[classes]
    # CIFAR-100 has a coarse label in front of the fine one.
    labels = 1 if classes == 10 else 2
    train = [_records(folder, name, labels, classes) for name in train_names]
    test = [_records(folder, name, labels, classes) for name in test_names]
    train_images, train_targets = _split(np.concatenate(train), labels)
    test_images, test_targets = _split(np.concatenate(test), labels)
    mean = train_images.mean((0, 2, 3), keepdim=True)
    std = train_images.std((0, 2, 3), keepdim=True).clamp(min=1e-6)
    return (
        TensorDataset((train_images - mean) / std, train_targets),
        TensorDataset((test_images - mean) / std, test_targets),
    )


def _records(folder: str, name: str, labels: int, classes: int) -> NDArray[np.uint8]:
    """Return the records of a file: (n, labels + 3072)."""
    path = IsFile().check("data.folder", str(Path(folder).expanduser() / name))
    content = np.fromfile(path, dtype=np.uint8)
    length = labels + _PIXELS
    if len(content) == 0 or len(content) % length:
        raise UserError(
            f"data.folder: {path} has {len(content)} bytes (allowed: a multiple of {length}, the"
            f" binary version of CIFAR-{classes})"
        )
    records = content.reshape(-1, length)
    largest = int(records[:, labels - 1].max())
    if largest >= classes:
        raise UserError(
            f"data.folder: {path} has the label {largest} (allowed: 0 to {classes - 1})"
        )
    return records


def _split(records: NDArray[np.uint8], labels: int) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.from_numpy(records[:, labels:].astype(np.float32) / 255)
    targets = torch.from_numpy(records[:, labels - 1].astype(np.int64))
    return images.view(-1, 3, 32, 32), targets
