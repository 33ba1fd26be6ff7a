"""The output of all processes: kept in files of the run directory, and shown as a person asks.

1. ``Stream`` takes the bytes of one pipe, and cuts them into pieces of lines with their writers.
2. ``Logs`` keeps the newest output of every writer in the run directory, as it was written.
3. ``Shown`` sends the part that a person chose to the process that started the supervisor.

Another launcher sends the output of all its workers through one pipe. It labels their lines
(``plan.Command.labels``), and ``Stream`` takes the labels off.
"""

import contextlib
import os
import re
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from scaletrain.launching.supervision import screen
from scaletrain.launching.supervision.screen import Display
from scaletrain.run.layout import RunDir

# Behind the end of a line, or behind a carriage return that draws a progress bar anew.
_LINE_ENDS = re.compile(rb"(?<=\n)|(?<=\r)(?!\n|\Z)")
_LONGEST_LINE = 1 << 20  # bytes; of longer lines, other processes may write in the middle
_PROMPT_S = 0.3  # a line that is not finished for this long is shown
_LOG_BYTES = 16 << 20  # of one file; its predecessor is kept, so that a writer has two of them
_OPEN_LOGS = 64  # files at once: a launcher on many hosts has more ranks than we may open files


class Writer(NamedTuple):
    """The writer of a piece of output."""

    name: str  # "rank 3", "server 0", "mpirun"; empty: our own
    rank: int | None = None
    is_launcher: bool = False
    prefix: bytes = b""  # stands before each of its lines


OURSELVES = Writer("")


class Stream:
    """One stream of a process, cut into pieces of lines. The supervisor's thread alone uses it.

    Args:
        process: the process that writes.
        kind: the stream that its output is shown on.
        cuts_lines: whether lines are shown one by one; else bytes are shown as they come.
        labels: how a launcher labels the lines of its workers (``Command.labels``); empty: not.
        worker: returns the writer for a rank in a label.
    """

    def __init__(
        self,
        process: Writer,
        kind: bytes,
        cuts_lines: bool,
        labels: str,
        worker: Callable[[int], Writer],
    ):
        self.process = process
        self.kind = kind
        self._labels = re.compile(labels.encode(), re.MULTILINE) if labels else None
        self._cuts_lines = cuts_lines or bool(labels)
        self._worker = worker
        self.writer = process  # of the line that is not finished
        self._held = b""  # the beginning of a line that is not shown yet
        self._held_since = 0.0  # monotonic

    @property
    def is_labelled(self) -> bool:
        """True if its lines belong to several writers."""
        return self._labels is not None

    def pieces(self, data: bytes) -> list[tuple[Writer, bytes]]:
        """Return the pieces of lines to show now; without data, at the end, all that is held."""
        if not self._cuts_lines:
            return [(self.process, data)] if data else []
        self._held_since = time.monotonic()
        cut = _LINE_ENDS.split(self._held + data)
        self._held = cut.pop()
        if self._held and (not data or len(self._held) > _LONGEST_LINE):
            cut.append(self._held)
            self._held = b""
        pieces = []
        for piece in cut:
            pieces += self._by_writer(piece)
        return pieces

    def paused(self) -> list[tuple[Writer, bytes]]:
        """Return the beginning of a line that is held for so long that it may be a prompt."""
        if not self._held or time.monotonic() - self._held_since < _PROMPT_S:
            return []
        held = self._held
        self._held = b""
        return self._by_writer(held)

    def _by_writer(self, piece: bytes) -> list[tuple[Writer, bytes]]:
        """Return the parts of a piece of a line with their writers, without labels."""
        if self._labels is None:
            return [(self.process, piece)]
        parts = []
        start = 0
        for label in self._labels.finditer(piece):
            if label.start() > start:
                parts.append((self.writer, piece[start : label.start()]))
            self.writer = self._worker(int(label["rank"]))
            start = label.end()
        if start < len(piece):
            parts.append((self.writer, piece[start:]))
        if piece.endswith(b"\n"):
            self.writer = self.process  # a line without a label is the launcher's own
        return parts


