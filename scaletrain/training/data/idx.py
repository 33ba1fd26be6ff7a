"""Images and labels in IDX files, such as those of MNIST, plain or compressed with gzip."""

import gzip
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset, TensorDataset

from scaletrain.errors import UserError
from scaletrain.needs import IsFile

_UNSIGNED_BYTE = 8  # the only type of elements that is read
_GZIP = b"\x1f\x8b"
_MAX_BYTES = 2**33  # more is taken for damage


def data(
    *,
    images: Annotated[str, IsFile()],
    labels: Annotated[str, IsFile()],
    test_images: Annotated[str, IsFile()],
    test_labels: Annotated[str, IsFile()],
) -> tuple[Dataset, Dataset]:
    """Return (train, test): images (1, rows, columns) float32, targets int64.

    Images have zero mean and unit variance over the training images.

    Args:
        images: a file of unsigned bytes with three dimensions.
        labels: a file of unsigned bytes with one dimension, as many as images.
        test_images: likewise, for testing.
        test_labels: likewise.

    Raises:
        UserError: a file does not exist, has another format or is cut off, or images and labels
            differ in their number.
    """
    train_pixels, train_targets = _pair("", images, labels)
    test_pixels, test_targets = _pair("test_", test_images, test_labels)
    mean = float(train_pixels.mean())
    std = float(train_pixels.std()) or 1.0
    parts = []
    for pixels, targets in ((train_pixels, train_targets), (test_pixels, test_targets)):
        scaled = torch.from_numpy((pixels.astype(np.float32) - mean) / std)
        parts.append(TensorDataset(scaled[:, None], torch.from_numpy(targets.astype(np.int64))))
    return parts[0], parts[1]


def _pair(prefix: str, images: str, labels: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    pixels = read(f"data.{prefix}images", images, 3)
    targets = read(f"data.{prefix}labels", labels, 1)
    if len(pixels) != len(targets):
        raise UserError(
            f"data.{prefix}labels: {labels} has {len(targets)} labels, and {images} has"
            f" {len(pixels)} images (allowed: as many in both)"
        )
    return pixels, targets


def read(key: str, name: str, dimensions: int) -> NDArray[np.uint8]:
    """Return the array in an IDX file.

    The file begins with two zeros, the type of its elements and the number of its dimensions, a
    byte each; then the length of each dimension follows, 4 bytes with the highest first.

    Args:
        key: that named the file, for errors.
        name: the file.
        dimensions: how many there must be.

    Raises:
        UserError: the file does not exist, or is no such file.
    """
    content = _content(key, IsFile().check(key, name))
    expected = bytes([0, 0, _UNSIGNED_BYTE, dimensions])
    begin = 4 + 4 * dimensions
    if content[:4] != expected or len(content) < begin:
        raise UserError(
            f"{key}: {name} begins with {content[:4].hex()} (allowed: an IDX file of unsigned bytes"
            f" with {dimensions} dimensions, which begins with {expected.hex()})"
        )
    shape = tuple(int(length) for length in np.frombuffer(content, ">u4", dimensions, 4))
    wanted = 1
    for length in shape:
        wanted *= length  # in Python's numbers, which do not overflow
    if len(content) - begin != wanted:
        raise UserError(
            f"{key}: {name} has {len(content) - begin} elements, and its head says {wanted} (allowed:"
            " a whole file)"
        )
    return np.frombuffer(content, np.uint8, wanted, begin).reshape(shape)


def _content(key: str, path: Path) -> bytes:
    """Return the bytes of a file, unpacked."""
    with open(path, "rb") as file:
        is_packed = file.read(2) == _GZIP
    try:
        with gzip.open(path, "rb") if is_packed else open(path, "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except (EOFError, OSError) as error:
        raise UserError(f"{key}: {path} cannot be read: {error} (allowed: a whole file)") from None
    if len(content) > _MAX_BYTES:
        raise UserError(f"{key}: {path} has more than {_MAX_BYTES} bytes (allowed: less)")
    return content
