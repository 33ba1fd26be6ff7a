"""Tensor memory shared by a worker and a server on one host: sealed, nameless files (memfd) that vanish with their last user.

And the memory of messages, kept by a process that receives them for as long as it lives.
"""

import contextlib
import ctypes
import mmap
from typing import Any

import numpy as np

from scaletrain.host import shared_memory

# Readers of weights check a sequence number before and after (``Slab.versions``), which needs stores to stay in order.
SUPPORTED = shared_memory.SUPPORTED

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # glibc, mallopt(3)
_KEPT_BYTES = 256 << 20
_MALLOC_BYTES = 32 << 20  # larger ones come from the system and go back; glibc allows no more


def keep_freed() -> None:
    """Let freed memory stay with this process, up to 256 MiB: a message then lands where the last one lay, in pages that are there.

    ZeroMQ allocates every message that it receives; by default glibc gives so large an area back to the system when the message is done
    with, and each of its pages is made and zeroed again for the next. Does nothing where the C library is not glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_MMAP_THRESHOLD, _MALLOC_BYTES), (_TRIM_THRESHOLD, _KEPT_BYTES)):
            mallopt(option, value)


class Slab:
    """A float32 vector and one uint64 a block, in memory that other processes of the same user can map.

    ``sequence[i]`` is twice the version of block i's weights, and odd while they change.
    """

    def __init__(
        self, floats: int, blocks: int, mapping: mmap.mmap, created: shared_memory.Handle | None
    ):
        self._mapping = mapping
        self._created = created  # None in the process that opened it
        self.floats = np.frombuffer(mapping, np.float32, floats)
        self.sequence = np.frombuffer(mapping, np.uint64, blocks, offset=_floats_bytes(floats))

    @property
    def num_bytes(self) -> int:
        return len(self._mapping)

    @classmethod
    def create(cls, floats: int, blocks: int) -> "Slab":
        created = shared_memory.create(_size(floats, blocks), reserve=False)
        return cls(floats, blocks, shared_memory.map_created(created), created)

    def handle(self) -> dict[str, int]:
        """What the other end needs for ``open``."""
        assert self._created is not None
        pid, descriptor, num_bytes = self._created
        return {"pid": pid, "descriptor": descriptor, "bytes": num_bytes}

    @classmethod
    def open(cls, handle: Any, floats: int, blocks: int, write: bool = False) -> "Slab":
        """Map the other end's slab.

        Raises:
            ValueError: the handle is malformed, or names something that is not a slab of this size, sealed, of the same user.
            OSError: it cannot be reached (another host or container).
        """
        numbers = (
            [handle.get(name) for name in ("pid", "descriptor", "bytes")]
            if isinstance(handle, dict)
            else []
        )
        if len(numbers) != 3 or not all(type(n) is int and 0 <= n < 1 << 50 for n in numbers):
            raise ValueError("malformed handle of shared memory")
        pid, number, size = numbers
        if size != _size(floats, blocks):
            raise ValueError("shared memory has a wrong size")
        opened = shared_memory.map_opened(shared_memory.Handle(pid, number, size), write=write)
        return cls(floats, blocks, opened, None)


def _floats_bytes(floats: int) -> int:
    return -(-floats * 4 // 64) * 64


def _size(floats: int, blocks: int) -> int:
    return max(_floats_bytes(floats) + 8 * blocks, 1)
