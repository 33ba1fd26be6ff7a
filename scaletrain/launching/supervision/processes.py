"""Started processes: their output is shown, their ends are noted, none of them outlives us.

Processes that they have started end with us as well. The supervisor adopts orphans
(``host.descendants``), and so finds them without a look at their environment.

Only the supervisor uses this. Its standard input closes when its listener is gone. Its standard
output carries the output of every process, in frames (``screen``, ``output``).
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

from scaletrain.host import descendants
from scaletrain.host.descendants import Descendant
from scaletrain.host.forkserver import Forked, Server
from scaletrain.host.names import host_name
from scaletrain.host.processes import dies_with_parent, kill_marked
from scaletrain.host.stopwatch import Stopwatch
from scaletrain.launching.job import Companion, Job
from scaletrain.launching.plan import Command
from scaletrain.launching.supervision import output, screen, warm
from scaletrain.launching.supervision.output import Logs, Shown, Stream, Writer
from scaletrain.launching.supervision.screen import Display
from scaletrain.run.layout import RunDir
from scaletrain.run.progress import LAUNCH_MARK

# A line in which a process tells a person of their mistake, perhaps with the name of a task.
_MISTAKE = re.compile(rb"^(?:\[[^\]\n]*\] )?scaletrain: error: (.*)$", re.MULTILINE)
_KEPT_OUTPUT = 20_000  # characters kept of the output of launchers
_MOST_NAMED = 3  # processes that a line names


class Process:
    """A process that was started, and the facts known about it.

    Args:
        command: the command to start.
        environ: its environment, to which the command adds.
        companion: the companion that it is, if it is one.
        fd: a descriptor that it inherits; -1: none.
        server: forks the process, if it can; None: it starts cold.
        standard_input: the descriptor that becomes its standard input; by default it has none.

    Raises:
        OSError: the program is not there, or cannot be started.
    """

    def __init__(
        self,
        command: Command,
        environ: dict[str, str],
        companion: Companion | None = None,
        fd: int = -1,
        server: Server | None = None,
        standard_input: int = subprocess.DEVNULL,
    ):
        self.name = command.name
        self.rank = command.rank
        self.companion = companion
        self.restarts = 0  # how often this companion has been started again
        self.stop_s = command.stop_s
        self.interrupt = command.interrupt
        self.restarts_workers = command.restarts_workers
        self.labels = command.labels
        self.is_launcher = self.rank is None and companion is None
        self.host = dict(command.env).get("SCALETRAIN_HOST") or host_name()
        self.ended_at: float | None = None  # unix seconds, set by ``Processes.read``
        # The status that its worker had reported when we ended it because it ran on; see ``ends``.
        self.reported_status: int | None = None
        self.mistake = ""  # a person's mistake that it told
        self.mistake_is_shown = False
        # A launcher gets the chance to end its own workers. A worker is of no use without us.
        death_signal = signal.SIGTERM if self.is_launcher else signal.SIGKILL
        environ = environ | dict(command.env)
        descriptors = () if fd < 0 else (fd,)
        forked = None
        if server:
            forked = warm.start(server, command, environ, descriptors, death_signal, standard_input)
        self.popen: subprocess.Popen[bytes] | Forked = forked or subprocess.Popen(
            command.bound_argv,
            env=environ,
            stdin=standard_input,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # A group of its own: a signal then reaches everything that the process has started.
            process_group=0,
            preexec_fn=dies_with_parent(death_signal),
            pass_fds=descriptors,
        )

    @property
    def status(self) -> int | None:
        """The exit status, negative for a signal; None while it runs."""
        if self.popen.returncode is not None and self.reported_status is not None:
            return self.reported_status
        return self.popen.returncode

    @property
    def is_running(self) -> bool:
        """Whether it had not ended when ``Processes.read`` last looked."""
        return self.popen.returncode is None

    def signal(self, number: int) -> None:
        """Send a signal to the process and those that it has started.

        A launcher gets it alone, and passes it on.
        """
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.is_launcher:
                self.popen.send_signal(number)
            else:
                os.killpg(self.popen.pid, number)


class Processes:
    """All processes of a launch: workers (or launchers that start them), and companions.

    Only the supervisor's thread uses it.

    Args:
        job: the workers.
        several: lines begin with the name of the process that wrote them.
        display: the output that a person chose to see.
        suffix: of the files that other hosts have, too (``output.Logs``).
        standard_input: a descriptor for rank 0; -1: none. See ``forget_standard_input``.
    """

    def __init__(
        self,
        job: Job,
        several: bool,
        display: Display,
        suffix: str = "",
        standard_input: int = -1,
    ):
        self.workers: list[Process] = []
        self.companions: list[Process] = []
        self.orphaned = False  # the listener is gone; set by ``read``
        self.launcher_output = ""  # the last characters that launchers wrote; set by ``read``
        self._standard_input = standard_input
        self._several = several
        self._several_ranks = several or job.workers > 1
        self._shown = Shown(display)
        self._logs = Logs(RunDir(job.run_dir), suffix, self.say)
        self._outputs: list[_Output] = []  # whose pipes are open
        # Everything that ``read`` waits for. A key's data is ``_Output`` for a pipe, a function to
        # call for the end of a process that somebody else started, None for standard input.
        self._selector = selectors.DefaultSelector()
        self._selector.register(sys.stdin.buffer, selectors.EVENT_READ, None)

    @property
    def all(self) -> list[Process]:
        """Workers and companions."""
        return [*self.workers, *self.companions]

    def start(
        self,
        command: Command,
        environ: dict[str, str],
        companion: Companion | None = None,
        fd: int = -1,
        server: Server | None = None,
    ) -> Process:
        """Start a worker, a launcher or a companion (see ``Process``)."""
        standard_input = subprocess.DEVNULL
        # Launchers such as srun read all of it, wanted or not, and may give it to every rank.
        if command.rank == 0 and self._standard_input >= 0:
            standard_input = self._standard_input
        process = Process(command, environ, companion, fd, server, standard_input)
        writer = self._writer(process.name, process.rank, process.is_launcher)
        cuts_lines = self._several or self._shown.display.form == "json"
        for pipe, kind in (
            (process.popen.stdout, screen.OUTPUT),
            (process.popen.stderr, screen.ERROR),
        ):
            assert pipe
            # One thread reads all pipes: no read may wait for a writer.
            os.set_blocking(pipe.fileno(), False)
            stream = Stream(writer, kind, cuts_lines, process.labels, self._worker)
            pipe_output = _Output(process, stream)
            self._outputs.append(pipe_output)
            self._selector.register(pipe, selectors.EVENT_READ, pipe_output)
        group = self.companions if companion else self.workers
        group.append(process)
        return process

    def forget_standard_input(self) -> None:
        """Close our copy of rank 0's standard input, once all processes have started.

        A pipe's writer learns that its reader is gone when the last copy is closed.
        """
        if self._standard_input >= 0:
            os.close(self._standard_input)
            self._standard_input = -1

    def _writer(self, name: str, rank: int | None, is_launcher: bool = False) -> Writer:
        has_prefix = self._several if is_launcher else self._several_ranks
        return Writer(name, rank, is_launcher, f"[{name}] ".encode() if has_prefix else b"")

    def _worker(self, rank: int) -> Writer:
        """Return the writer for the lines of a worker that a launcher has started."""
        return self._writer(f"rank {rank}", rank)

    def watch_pid(self, pid: int, on_end: Callable[[], None]) -> bool:
        """Call ``on_end`` when a process that somebody else started has ended.

        Return False if it has ended already.
        """
        with contextlib.suppress(OSError):
            self._selector.register(os.pidfd_open(pid), selectors.EVENT_READ, on_end)
            return True
        return False

    def any_running(self) -> bool:
        """Return True if a worker or launcher runs."""
        return any(process.is_running for process in self.workers)

    def launchers(self) -> list[Process]:
        """Return the launchers that start workers of their own."""
        return [process for process in self.workers if process.is_launcher]

    def restart_workers(self) -> bool:
        """Return True if a launcher starts workers again when one has failed."""
        return any(process.restarts_workers for process in self.workers)

    def read(self, timeout_s: float) -> None:
        """Show new output, and note the processes that have ended. Wait up to ``timeout_s``."""
        for key, _ in self._selector.select(timeout_s):
            if isinstance(key.data, _Output):
                self._read_output(key.fileobj, key.data)  # type: ignore[arg-type]
            elif key.data is None:
                if not os.read(sys.stdin.fileno(), 4096):
                    self.orphaned = True
                    self._selector.unregister(key.fileobj)
            else:
                key.data()
                self._selector.unregister(key.fileobj)
                os.close(key.fd)
        self._show_prompts()
        for process in self.all:
            if process.ended_at is None and process.popen.poll() is not None:
                process.ended_at = time.time()
        descendants.reap_adopted([process.popen.pid for process in self.all])

    def left_behind(self) -> list[Descendant]:
        """Return processes that workers and companions which have ended have left running."""
        running = [process.popen.pid for process in self.all if process.popen.poll() is None]
        left = []
        for process in descendants.descendants(without=running):
            # A child of a running companion may have lost its parent, and serve the companion.
            if process.group not in running:
                left.append(process)
        return left

    def describe(self, left: list[Descendant]) -> str:
        """Return words for processes that were left behind, with their worker where it is known."""
        names = {process.popen.pid: process.name for process in self.all}
        words = []
        for process in left:
            words.append(descendants.describe(process.pid))
            if process.group in names:
                words[-1] += f" of {names[process.group]}"
        return _listed(words)

    def say(self, text: str) -> None:
        """Show lines of our own, on standard error."""
        for line in text.split("\n"):
            shown = f"{line}\n".encode(errors="backslashreplace")
            self._shown.show(output.OURSELVES, screen.ERROR, shown)

    def hidden_output(self, rank: int) -> str:
        """Return the file with the output of a rank if it was not shown, else an empty text."""
        writer = self._worker(rank)
        path = self._logs.path(writer)
        if self._shown.shows(writer, screen.OUTPUT) or not path.exists():
            return ""
        return str(path)

    def report_status(self, status: int) -> None:
        """Tell the exit status to the process that listens, as the last frame."""
        output.emit(screen.STATUS, b"%d" % status)

    def stop(self) -> None:
        """End everything: first SIGTERM, then SIGKILL for the rest. Companions end last."""
        for group in (self.workers, self.companions):
            self._stop_group(group)
            self._end_left_behind()
        # Where orphans cannot be adopted, the mark in their environment shows most of them.
        kill_marked(LAUNCH_MARK, os.environ[LAUNCH_MARK])
        self.read(0)
        for process in self.all:
            process.popen.wait()
        self._read_rest()

    def _stop_group(self, group: list[Process]) -> None:
        running = [process for process in group if process.popen.poll() is None]
        for process in running:
            process.signal(signal.SIGCONT)  # a stopped process would not see the next one
            process.signal(signal.SIGTERM)
        limit_s = max([process.stop_s for process in running], default=0.0)
        stopwatch = Stopwatch()
        while stopwatch.look() < limit_s and _any_left(running):
            self.read(0.05)
        for process in running:
            if process.popen.poll() is None:
                process.signal(signal.SIGKILL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.popen.wait(1.0)

    def _end_left_behind(self) -> None:
        """End the helpers that ended processes have left running, and name them."""
        groups = [process.popen.pid for process in self.all]
        found = self.left_behind()
        # Loader processes and the like in a worker's own group are no surprise.
        escaped = {process.pid for process in found if process.group not in groups}
        ended = descendants.end(self.left_behind, self.read)
        words = [text for pid, text in ended.items() if pid in escaped]
        if words:
            self.say(f"scaletrain: ended what was left running: {_listed(words)}")
        left = self.left_behind()
        if left:
            self.say(f"scaletrain: cannot be ended, and runs on: {self.describe(left)}")

    def _read_rest(self) -> None:
        """Show the last output. All writers have ended, so that the pipes run dry."""
        for _ in range(1000):
            ready = [key for key, _ in self._selector.select(0)]
            if not any(isinstance(key.data, _Output) for key in ready):
                return
            self.read(0)

    def _read_output(self, pipe: BinaryIO, source: "_Output") -> None:
        try:
            data = os.read(pipe.fileno(), 65536)
        except BlockingIOError:
            return
        stream = source.stream
        pieces = stream.pieces(data)
        if stream.is_labelled:
            for writer, piece in pieces:
                self._logs.keep(writer, piece)
                self._note(source, piece)
        elif data:
            self._logs.keep(stream.process, data)
            self._note(source, data)
        for writer, piece in pieces:
            self._shown.show(writer, stream.kind, piece)
        if not data:
            self._note(source, b"")
            self._shown.end(stream.writer, stream.kind)
            self._outputs.remove(source)
            self._selector.unregister(pipe)
            pipe.close()

    def _note(self, source: "_Output", data: bytes) -> None:
        """Look through output for facts that the supervisor needs."""
        whole = source.note(data)
        process = source.process
        mistake = _MISTAKE.search(whole)
        if mistake:
            process.mistake = mistake[1].decode(errors="replace")
            process.mistake_is_shown = self._shown.shows(source.stream.process, source.stream.kind)
        if process.is_launcher:
            text = self.launcher_output + whole.decode(errors="replace")
            self.launcher_output = text[-_KEPT_OUTPUT:]

    def _show_prompts(self) -> None:
        """Show unfinished lines of processes that have paused."""
        for source in self._outputs:
            for writer, piece in source.stream.paused():
                if source.stream.is_labelled:
                    self._logs.keep(writer, piece)
                    self._note(source, piece)
                self._shown.show(writer, source.stream.kind, piece)


def _listed(words: list[str]) -> str:
    """Return the first few of many words as a list."""
    listed = ", ".join(words[:_MOST_NAMED])
    if len(words) > _MOST_NAMED:
        listed += f", and {len(words) - _MOST_NAMED} more"
    return listed


def _any_left(processes: list[Process]) -> bool:
    return any(process.popen.poll() is None for process in processes)


class _Output:
    """One stream of a process, and the line that it has not finished.

    Args:
        process: the process that writes.
        stream: its bytes, in pieces to show.
    """

    def __init__(self, process: Process, stream: Stream):
        self.process = process
        self.stream = stream
        self._noted = b""  # the beginning of a line, for ``note``

    def note(self, data: bytes) -> bytes:
        """Return the lines that ``data`` completes; without data, at the end, the rest."""
        text = self._noted + data
        end = text.rfind(b"\n") + 1 if data else len(text)
        self._noted = text[end:][-_KEPT_OUTPUT:]
        return text[:end]
