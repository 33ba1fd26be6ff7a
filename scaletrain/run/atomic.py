"""Files that are written whole or not at all."""

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What a file system says that cannot bring a directory to disk, such as some network ones.
_NO_DIRECTORY_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)


def partial_name(name: str, writer: int | str) -> str:
    """Return the name under which a file is written before it is whole.

    Args:
        name: of the whole file, or a pattern.
        writer: the number of the process that writes, or a pattern.
    """
    return f".{name}.{writer}"


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and move it there if the body succeeds.

    Readers see the old file or the new one, never a partial one, and a full disk leaves the old
    one. The data is on disk before the name changes, and the name is on disk at the end: after
    that, the caller may delete files that this one replaces.

    Raises:
        OSError: the file cannot be written; its ``filename`` is ``path``.
    """
    partial = path.with_name(partial_name(path.name, os.getpid()))
    try:
        yield partial
        _sync(partial)
        os.replace(partial, path)
        try:
            _sync(path.parent)
        except OSError as error:
            if error.errno not in _NO_DIRECTORY_SYNC:
                raise
    except OSError as error:
        error.filename = str(path)  # the file that was wanted
        raise
    finally:
        partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Bring a file's content, or a directory's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) atomically (see ``replacing``)."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, indented, with a newline at its end (see ``replacing``)."""
    with replacing(path) as partial, open(partial, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=2, sort_keys=False)
        file.write("\n")
