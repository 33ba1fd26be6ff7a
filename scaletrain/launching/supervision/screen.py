"""The screen: shows the output of processes, byte for byte, and never ends a job.

The supervisor sends the output to the process that started it in frames: one byte for the kind,
four for the length, then the payload.
"""

import base64
import contextlib
import datetime
import errno
import json
import os
import select
import struct
import sys
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, Literal, NamedTuple, TextIO

STATUS = b"0"  # the exit status, in digits; the last frame
OUTPUT = b"1"  # for standard output
ERROR = b"2"  # for standard error

_HEADER = struct.Struct(">cI")
_DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)  # there may be room again later


class Display(NamedTuple):
    """The part of a job's output that a person chose to see."""

    form: Literal["text", "json"] = "text"
    show: Literal["all", "0", "errors"] = "all"  # of all ranks, of rank 0, standard error of all


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

    Args:
        display: the form of our own lines.
    """

    def __init__(self, display: Display = Display()) -> None:  # noqa: B008 (never changed)
        self._is_json = display.form == "json"
        self._closed: set[bytes] = set()  # kinds of streams that have lost their reader
        self._complained = False  # whether the person knows that output is lost

    def say(self, text: str, error: bool = False) -> None:
        """Show lines of our own."""
        kind = ERROR if error else OUTPUT
        data = f"{text}\n".encode(errors="backslashreplace")
        if self._is_json:
            self.write(OUTPUT, json_line("", None, kind, data))
        else:
            self.write(kind, data)

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


def json_line(process: str, rank: int | None, kind: bytes, piece: bytes) -> bytes:
    r"""Return a piece of a line as a line of JSON.

    ``partial`` says that no newline followed. Bytes that are not UTF-8 come in Base64 as well.

    >>> line = json_line("rank 1", 1, OUTPUT, b"caf\xe9\n")
    >>> json.loads(line)["text"], json.loads(line)["base64"]
    ('caf\ufffd', 'Y2Fm6Q==')

    Args:
        process: the name of the process that wrote it; empty: ourselves.
        rank: of the worker that it is; None: another process.
        kind: the stream that it was written to.
        piece: of a line, perhaps with the newline at its end.
    """
    text = piece.removesuffix(b"\n")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
    record: dict[str, Any] = {
        "time": now.replace("+00:00", "Z"),
        "rank": rank,
        "process": process or "scaletrain",
        "stream": "stderr" if kind == ERROR else "stdout",
        "text": text.decode(errors="replace"),
    }
    if not piece.endswith(b"\n"):
        record["partial"] = True
    try:
        text.decode()
    except UnicodeDecodeError:
        record["base64"] = base64.b64encode(text).decode()
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


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

    def is_open(self, kind: bytes, writer: str) -> bool:
        """Return True if the unfinished line on the screen is this writer's."""
        return self._open[kind] == writer
