"""The file: safetensors with the small tensors as they are, and the others coded.

A coded tensor is the list of its elements that are not zero, each with the number of zeros before
it. Numbers that need more than ``gap_bits`` bits are cut by an explicit zero (Han et al. 2016,
figure 2). Distinct values are numbered, and both lists are Huffman codes. Elements are taken as
patterns of bits, so what comes back is equal bit by bit, with negative zeros and NaN.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import pydantic
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from scaletrain.compression import huffman
from scaletrain.compression.huffman import Stream
from scaletrain.errors import UserError

FORMAT = "scaletrain-compressed-1"
_MOST_VALUES = 4096  # distinct ones that are numbered; tensors with more hold each value
_GAP_BITS = range(9)  # that are tried; with 0 every zero is written, as dense tensors want it
_MOST_ELEMENTS = 2**33  # of a tensor; a small file may not ask for all memory
# Types that are coded: the pattern of each element's bits.
_PATTERNS = {"float32": np.uint32, "float16": np.uint16, "bfloat16": np.uint16}


class _Coded(pydantic.BaseModel):
    """How the bytes of a coded tensor are to be read; from the file, so it is checked."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True)

    shape: list[Annotated[int, Field(ge=0)]]
    dtype: Literal["float32", "float16", "bfloat16"]
    gap_bits: Annotated[int, Field(ge=0, le=max(_GAP_BITS))]
    num_symbols: Annotated[int, Field(ge=0, le=_MOST_ELEMENTS)]
    num_values: Annotated[int, Field(ge=0, le=_MOST_VALUES)]  # 0: each symbol has its own
    num_bytes: list[Annotated[int, Field(ge=0)]]  # of the parts and data of gaps and values
    hash: str


class Sizes(NamedTuple):
    """What a file saves."""

    dense_bytes: int  # of the tensors
    file_bytes: int

    @property
    def ratio(self) -> float:
        """Times that the file is smaller."""
        return self.dense_bytes / self.file_bytes


def save(tensors: dict[str, Tensor], path: Path) -> Sizes:
    """Write tensors. The caller makes the file durable.

    Args:
        tensors: by name, on any device.
        path: of the file.
    """
    written: dict[str, Tensor] = {}
    coded: dict[str, dict[str, object]] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        head, data = _encode(tensor) if _dtype(tensor) in _PATTERNS else (None, b"")
        # A few biases are smaller as they are.
        if head is None or len(data) + len(json.dumps(head)) >= tensor.nbytes:
            written[name] = tensor.clone()  # safetensors refuses tensors that share memory
            continue
        coded[name] = head
        written[name] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    # One entry: safetensors writes several in any order, and equal tensors should give equal files.
    metadata = {FORMAT: json.dumps(coded, separators=(",", ":"))}
    safetensors.torch.save_file(written, path, metadata)
    return Sizes(sum(each.nbytes for each in tensors.values()), path.stat().st_size)


