"""Warm starts: processes that begin with modules loaded, forked from a server that has loaded them.

Torch takes seconds to import. A server imports it once (``Server.start``), and forks a process for
each ``Order`` in some 30 ms. The new process is a child of the process that asked, as if
``subprocess`` had started it: signals, exit status and end work in the same way.

How a fork becomes the child of another process:

1. The server forks a process in between, which forks the new process and ends at once.
2. The new process has lost its parent. The kernel gives it to the nearest ancestor that adopts
   orphans (``descendants.adopt_orphans``), which is the process that asked.
3. When it sees its new parent, it says its id. Everything about it is set by then.

After any failure on the way, the pipe for that id ends, and the asker starts the process in the
usual way. The code of the server and of the new process lies in ``forking``.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import BinaryIO, NamedTuple

from scaletrain.host import descendants
from scaletrain.host.processes import dies_with_parent

# The server that this process may ask because it was forked with one of its own (``Order.serves``).
# Set by ``forking`` before the process begins.
inherited: "Server | None" = None


READY = b"1"  # a server sends this when it can fork; anything else says why it cannot
_MAX_OBSTACLE = 500  # bytes


class Order(NamedTuple):
    """A process to fork: a module that runs as ``python -m`` would run it."""

    module: str
    arguments: tuple[str, ...]
    environ: dict[str, str]
    parent: int  # the process that asks, which adopts it
    # The server forks only what would load the same modules in the same way in this environment.
    # False: a module of ours that computes nothing. Any environment does, and its process leaves
    # all that the server has loaded to the kernel at its end, instead of freeing it.
    computes: bool = True
    cores: tuple[int, ...] = ()  # it is kept on these; empty: on those of the server
    death_signal: int = 0  # it gets this signal when its parent ends; 0: none
    blocked: tuple[int, ...] = ()  # signals that are blocked when it begins
    new_session: bool = False  # it leads a session of its own, else a group of its own
    serves: bool = False  # it gets a server of its own (``inherited``)
    descriptors: tuple[int, ...] = ()  # their numbers, also in the new process, beside 0, 1 and 2

    def to_json(self) -> bytes:
        """Return the order as text. Names that are not UTF-8 survive."""
        return json.dumps(self._asdict()).encode()

    @classmethod
    def from_json(cls, text: bytes) -> "Order":
        """Return the order that ``to_json`` wrote."""
        value = json.loads(text)
        for name in ("arguments", "cores", "blocked", "descriptors"):
            value[name] = tuple(value[name])
        return cls(**value)


class Forked:
    """A forked process, with the part of ``subprocess.Popen`` that starters use.

    Args:
        pid: its id. It is a child of this process.
        stdin: our end of the pipe to its standard input; None: no pipe.
        stdout: likewise.
        stderr: likewise.
    """

    def __init__(
        self, pid: int, stdin: BinaryIO | None, stdout: BinaryIO | None, stderr: BinaryIO | None
    ):
        self.pid = pid
        self.returncode: int | None = None  # negative for a signal
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal; None while it runs."""
        if self.returncode is None:
            try:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
            except ChildProcessError:  # SIGCHLD is ignored, or other code has waited
                self.returncode = 0
            else:
                if pid:
                    self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; return the exit status.

        Raises:
            subprocess.TimeoutExpired: it runs on after ``timeout`` seconds.
        """
        with contextlib.suppress(ProcessLookupError):
            end = os.pidfd_open(self.pid)
            try:
                _wait_readable(end, timeout)
            finally:
                os.close(end)
        status = self.poll()
        if status is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Server:
    """A forkserver of this process. One thread may use it.

    Args:
        control: our end of the connection to it. It ends when this is closed.
        process: the server, a child of this process.
    """

    def __init__(self, control: socket.socket, process: "subprocess.Popen[bytes] | Forked"):
        self._control = control
        self._process = process
        # None until it has said that it has loaded its modules, or ended.
        self._is_ready: bool | None = None
        self.obstacle = ""  # why it cannot fork, if it has said so; set by ``is_ready``

    @classmethod
    def start(cls, argv: Sequence[str], environ: Mapping[str, str]) -> "Server":
        """Start a program that calls ``forking.serve`` when it has loaded its modules.

        Args:
            argv: its command line. The descriptor to serve on is added.
            environ: the environment of the processes to come.
        """
        control, served = socket.socketpair()
        with served:
            process = subprocess.Popen(
                [*argv, str(served.fileno())],
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                # A fault in it comes up again in the process that is started in the usual way,
                # and that one reports it.
                stderr=subprocess.DEVNULL,
                process_group=0,
                preexec_fn=dies_with_parent(signal.SIGKILL),
                pass_fds=(served.fileno(),),
            )
        return cls(control, process)

    def is_ready(self, timeout_s: float = 0.0) -> bool | None:
        """Return True if it can fork, False if it never will, None if it is still loading.

        Args:
            timeout_s: how long to wait for an answer.
        """
        if self._is_ready is None and _wait_readable(self._control.fileno(), timeout_s):
            try:
                said = self._control.recv(_MAX_OBSTACLE)
            except OSError:
                said = b""
            self._is_ready = said == READY
            if not self._is_ready:
                self.obstacle = said.decode(errors="replace")
        return self._is_ready

    def fork(
        self,
        order: Order,
        *,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.PIPE,
        stderr: int = subprocess.PIPE,
    ) -> Forked | None:
        """Fork a process; return None if that cannot be done.

        Args:
            order: the program that it becomes, with its arguments and surroundings.
            stdin: a descriptor, or PIPE or DEVNULL as for ``subprocess.Popen``.
            stdout: likewise, or a descriptor.
            stderr: likewise, or STDOUT.
        """
        ours: list[BinaryIO | None] = []
        theirs: list[int] = []  # descriptors to send; all are closed here afterwards
        try:
            for number, kind in enumerate((stdin, stdout, stderr)):
                mine, its = _stream(number, kind, theirs)
                ours.append(mine)
                theirs.append(its)
            pid = self._ask(order, theirs)
        finally:
            for descriptor in theirs:
                os.close(descriptor)
        if pid is None:
            for pipe in ours:
                if pipe:
                    pipe.close()
            return None
        return Forked(pid, *ours)

    def close(self) -> None:
        """Let the server end. The processes that it has forked live on."""
        self._control.close()
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def _ask(self, order: Order, streams: list[int]) -> int | None:
        """Send an order; return the id of the new process, None if there is none."""
        answer, its_answer = os.pipe()
        # In a file, since an environment may be larger than a message.
        text = os.memfd_create("order")
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, answer)
            try:
                os.write(text, order.to_json())
                descriptors = [text, its_answer, *streams, *order.descriptors]
                adopted_before = descendants.adopt_orphans()
                stack.callback(descendants.adopt_orphans, adopted_before)
                socket.send_fds(self._control, [b"1"], descriptors, socket.MSG_NOSIGNAL)
            except OSError:  # the server has ended
                return None
            finally:
                os.close(text)
                os.close(its_answer)
            # Once the server and the new process have closed it, the pipe ends.
            pid = os.read(answer, 32)
        return int(pid) if pid else None


def _stream(number: int, kind: int, before: Sequence[int]) -> tuple[BinaryIO | None, int]:
    """Return our end of a standard stream, if it is a pipe, and the new process's end."""
    if kind == subprocess.PIPE:
        reader, writer = os.pipe()
        if number == 0:
            return open(writer, "wb"), reader
        return open(reader, "rb"), writer
    if kind == subprocess.DEVNULL:
        return None, os.open(os.devnull, os.O_RDWR)
    return None, os.dup(before[1] if kind == subprocess.STDOUT else kind)


def _wait_readable(descriptor: int, timeout_s: float | None) -> bool:
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        return bool(selector.select(timeout_s))