class Logs:
    """The files with the output of every writer, each with the newest part of it.

    A file that cannot be written costs its output, never the job.

    Args:
        run_dir: the run directory.
        suffix: stands behind the names of launchers, where other hosts have theirs; or empty.
        say: shows a line of our own.
        limit_bytes: of one file. A writer has two of them.
    """

    def __init__(
        self,
        run_dir: RunDir,
        suffix: str,
        say: Callable[[str], None],
        limit_bytes: int = _LOG_BYTES,
    ):
        self._run_dir = run_dir
        self._suffix = suffix
        self._say = say
        self._limit_bytes = limit_bytes
        # Descriptors of the files that are open, the one that has waited longest first.
        self._open: OrderedDict[Path, int] = OrderedDict()
        self._bytes: dict[Path, int] = {}  # of the files that are open
        self._has_complained = False  # whether the person knows that output is lost

    def path(self, writer: Writer) -> Path:
        """Return the file of a writer."""
        if writer.rank is not None:
            return self._run_dir.rank_log(writer.rank)
        suffix = self._suffix if writer.is_launcher else ""
        return self._run_dir.process_log(writer.name + suffix)

    def keep(self, writer: Writer, data: bytes) -> None:
        """Add output to the file of its writer."""
        path = self.path(writer)
        try:
            descriptor = self._descriptor(path, len(data))
            while data:
                written = os.write(descriptor, data)
                self._bytes[path] += written
                data = data[written:]
        except OSError as problem:
            if not self._has_complained:
                self._has_complained = True
                self._say(
                    f"scaletrain: {path} cannot be written: {problem.strerror}; the job goes on"
                )

    def _descriptor(self, path: Path, num_bytes: int) -> int:
        """Return the descriptor of a file with room for so many bytes."""
        if path in self._open:
            self._open.move_to_end(path)
        else:
            self._open_file(path)
        if self._bytes[path] and self._bytes[path] + num_bytes > self._limit_bytes:
            self._close(path)
            os.replace(path, RunDir.older_log(path))
            self._open_file(path)
        return self._open[path]

    def _open_file(self, path: Path) -> None:
        if len(self._open) >= _OPEN_LOGS:
            self._close(next(iter(self._open)))
        # Not its parents: a run directory that somebody has removed must stay away.
        with contextlib.suppress(FileExistsError):
            path.parent.mkdir()
        # A run that goes on adds to the output of its first part.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._open[path] = descriptor
        self._bytes[path] = os.fstat(descriptor).st_size

    def _close(self, path: Path) -> None:
        del self._bytes[path]
        with contextlib.suppress(OSError):
            os.close(self._open.pop(path))


class Shown:
    """Sends the output that a person chose to see to standard output, in frames (``screen``)."""

    def __init__(self, display: Display):
        self.display = display
        self._merger = screen.Merger()

    def shows(self, writer: Writer, kind: bytes) -> bool:
        """Return True if the output of a writer is shown.

        Lines of launchers and our own always are: they report on the job itself.
        """
        if not writer.name or writer.is_launcher or self.display.show == "all":
            return True
        if self.display.show == "errors":
            return kind == screen.ERROR
        return writer.rank in (0, None)

    def show(self, writer: Writer, kind: bytes, piece: bytes) -> None:
        """Show a piece of a line, unless the person does not want to see it."""
        if not self.shows(writer, kind):
            return
        if self.display.form == "json":
            emit(screen.OUTPUT, screen.json_line(writer.name, writer.rank, kind, piece))
        else:
            emit(kind, self._merger.place(kind, writer.name, writer.prefix, piece))

    def end(self, writer: Writer, kind: bytes) -> None:
        """Finish the line that a writer has left, at the end of its stream."""
        is_text = self.display.form == "text"
        if is_text and writer.prefix and self._merger.is_open(kind, writer.name):
            self.show(writer, kind, b"\n")


def emit(kind: bytes, payload: bytes) -> None:
    """Write a frame to standard output, whole."""
    data = screen.frame(kind, payload)
    while data:
        try:
            written = os.write(sys.stdout.fileno(), data)
        except OSError:  # the listener is gone; the next read of standard input says so
            return
        data = data[written:]
