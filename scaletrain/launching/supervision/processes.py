"""Processes whose output is shown line by line, whose ends are noted, and of which none outlives this process.

Used by the supervisor alone: its standard input tells that nobody listens any more, its standard output carries every line, marked with
``1`` or ``2`` for the stream it belongs on.
"""

import contextlib
import os
import re
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from typing import BinaryIO

from scaletrain.host.processes import dies_with_parent, kill_marked
from scaletrain.launching.job import Companion
from scaletrain.launching.plan import Command
from scaletrain.launching.supervision.supervise import MARK
from scaletrain.run.progress import host_name

_MISTAKE = re.compile(rb"^\d(?:\[[^\]\n]*\] )?scaletrain: error: (.*)$", re.MULTILINE)
_SAID = 20000  # characters kept of what launchers wrote


class Process:
    """A started command and what is known of it."""

    def __init__(
        self,
        command: Command,
        environ: dict[str, str],
        companion: Companion | None = None,
        fd: int = -1,
    ):
        self.name, self.rank, self.stop_s = command.name, command.rank, command.stop_s
        self.companion, self.restarts = companion, 0
        self.restarts_workers, self.interrupt = command.restarts_workers, command.interrupt
        self.is_launcher = self.rank is None and companion is None
        self.host = dict(command.env).get("SCALETRAIN_HOST") or host_name()
        # A launcher gets the chance to end its own workers; a worker has no business without its supervisor.
        death_signal = signal.SIGTERM if self.is_launcher else signal.SIGKILL
        self.popen = subprocess.Popen(
            command.argv, env=environ | dict(command.env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, process_group=0, preexec_fn=dies_with_parent(death_signal), pass_fds=() if fd < 0 else (fd,),
        )  # fmt: skip
        self.ended_at: float | None = None
        self.mistake = ""  # what it said of a person's mistake: the line is on the screen already

    @property
    def status(self) -> int | None:
        return self.popen.returncode

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.is_launcher:
                self.popen.send_signal(number)  # mpirun and torchrun pass it on themselves
            else:
                os.killpg(self.popen.pid, number)


class Processes:
    """All processes of a launch: the workers (or launchers that start them), and the companions beside them."""

    def __init__(self, prefixed: bool):
        self.workers: list[Process] = []
        self.companions: list[Process] = []
        self.orphaned = False  # nobody listens any more
        self.said = ""  # the last of what launchers wrote
        self._prefixed = prefixed
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin.buffer, selectors.EVENT_READ, None)

    def start(
        self,
        command: Command,
        environ: dict[str, str],
        companion: Companion | None = None,
        fd: int = -1,
    ) -> Process:
        """Start a worker, a launcher or a companion; ``fd`` is handed to it. Raises OSError."""
        process = Process(command, environ, companion, fd)
        prefix = f"[{process.name}] ".encode() if self._prefixed else b""
        for pipe, stream in ((process.popen.stdout, b"1"), (process.popen.stderr, b"2")):
            assert pipe
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ, _Lines(process, prefix, stream))
        (self.companions if companion else self.workers).append(process)
        return process

    def watch_pid(self, pid: int, ended: Callable[[], None]) -> bool:
        """Call ``ended`` when a process that somebody else started is gone; false if it is already."""
        with contextlib.suppress(OSError):
            self._selector.register(os.pidfd_open(pid), selectors.EVENT_READ, ended)
            return True
        return False

    def running(self) -> bool:
        return any(process.status is None for process in self.workers)

    def read(self, timeout_s: float) -> None:
        """Show what processes wrote in the meantime, and note which ended."""
        for key, _ in self._selector.select(timeout_s):
            if isinstance(key.data, _Lines):
                self._read_lines(key.fileobj, key.data)  # type: ignore[arg-type]
            elif key.data is None:
                if not os.read(sys.stdin.fileno(), 4096):
                    self.orphaned = True
                    self._selector.unregister(key.fileobj)
            else:
                key.data()
                self._selector.unregister(key.fileobj)
                os.close(key.fd)
        for process in [*self.workers, *self.companions]:
            if process.ended_at is None and process.popen.poll() is not None:
                process.ended_at = time.time()

    def say(self, text: str) -> None:
        """Lines of our own, on standard error."""
        _emit("".join(f"2{line}\n" for line in text.splitlines()).encode())

    def stop(self) -> None:
        """End everything: SIGTERM, then SIGKILL to what is left; companions last."""
        for group in (self.workers, self.companions):
            running = [process for process in group if process.popen.poll() is None]
            for process in running:
                process.signal(signal.SIGCONT)
                process.signal(signal.SIGTERM)
            until = time.monotonic() + max([process.stop_s for process in running], default=0)
            while time.monotonic() < until and any(
                process.popen.poll() is None for process in running
            ):
                self.read(0.05)
            for process in running:
                process.signal(signal.SIGKILL)
        kill_marked(MARK, os.environ[MARK])
        self.read(0)
        for process in [*self.workers, *self.companions]:
            process.popen.wait()
        for _ in range(1000):  # the last output; every writer has ended
            if not any(isinstance(key.data, _Lines) for key, _ in self._selector.select(0)):
                return
            self.read(0)

    def _read_lines(self, pipe: BinaryIO, lines: "_Lines") -> None:
        try:
            data = os.read(pipe.fileno(), 65536)
        except BlockingIOError:
            return
        whole = lines.feed(data)
        if said := _MISTAKE.search(whole):
            lines.process.mistake = said[1].decode(errors="replace")
        if lines.process.is_launcher:
            self.said = (self.said + whole.decode(errors="replace"))[-_SAID:]
        _emit(whole)
        if not data:
            self._selector.unregister(pipe)
            pipe.close()


class _Lines:
    """Cuts a stream into whole lines, each marked with its stream and prefixed with its process."""

    def __init__(self, process: Process, prefix: bytes, stream: bytes):
        self.process = process
        self._prefix, self._stream, self._rest = prefix, stream, b""

    def feed(self, data: bytes) -> bytes:
        """The lines that ``data`` completes; without data (the end) what is left. Lines over 64 KiB are cut."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._rest and (not data or len(self._rest) > 65536):
            lines.append(self._rest)
            self._rest = b""
        return b"".join(self._stream + self._prefix + line + b"\n" for line in lines)


def _emit(lines: bytes) -> None:
    while lines:
        try:
            lines = lines[os.write(sys.stdout.fileno(), lines) :]
        except OSError:  # nobody listens any more; the next read of standard input says so
            return
