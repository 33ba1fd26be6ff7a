"""A text file as sequences of bytes or characters, each with the one that follows."""

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor
from torch.utils.data import Dataset

from scaletrain.errors import UserError
from scaletrain.needs import IsFile


def data(
    *,
    file: Annotated[str, IsFile()],
    test_file: Annotated[str, IsFile()] = "",
    test_share: Annotated[float, Gt(0), Lt(1)] = 0.1,
    tokens: Literal["bytes", "characters"] = "bytes",
    length: Annotated[int, Ge(1)] = 128,
) -> tuple[Dataset, Dataset]:
    """Return (train, test): tokens (length,) int64, and those one place later (length,) int64.

    Args:
        file: to read, in UTF-8 for characters.
        test_file: likewise, for testing; empty: the end of ``file``.
        test_share: of the tokens that are for testing, where there is no ``test_file``.
        tokens: bytes: 256 kinds, and the file may be larger than the memory; characters: one kind
            for each different character of ``file``, in the order of their codes.
        length: of a sequence. A shorter rest at the end of the file is left out.

    Raises:
        UserError: a file does not exist, is shorter than a sequence, or is not in UTF-8, or the
            test has a character that training has not.
    """
    path = IsFile().check("data.file", file)
    test_path = IsFile().check("data.test_file", test_file) if test_file else None
    if tokens == "bytes":
        text = _bytes(path)
        test_text = _bytes(test_path) if test_path else None
    else:
        alphabet = np.unique(_codes("data.file", path))
        text = _places("data.file", path, alphabet)
        test_text = _places("data.test_file", test_path, alphabet) if test_path else None
    if test_text is None:
        middle = round(len(text) * (1 - test_share))
        text, test_text = text[:middle], text[middle:]
    for name, part in (("training", text), ("test", test_text)):
        if len(part) <= length:
            raise UserError(
                f"data.length: {length} is not allowed for a {name} text of {len(part)} {tokens}"
                f" (allowed: 1 to {max(1, len(part) - 1)})"
            )
    return Sequences(text, length), Sequences(test_text, length)


class Sequences(Dataset):
    """Consecutive sequences of a text, and the same one token later.

    Args:
        text: (n,) whole numbers.
        length: of a sequence.
    """

    def __init__(self, text: np.ndarray, length: int):
        self._text = text
        self._length = length

    def __len__(self) -> int:
        return (len(self._text) - 1) // self._length

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)  # ends a loop over the data set
        first = index * self._length
        part = self._text[first : first + self._length + 1].astype(np.int64)
        return torch.from_numpy(part[:-1]), torch.from_numpy(part[1:])


def _bytes(path: Path) -> np.ndarray:
    """Return a file's bytes; they stay on the disk until they are used."""
    if path.stat().st_size == 0:
        return np.empty(0, dtype=np.uint8)  # numpy maps no empty file
    return np.memmap(path, dtype=np.uint8, mode="r")


def _codes(key: str, path: Path) -> np.ndarray:
    """Return the codes of a file's characters: (n,) uint32."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{key}: {path} is not in UTF-8: {error} (allowed: tokens: bytes)"
        ) from None
    return np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)


def _places(key: str, path: Path, alphabet: np.ndarray) -> np.ndarray:
    """Return the places of a file's characters in an alphabet: (n,) int64."""
    codes = _codes(key, path)
    strange = np.setdiff1d(codes, alphabet)
    if len(strange):
        raise UserError(
            f"{key}: {path} has the character {chr(strange[0])!r}, which the training text has not"
            " (allowed: the same characters, or tokens: bytes)"
        )
    return np.searchsorted(alphabet, codes)
