"""Claims on run directories: one run has one directory, and one job at a time works in it.

>>> with in_use(Path("runs/digits"), "--run-dir"):  # doctest: +SKIP
...     train()
"""

import contextlib
import errno
import fcntl
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from scaletrain.errors import UserError
from scaletrain.host.names import host_name
from scaletrain.run.layout import RunDir

# A file system without locks, such as some that several hosts share, answers with these.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


def new_directory(name: Path) -> Path:
    """Make a directory that nobody else has, and return it.

    Making a directory is atomic, also between hosts that share a file system: of two commands that
    start in the same second, one gets ``name`` and the other ``name-2``.

    Raises:
        OSError: no directory can be made there.
    """
    name.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        path = name if number == 1 else name.with_name(f"{name.name}-{number}")
        try:
            path.mkdir()
        except FileExistsError:
            continue
        return path
    raise AssertionError("unreachable")


@contextlib.contextmanager
def in_use(directory: Path, option: str, shared: bool = False) -> Iterator[int]:
    """Keep other jobs out of a run directory while the body runs.

    The kernel ends the claim with the process, however it ends. A file system without locks is used
    without a claim.

    Args:
        directory: made if it is missing.
        option: the option that named it, for errors.
        shared: other hosts run their parts of the same job in it.

    Yields:
        A descriptor. Processes that inherit it prolong the claim until they have ended, too.

    Raises:
        UserError: a job that runs now uses the directory, or it cannot be made.
    """
    path = RunDir(directory).in_use
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(f"{option} {directory}: {error.strerror}") from None
    try:
        _lock(descriptor, directory, option, shared)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, directory: Path, option: str, shared: bool) -> None:
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        user = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
        raise UserError(
            f"{option} {directory}: is in use by {user} (allowed: another directory, or this one"
            " when that job has ended)"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    # For the error above. A full disk must not keep a job from starting.
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {host_name()}\n".encode(), 0)
