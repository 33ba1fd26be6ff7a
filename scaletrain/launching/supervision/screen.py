"""The screen: shows the output of processes, byte for byte, and never ends a job.

The supervisor sends the output to the process that started it in frames: one byte for the kind,
four for the length, then the payload.
"""

import contextlib
import errno
import os
import select
import struct
import sys
from collections.abc import Callable, Iterator
from typing import BinaryIO, TextIO

STATUS = b"0"  # the exit status, in digits; the last frame
OUTPUT = b"1"  # for standard output
ERROR = b"2"  # for standard error

_HEADER = struct.Struct(">cI")
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)  # there may be room again later


def frame(kind: bytes, payload: bytes) -> bytes:
    """Return a frame.

    >>> frame(OUTPUT, b"hello")
    b'1\\x00\\x00\\x00\\x05hello'
    """
    return _HEADER.pack(kind, len(payload)) + payload


def frames(pipe: BinaryIO) -> Iterator[tuple[bytes, bytes]]:
    """Yield (kind, payload) of each frame until the pipe ends; a cut frame is left out."""
    while True:
        header = pipe.read(_HEADER.size)
        if len(header) < _HEADER.size:
            return
        kind, length = _HEADER.unpack(header)
        payload = pipe.read(length)
        if len(payload) < length:
            return
        yield kind, payload


class Screen:
    """This process's standard output and standard error.

    The output of a stream that cannot be written is lost: its reader has gone, or the disk is full.
    The job goes on, since its result is worth more.
    """

    def __init__(self) -> None:
        self._closed: set[bytes] = set()  # kinds of streams that nobody reads any more
        self._complained = False  # whether the person knows that output is lost

    def say(self, text: str, error: bool = False) -> None:
        """Show lines of our own."""
        self.write(ERROR if error else OUTPUT, f"{text}\n".encode(errors="backslashreplace"))

    def write(self, kind: bytes, data: bytes) -> None:
        """Show bytes on a stream as they are."""
        stream = sys.stderr if kind == ERROR else sys.stdout
        if stream is None or kind in self._closed:
            return
        try:
            _write(stream, data)
        except OSError as problem:
            if problem.errno not in _DISK_IS_FULL:
                self._closed.add(kind)
            if kind == OUTPUT and not self._complained:
                self._complained = True
                line = f"scaletrain: standard output is lost: {problem.strerror}; the job goes on"
                self.say(line, error=True)


def _write(stream: TextIO, data: bytes) -> None:
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        # Not a file, as in a notebook.
        stream.write(data.decode(errors="backslashreplace"))
        stream.flush()
        return
    with contextlib.suppress(OSError):
        stream.flush()  # of earlier text
    # Past the stream's own buffer: what it cannot write would come up again when Python ends.
    while data:
        try:
            data = data[os.write(descriptor, data) :]
        except BlockingIOError:
            select.select([], [descriptor], [])


class LineReader:
    """Calls ``show`` with whole lines, for callers that want text instead of bytes.

    Args:
        show: called with each line, and True if it belongs on standard error.
    """

    def __init__(self, show: Callable[[str, bool], None]):
        self._show = show
        self._rest = {OUTPUT: b"", ERROR: b""}  # the beginnings of lines that are not complete

    def write(self, kind: bytes, data: bytes) -> None:
        """Take bytes of a stream."""
        *lines, self._rest[kind] = (self._rest[kind] + data).split(b"\n")
        for line in lines:
            self._show(line.decode(errors="replace").rstrip("\r"), kind == ERROR)

    def end(self) -> None:
        """Show lines that have no end."""
        for kind, rest in self._rest.items():
            if rest:
                self.write(kind, b"\n")


class Merger:
    """Merges the output of several processes line by line, each line with the name of its process.

    An unfinished line is shown when its process pauses (a prompt) or returns the carriage (a
    progress bar). If another process writes meanwhile, its line begins on a new one.
    """

    def __init__(self) -> None:
        # By kind of stream: who wrote the unfinished line that is on the screen, None if none is,
        # and whether the cursor was returned to the beginning of that line.
        self._open: dict[bytes, str | None] = {OUTPUT: None, ERROR: None}
        self._returned = {OUTPUT: False, ERROR: False}

    def place(self, kind: bytes, writer: str, prefix: bytes, piece: bytes) -> bytes:
        """Return the bytes that show a piece of a line.

        Args:
            kind: of the stream.
            writer: the name of the process; empty: our own.
            prefix: stands before each of its lines.
            piece: may end with a newline or a carriage return.
        """
        shown = b""
        is_other = self._open[kind] != writer
        if self._open[kind] is not None and is_other:
            shown += b"\n"
        if is_other or self._returned[kind]:
            shown += prefix
        self._open[kind] = None if piece.endswith(b"\n") else writer
        self._returned[kind] = piece.endswith(b"\r")
        return shown + piece
