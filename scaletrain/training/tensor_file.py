"""Files of tensors that prove their content: safetensors, with a hash of every tensor.

The files are written here instead of by the safetensors library. It would hold Python's lock while
it writes, and training would stand still. The library reads them like any others.

The hash is BLAKE2b of 128 bits, the fastest of ``hashlib`` that nobody can forge; Python's lock is
free while it runs. CRC-32 is some four times as fast, but one in four billion damaged tensors would
pass, and anybody can make a tensor that does. A step does not wait for either.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

_PART_BYTES = 1 << 24  # written or read at once
_ALIGNMENT = 8  # of the data, as safetensors wants it
_MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors

# The format's names of types.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class DamagedFile(Exception):
    """The file is not as it was written. The text says in which way."""


class OtherFormat(Exception):
    """The file is whole, as far as can be told, but of another format. The text is its name."""


@dataclass(frozen=True)
class Content:
    """The content of a file."""

    tensors: dict[str, Tensor]  # on the CPU, contiguous
    state: dict[str, Any]  # JSON


def write(path: Path, kind: str, content: Content) -> None:
    """Write tensors and their hashes, and JSON. The caller makes the file durable.

    Args:
        path: of the new file.
        kind: the format's name, which ``read`` asks for.
        content: to be written.
    """
    hashes = {name: _hash(tensor) for name, tensor in content.tensors.items()}
    header = _header(kind, content, hashes)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in _order(content.tensors):
            data = _bytes(content.tensors[name])
            for first in range(0, len(data), _PART_BYTES):
                file.write(data[first : first + _PART_BYTES])


def check_header(kind: str, content: Content) -> None:
    """Make the header, as ``write`` does. Raise ``ValueError`` if it cannot be written."""
    placeholder = "0" * 32
    header = _header(kind, content, dict.fromkeys(content.tensors, placeholder))
    if len(header) > _MAX_HEADER_BYTES:
        raise ValueError(f"a header of {len(header):,} bytes (at most {_MAX_HEADER_BYTES:,})")


def read(path: Path, kind: str, on_part: Callable[[], None]) -> Content:
    """Read a file, and check all that it holds against its hashes.

    Args:
        path: of the file.
        kind: the format that it must have.
        on_part: called for each tensor: reading may take long.

    Raises:
        DamagedFile: something in it is not as it was written, or it cannot be read.
        OtherFormat: it says that it has another format.
    """
    try:
        with open(path, "rb") as file:
            return _read(file, kind, on_part)
    except OSError as error:
        raise DamagedFile(error.strerror or str(error)) from None
    # Damage to the header may look like anything.
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise DamagedFile(f"its header cannot be read: {type(error).__name__}") from None


def _read(file: BinaryIO, kind: str, on_part: Callable[[], None]) -> Content:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    data_at = 8 + length
    if size < 8 or length > _MAX_HEADER_BYTES or data_at > size:
        raise DamagedFile("it is cut off, or its header is damaged")
    header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    if metadata.get("format") != kind:
        raise OtherFormat(str(metadata.get("format")))
    if _hash_text(metadata["state"]) != metadata["hash"]:
        raise DamagedFile("its state does not have the hash it was written with")
    hashes = json.loads(metadata["hashes"])
    if _hash_text(metadata["hashes"]) != metadata["hash_of_hashes"] or set(hashes) != set(header):
        raise DamagedFile("its hashes are not those it was written with")
    tensors = {}
    for name, entry in header.items():
        on_part()
        first, end = entry["data_offsets"]
        if not 0 <= first <= end <= size - data_at:
            raise DamagedFile(f"tensor {name} is cut off")
        data = torch.empty(end - first, dtype=torch.uint8)
        file.seek(data_at + first)
        _read_into(file, _bytes(data))
        tensor = data.view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if _hash(tensor) != hashes[name]:
            raise DamagedFile(f"tensor {name} does not have the hash it was written with")
        tensors[name] = tensor
    return Content(tensors, json.loads(metadata["state"]))


def _read_into(file: BinaryIO, data: memoryview) -> None:
    for first in range(0, len(data), _PART_BYTES):
        part = data[first : first + _PART_BYTES]
        if file.readinto(part) != len(part):  # type: ignore[attr-defined]
            raise DamagedFile("it is cut off")


def _header(kind: str, content: Content, hashes: Mapping[str, str]) -> bytes:
    """Return the header: where each tensor lies, and the JSON with its hash."""
    state = json.dumps(content.state)
    hashes_text = json.dumps(hashes)
    header: dict[str, Any] = {
        "__metadata__": {
            "format": kind,
            "state": state,
            "hash": _hash_text(state),
            "hashes": hashes_text,
            "hash_of_hashes": _hash_text(hashes_text),
        }
    }
    end = 0
    for name in _order(content.tensors):
        tensor = content.tensors[name]
        first = end
        end += tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [first, end],
        }
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % _ALIGNMENT)


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names in the order of the data: wide types first, so that all are aligned."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _hash(tensor: Tensor) -> str:
    """Return the hash of a contiguous CPU tensor: of its type, its shape and its data."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{_NAMES[tensor.dtype]} {list(tensor.shape)}\n".encode())
    digest.update(_bytes(tensor))
    return digest.hexdigest()


def _hash_text(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data
