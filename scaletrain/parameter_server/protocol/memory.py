"""The memory that tensors cross a host in, and the memory of messages.

A worker and a server on one host share gradients and weights in two ``Slab`` objects, one written
by each end. Processes that receive messages over a network keep their memory (``keep_freed``).
"""

import contextlib
import ctypes
import math
import mmap
from typing import Any

import numpy as np

from scaletrain.host import shared_memory

# Readers of weights check a sequence number before and after (``Slab.sequence``), which needs
# stores to stay in order.
SUPPORTED = shared_memory.SUPPORTED

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_KEPT_BYTES = 256 << 20
_MALLOC_BYTES = 32 << 20  # larger ones come from the system and go back; glibc allows no more

_CACHE_LINE_BYTES = 64
_MAX_NUMBER = 1 << 50  # in a handle from the wire


def keep_freed() -> None:
    """Let freed memory stay with this process, up to 256 MiB, for the next messages.

    ZeroMQ allocates every message that it receives. By default glibc gives so large an area back to
    the system when the message is done with, and each page of the next one is made and zeroed anew.
    A message that lands where the last one lay finds its pages there.

    Does nothing where the C library is not glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_MMAP_THRESHOLD, _MALLOC_BYTES)
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)


class Slab:
    """Tensors of one worker or server, in memory that the other end maps.

    The memory is sealed and has no name: it vanishes with its last user, and nobody can shrink it
    under the other end. Made by ``create`` at the end that writes, and by ``open`` at the other.

    Attributes:
        floats: the dense blocks, float32, one dimension. ``sharding.layout`` says where each lies.
        sequence: uint64, one for each block in the order of the keys: twice the version of the
            block's weights, and odd while they change. Only servers write it.
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
        """The size of the mapped memory."""
        return len(self._mapping)

    @classmethod
    def create(cls, floats: int, blocks: int) -> "Slab":
        """Make a slab of zeros.

        Args:
            floats: number of elements.
            blocks: number of sequence numbers.
        """
        created = shared_memory.create(_size(floats, blocks), reserve=False)
        return cls(floats, blocks, shared_memory.map_created(created), created)

    def handle(self) -> dict[str, int]:
        """Return the description that the other end needs for ``open``, as JSON."""
        assert self._created is not None
        pid, descriptor, num_bytes = self._created
        return {"pid": pid, "descriptor": descriptor, "bytes": num_bytes}

    @classmethod
    def open(cls, handle: Any, floats: int, blocks: int, write: bool = False) -> "Slab":
        """Map the other end's slab.

        Args:
            handle: from the wire; anything may be in it.
            floats: number of elements, as this end expects it.
            blocks: number of sequence numbers, as this end expects it.
            write: map it for writing, too.

        Raises:
            ValueError: the handle is malformed, or names something other than a sealed slab of this
                size and user.
            OSError: it cannot be reached (another host or container).
        """
        numbers: list[Any] = []
        if isinstance(handle, dict):
            numbers = [handle.get(name) for name in ("pid", "descriptor", "bytes")]
        if not numbers or not all(_is_number(number) for number in numbers):
            raise ValueError("malformed handle of shared memory")
        created = shared_memory.Handle(*numbers)
        # Each end works out the size by itself: another size means another plan of the blocks.
        if created.num_bytes != _size(floats, blocks):
            raise ValueError("shared memory has a wrong size")
        mapping = shared_memory.map_opened(created, write=write)
        return cls(floats, blocks, mapping, None)


def _is_number(value: object) -> bool:
    """Return True for a number that a handle may hold."""
    return type(value) is int and 0 <= value < _MAX_NUMBER


def _floats_bytes(floats: int) -> int:
    """Return the bytes of the vector, up to the cache line where the sequence numbers begin."""
    return math.ceil(floats * 4 / _CACHE_LINE_BYTES) * _CACHE_LINE_BYTES


def _size(floats: int, blocks: int) -> int:
    """Return the bytes of a slab, at least one: empty memory cannot be mapped."""
    return max(_floats_bytes(floats) + 8 * blocks, 1)
