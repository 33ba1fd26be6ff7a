"""Memory shared by processes of one host: a sealed file without a name (``memfd_create``).

Nothing of it has a name, so nothing can be left behind: it is gone when the last process that maps
it is gone, however that process ends. The size of /dev/shm does not bound it.

One process creates the file and tells the others its process id and descriptor. They open it
through ``/proc/<pid>/fd``, which works as long as the creator keeps the descriptor open.
"""

import fcntl
import mmap
import os
import platform
import stat
from typing import NamedTuple

# Readers rely on stores becoming visible in program order, which x86-64 guarantees and other
# processors do not.
SUPPORTED = hasattr(os, "memfd_create") and platform.machine() in ("x86_64", "AMD64")

_NAME = "scaletrain"


class Handle(NamedTuple):
    """Everything that another process needs to open the memory."""

    pid: int  # of the process that created it
    descriptor: int  # its number in that process
    num_bytes: int


def create(num_bytes: int, *, reserve: bool) -> Handle:
    """Create sealed shared memory in this process, filled with zeros.

    The caller closes the descriptor once nobody opens the memory any more.

    Args:
        num_bytes: the size. It is sealed: if the file shrank, another process's access to it would
            end in a fatal signal.
        reserve: take all pages now, so that a lack of memory shows here. Otherwise each page is
            taken when it is first written to.

    Raises:
        OSError: with ``reserve``, there is no room (ENOSPC, ENOMEM).
    """
    descriptor = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        if reserve:
            os.posix_fallocate(descriptor, 0, num_bytes)
        else:
            os.ftruncate(descriptor, num_bytes)
        # The last one keeps others from adding seals, such as one against writing.
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    except OSError:
        os.close(descriptor)
        raise
    return Handle(os.getpid(), descriptor, num_bytes)


def map_created(handle: Handle) -> mmap.mmap:
    """Map memory that this process created, for reading and writing."""
    return mmap.mmap(handle.descriptor, handle.num_bytes)


def map_opened(handle: Handle, *, write: bool) -> mmap.mmap:
    """Map memory that another process created. It stays mapped when its creator ends.

    Args:
        handle: as the other process sent it; it may be wrong, so that everything is checked.
        write: map it for writing, too.

    Raises:
        ValueError: the handle names something other than sealed memory of this size and user.
        OSError: it cannot be reached: its creator has ended (FileNotFoundError), or lives on
            another host or in another container.
    """
    path = f"/proc/{handle.pid}/fd/{handle.descriptor}"
    # Looked at before it is opened: opening a device can have effects.
    if not os.readlink(path).startswith(f"/memfd:{_NAME}"):
        raise ValueError("not shared memory")
    descriptor = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
    try:
        _check(descriptor, handle.num_bytes)
        access = mmap.ACCESS_WRITE if write else mmap.ACCESS_READ
        return mmap.mmap(descriptor, handle.num_bytes, access=access)
    finally:
        os.close(descriptor)


def _check(descriptor: int, num_bytes: int) -> None:
    """Raise ValueError unless the file is sealed, of this size, and belongs to this user."""
    # Of the open file, since the path may lead to another one by now.
    status = os.fstat(descriptor)
    is_ours = stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()
    is_sealed = bool(fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK)
    if not is_ours or not is_sealed or status.st_size != num_bytes:
        raise ValueError("not sealed shared memory of this size and user")