def load(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a file by name, on the CPU, equal bit by bit to those that were saved.

    Raises:
        UserError: it is not such a file, or it is damaged.
    """
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if FORMAT not in metadata:
        raise UserError(
            f"{path} is not compressed (allowed: a file of scaletrain export --compress)"
        )
    try:
        heads = json.loads(metadata[FORMAT])
        for name, head in heads.items():
            tensors[name] = _decode(_Coded.model_validate(head), tensors[name])
    except (ValueError, KeyError, AttributeError, MemoryError) as error:  # pydantic's are values
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path} is damaged: {reason}") from None
    return tensors


def _encode(tensor: Tensor) -> tuple[dict[str, object], bytes]:
    """Return how a tensor is coded, and the bytes."""
    elements = _elements(tensor)
    places = np.flatnonzero(elements)
    values, codes, counts = np.unique(elements[places], return_inverse=True, return_counts=True)
    is_numbered = len(values) < _MOST_VALUES

    def num_bits(gap_bits: int) -> float:
        gaps, is_zero = _gaps(places, len(elements), gap_bits)
        bits = huffman.num_bits(np.bincount(gaps))
        if is_numbered:
            return bits + huffman.num_bits(np.append(counts, is_zero.sum()))
        return bits + 8 * elements.itemsize * len(gaps)

    gap_bits = min(_GAP_BITS, key=num_bits)
    gaps, is_zero = _gaps(places, len(elements), gap_bits)
    gap_stream = huffman.encode(gaps, 1 << gap_bits)
    if is_numbered:
        # The number behind those of the values is zero's.
        numbers = np.full(len(gaps), len(values), dtype=np.int64)
        numbers[~is_zero] = codes
        stream = huffman.encode(numbers, len(values) + 1)
    else:
        patterns = np.zeros(len(gaps), dtype=elements.dtype)
        patterns[~is_zero] = elements[places]
        stream = Stream(np.empty(0, np.uint8), np.empty(0, np.uint16), patterns.view(np.uint8))
        values = values[:0]
    head = _Coded(
        shape=list(tensor.shape),
        dtype=_dtype(tensor),  # type: ignore[arg-type]
        gap_bits=gap_bits,
        num_symbols=len(gaps),
        num_values=len(values),
        num_bytes=[len(each.view(np.uint8)) for each in (*gap_stream[1:], *stream[1:])],
        hash=_hash(elements),
    )
    data = b"".join(array.tobytes() for array in (*gap_stream, values, *stream))
    return head.model_dump(), data


def _gaps(
    places: NDArray[np.int64], num_elements: int, gap_bits: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Return the number of zeros before each symbol, and which symbols are zeros themselves.

    Args:
        places: of the elements that are not zero.
        num_elements: of the tensor.
        gap_bits: a zero is a symbol wherever more zeros would be before the next one.
    """
    limit = 1 << gap_bits
    zeros = np.diff(places, prepend=-1) - 1
    behind = num_elements - 1 - int(places[-1] if len(places) else -1)
    inserted = zeros // limit
    total = int(inserted.sum()) + len(places) + -(-behind // limit)
    is_zero = np.ones(total, dtype=bool)
    own = np.cumsum(inserted + 1) - 1  # the places of the elements among the symbols
    is_zero[own] = False
    gaps = np.full(total, limit - 1, dtype=np.int64)
    gaps[own] = zeros % limit
    if behind % limit:
        gaps[-1] = behind % limit - 1
    return gaps, is_zero


def _decode(head: _Coded, blob: Tensor) -> Tensor:
    """Return a coded tensor.

    Raises:
        ValueError: the bytes do not hold it.
    """
    num_elements = math.prod(head.shape)
    if num_elements > _MOST_ELEMENTS or head.num_symbols > num_elements:
        raise ValueError("a tensor of too many elements")
    if blob.dtype != torch.uint8 or len(head.num_bytes) != 4:
        raise ValueError("a coded tensor holds something else than bytes")
    pattern = np.dtype(_PATTERNS[head.dtype])
    reader = _Reader(blob.contiguous().numpy().reshape(-1))
    gap_parts, gap_data, value_parts, value_data = head.num_bytes
    gap_stream = Stream(
        reader.take(1 << head.gap_bits),
        reader.take(gap_parts).view(np.uint16),
        reader.take(gap_data),
    )
    gaps = huffman.decode(gap_stream, head.num_symbols)
    values = reader.take(head.num_values * pattern.itemsize).view(pattern)
    if head.num_values or not value_data:
        lengths = reader.take(head.num_values + 1)
        stream = Stream(lengths, reader.take(value_parts).view(np.uint16), reader.take(value_data))
        patterns = np.append(values, pattern.type(0))[huffman.decode(stream, head.num_symbols)]
    else:
        patterns = reader.take(head.num_symbols * pattern.itemsize).view(pattern)
    reader.end()
    elements = np.zeros(num_elements, dtype=pattern)
    places = np.cumsum(gaps + 1) - 1
    if len(places) and places[-1] >= num_elements:
        raise ValueError("elements lie behind the tensor's end")
    elements[places] = patterns
    if _hash(elements) != head.hash:
        raise ValueError("its content is not what was written")
    signed = elements.view(f"i{pattern.itemsize}")  # torch has few operations on unsigned types
    return torch.from_numpy(signed).view(getattr(torch, head.dtype)).reshape(head.shape)


class _Reader:
    """Takes bytes from the front, never more than there are."""

    def __init__(self, data: NDArray[np.uint8]):
        self._data = data
        self._place = 0

    def take(self, count: int) -> NDArray[np.uint8]:
        """Return a copy of the next bytes."""
        if count > len(self._data) - self._place:
            raise ValueError("a coded tensor is too short")
        self._place += count
        return self._data[self._place - count : self._place].copy()

    def end(self) -> None:
        """Check that all bytes were taken."""
        if self._place != len(self._data):
            raise ValueError("a coded tensor is too long")


def _elements(tensor: Tensor) -> NDArray[np.unsignedinteger]:
    """Return the patterns of a tensor's elements, flat."""
    signed = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    patterns: NDArray[np.unsignedinteger] = (
        tensor.reshape(-1).view(signed).numpy().view(_PATTERNS[_dtype(tensor)])
    )
    return patterns


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _hash(elements: NDArray[np.unsignedinteger]) -> str:
    return hashlib.blake2b(elements.tobytes(), digest_size=16).hexdigest()
