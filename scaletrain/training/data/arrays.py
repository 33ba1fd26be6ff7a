"""Inputs and targets in .npy files, which may be larger than the memory."""

from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Gt, Lt
from torch import Tensor
from torch.utils.data import Dataset

from scaletrain.errors import UserError
from scaletrain.needs import IsFile, Needs
from scaletrain.training.data import held_out

NEEDS = Needs(together=("test_inputs", "test_targets"))


def data(
    *,
    inputs: Annotated[str, IsFile()],
    targets: Annotated[str, IsFile()],
    test_inputs: Annotated[str, IsFile()] = "",
    test_targets: Annotated[str, IsFile()] = "",
    test_share: Annotated[float, Gt(0), Lt(1)] = 0.1,
    input_type: Literal["float32", "int64"] = "float32",
) -> tuple[Dataset, Dataset]:
    """Return (train, test): rows of inputs, and of targets: int64, or float32 for real numbers.

    The files stay on the disk; a row is read when it is used.

    Args:
        inputs: a file of numpy, as ``numpy.save`` writes it, with a row for each sample.
        targets: likewise, with as many rows.
        test_inputs: likewise, for testing; empty: a share of the others.
        test_targets: likewise.
        test_share: of the samples that are for testing, where there are no ``test_inputs``.
        input_type: the type that inputs are converted to; int64 suits tokens.

    Raises:
        UserError: a file does not exist or is no array of numbers, or two differ in their length.
    """
    train = _open("", inputs, targets, input_type)
    if not test_inputs:
        return held_out(train, len(train), test_share)
    return train, _open("test_", test_inputs, test_targets, input_type)


class Rows(Dataset):
    """Rows of two arrays.

    Args:
        inputs: (n, ...) numbers.
        targets: (n, ...) numbers.
        input_type: of the inputs that are returned.
    """

    def __init__(self, inputs: np.ndarray, targets: np.ndarray, input_type: str):
        self._inputs = inputs
        self._targets = targets
        self._input_type = input_type
        is_whole = np.issubdtype(targets.dtype, np.integer) or targets.dtype == np.bool_
        self._target_type = "int64" if is_whole else "float32"

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        # Copies: a tensor must not share the memory of a file that is open for reading alone.
        row = np.array(self._inputs[index], dtype=self._input_type)
        target = np.array(self._targets[index], dtype=self._target_type)
        return torch.from_numpy(row), torch.from_numpy(target)


def _open(prefix: str, inputs: str, targets: str, input_type: str) -> Rows:
    """Return the rows of two files."""
    rows = _array(f"data.{prefix}inputs", inputs)
    goals = _array(f"data.{prefix}targets", targets)
    if len(rows) != len(goals):
        raise UserError(
            f"data.{prefix}targets: {targets} has {len(goals)} rows, and {inputs} has {len(rows)}"
            " (allowed: as many rows in both)"
        )
    return Rows(rows, goals, input_type)


def _array(key: str, name: str) -> np.ndarray:
    """Return the array in a file, which stays on the disk."""
    path = IsFile().check(key, name)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(
            f"{key}: {name} cannot be read: {error} (allowed: a file of numpy.save)"
        ) from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf" or array.ndim == 0:
        kind = f"{array.dtype} array" if isinstance(array, np.ndarray) else "archive of arrays"
        raise UserError(f"{key}: {name} holds a {kind} (allowed: an array of numbers, with rows)")
    return array
