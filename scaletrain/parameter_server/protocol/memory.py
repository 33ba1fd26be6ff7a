"""Tensor memory shared by a worker and a server on one host: sealed, nameless files (memfd) that vanish with their last user.

And the memory of messages, kept by a process that receives them for as long as it lives.
"""

import contextlib
import ctypes
import fcntl
import mmap
import os
import platform
import stat
from typing import Any

import numpy as np

# Readers of weights check a sequence number before and after (``Slab.versions``), which needs stores to stay in order.
SUPPORTED = hasattr(os, "memfd_create") and platform.machine() in ("x86_64", "AMD64")

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

    def __init__(self, floats: int, blocks: int, mapping: mmap.mmap, descriptor: int):
        self._mapping, self._descriptor = mapping, descriptor
        self.floats = np.frombuffer(mapping, np.float32, floats)
        self.sequence = np.frombuffer(mapping, np.uint64, blocks, offset=_floats_bytes(floats))

    @property
    def num_bytes(self) -> int:
        return len(self._mapping)

    @classmethod
    def create(cls, floats: int, blocks: int) -> "Slab":
        size = _size(floats, blocks)
        descriptor = os.memfd_create("scaletrain", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, size)
        # Nobody can shrink the file under the other end, whose access would then be a fatal signal.
        fcntl.fcntl(
            descriptor,
            fcntl.F_ADD_SEALS,
            fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
        )
        return cls(floats, blocks, mmap.mmap(descriptor, size), descriptor)

    def handle(self) -> dict[str, int]:
        """What the other end needs for ``open``."""
        return {"pid": os.getpid(), "descriptor": self._descriptor, "bytes": len(self._mapping)}

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
        path = f"/proc/{pid}/fd/{number}"
        if not os.readlink(path).startswith(
            "/memfd:scaletrain"
        ):  # before opening: opening a device can have effects
            raise ValueError("not shared memory")
        descriptor = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
        try:
            found = os.fstat(descriptor)
            sealed = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK
            if (
                not stat.S_ISREG(found.st_mode)
                or found.st_uid != os.getuid()
                or found.st_size != size
                or not sealed
            ):
                raise ValueError("not a sealed slab of this size and user")
            access = mmap.ACCESS_WRITE if write else mmap.ACCESS_READ
            return cls(floats, blocks, mmap.mmap(descriptor, size, access=access), -1)
        finally:
            os.close(descriptor)


def _floats_bytes(floats: int) -> int:
    return -(-floats * 4 // 64) * 64


def _size(floats: int, blocks: int) -> int:
    return max(_floats_bytes(floats) + 8 * blocks, 1)
