"""The kernel's side: fork the workers, show their output, and return their results.

1. A thread of its own forks the workers (``Team.start``), and stays until they have ended.
2. The calling thread shows their output and takes their results (``Team.follow``).
3. If one fails, the others are stopped, and the first cause is raised.
4. Whatever happens, no process is left (``Team.stop``).
"""

import codecs
import contextlib
import multiprocessing
import os
import re
import selectors
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from scaletrain.errors import UserError
from scaletrain.host.names import host_name
from scaletrain.host.processes import kill_marked, signal_name
from scaletrain.launching.job import STORE_FD, Job
from scaletrain.launching.launchers import local
from scaletrain.launching.store import bind_store
from scaletrain.launching.supervision import first_cause
from scaletrain.launching.supervision.screen import ERROR, OUTPUT, Merger
from scaletrain.notebook import worker
from scaletrain.notebook.worker import Assignment
from scaletrain.run.failure import Failure, FailureKind
from scaletrain.run.layout import RunDir
from scaletrain.run.progress import LAUNCH_MARK
from scaletrain.world import World

_GRACE_S = 1.0  # after a failure, time for others to report an earlier or better cause
_STOP_S = 3.0  # from SIGTERM to SIGKILL
_INTERRUPT_S = 30.0  # after an interrupt, time for workers to write a checkpoint and end
_TICK_S = 0.1
_CHUNK_BYTES = 65536
_PIECE = re.compile(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+")  # a line, or the beginning of one
# torch's words in a fork of a process that has used CUDA, or backward on a machine with GPUs.
_FORKED_TOO_LATE = re.compile("forked subprocess|fork-based multiprocessing")
_CURE = (
    "restart the kernel, and touch the GPU and call backward() only inside the function"
    " (torch.cuda.is_available() counts, too)"
)

_is_worker = False  # whether this process is a worker; set in the fork alone


class WorkerError(RuntimeError):
    """A worker has failed. The text is the first cause, with its traceback."""

    def _render_traceback_(self) -> list[str]:
        """Show the worker's traceback in the notebook, instead of ``notebook_launch``'s own."""
        return str(self).splitlines()


def notebook_launch(
    function: Callable[..., Any],
    workers: int = 1,
    args: Sequence[Any] = (),
    *,
    every_rank: bool = False,
    threads: int | None = None,
) -> Any:
    """Run a function on several workers of this host, from a notebook; return its result.

    The workers are forks of this process: they start at once and see all that the notebook has
    defined and loaded. Their changes stay theirs; only the result comes back. In the function,
    ``scaletrain.attach``, ``scaletrain.join`` and ``torch.distributed.init_process_group()`` work
    as they do in a script.

    Args:
        function: may be defined in a cell, also a ``lambda``.
        workers: how many.
        args: the function's arguments.
        every_rank: return a list of all ranks' results; by default the result of rank 0.
        threads: of one worker; by default its share of this host's cores.

    Returns:
        The function's result: numbers, texts, tensors (on the CPU), arrays, or lists and dicts
        of them.

    Raises:
        WorkerError: a rank has failed. Its text is the first cause, with the rank's traceback.
        UserError: CUDA is in use in this process, which can then not be forked; or this process
            is a worker itself.
        KeyboardInterrupt: the kernel was interrupted. The workers have ended.

    Example:
        .. code-block:: python

            def train(lr):
                model, exchange = scaletrain.attach(build(), ...)
                ...
                return {"loss": loss.item(), "weights": model.state_dict()}

            result = scaletrain.notebook_launch(train, workers=2, args=[0.1])
    """
    _check(function, workers)
    with tempfile.TemporaryDirectory(prefix="scaletrain-") as folder:
        job = Job((), workers, Path(folder), threads=threads)
        team = _Team(job)
        try:
            team.start(function, tuple(args), every_rank)
            payloads = team.follow()
        except KeyboardInterrupt:
            team.interrupt()
            # Without the frames inside: the notebook's own line says it all.
            raise KeyboardInterrupt from None
        finally:
            team.stop()
    results = [worker.unpacked(payload) if payload else None for payload in payloads]
    return results if every_rank else results[0]


def _check(function: object, workers: object) -> None:
    if not callable(function):
        raise UserError(f"function: {function!r} is not allowed (allowed: a function)")
    if not isinstance(workers, int) or isinstance(workers, bool) or workers < 1:
        raise UserError(f"workers: {workers!r} is not allowed (allowed: 1 or more)")
    world = World.from_env()
    if _is_worker or world.size > 1:
        raise UserError(
            f"notebook_launch starts workers, and this process is one: rank {world.rank} of"
            f" {world.size} (call it in the notebook, or unset the launcher's variables)"
        )
    if torch.cuda.is_initialized():
        raise UserError(
            "CUDA is in use in this process, and a fork of it cannot use the GPU:"
            " restart the kernel, and touch the GPU only inside the function"
        )


class _Worker:
    """A worker, as the kernel sees it. The calling thread alone uses it once it has started."""

    def __init__(self, rank: int, pid: int, channel: Connection):
        self.rank = rank
        self.pid = pid
        self.channel = channel
        self.end = os.pidfd_open(pid)  # becomes readable when the process has ended
        self.payload: bytes | None = None  # its result; None: it has none yet
        self.status: int | None = None  # its exit status, negative for a signal; None: it runs
        self.ended_at = 0.0  # unix seconds

    def send(self, number: int) -> None:
        """Send a signal to it and to the processes that it has started."""
        if self.status is not None:
            return  # reaped: another process may have got its number
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:  # it has no group of its own yet
            os.kill(self.pid, number)

    def reap(self) -> None:
        """Note that it has ended; the processes that it has started end with it."""
        self.send(signal.SIGKILL)
        try:
            _, waited = os.waitpid(self.pid, 0)
            status = os.waitstatus_to_exitcode(waited)
        except ChildProcessError:  # the kernel ignores SIGCHLD
            status = 0 if self.payload is not None else 1
        self.status = status
        self.ended_at = time.time()
        os.close(self.end)
        self.channel.close()


class _Output:
    """The text that a worker writes on one stream."""

    def __init__(self, name: str, kind: bytes):
        self.name = name
        self.kind = kind
        # A read may cut a character in two.
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")


class _Team:
    """The workers of one call."""

    def __init__(self, job: Job):
        self._job = job
        self._mark = f"{os.getpid()}-{time.monotonic_ns()}"
        self._workers: list[_Worker] = []
        self._selector = selectors.DefaultSelector()
        self._merger = Merger()
        # The thread that forks must outlive the workers: they are told to die with it.
        self._forker: threading.Thread | None = None
        self._has_forked = threading.Event()  # set by that thread
        self._may_end = threading.Event()  # set by ``stop``
        self._problem: BaseException | None = None  # of that thread

    # 1. Starting

    def start(self, function: Callable[..., Any], args: tuple[Any, ...], every_rank: bool) -> None:
        """Fork the workers."""
        # A thread that has never computed anything: threads of OpenMP, which do not survive a fork,
        # belong to the thread that has used them, and so does a running event loop.
        self._forker = threading.Thread(
            target=self._fork_all, args=(function, args, every_rank), daemon=True
        )
        self._forker.start()
        self._has_forked.wait()
        if self._problem:
            raise self._problem

    def _fork_all(self, *work: Any) -> None:
        try:
            environ = {**os.environ, LAUNCH_MARK: self._mark}
            environ["SCALETRAIN_RUN_DIR"] = str(self._job.run_dir)
            listening = bind_store("127.0.0.1", self._job.workers, environ)
            with listening:
                for command in local.plan(self._job).commands:
                    assert command.rank is not None
                    self._fork(command.rank, environ | dict(command.env), listening, *work)
        except BaseException as problem:
            self._problem = problem
        self._has_forked.set()
        self._may_end.wait()

    def _fork(
        self,
        rank: int,
        environ: dict[str, str],
        listening: socket.socket,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        every_rank: bool,
    ) -> None:
        global _is_worker
        here, there = multiprocessing.Pipe()
        out_here, out_there = os.pipe()
        err_here, err_there = os.pipe()
        store = listening.fileno() if rank == 0 else -1
        if rank == 0:
            environ = {**environ, STORE_FD: str(store)}
        assignment = Assignment(
            function=function,
            args=args,
            environ=environ,
            threads=int(environ["OMP_NUM_THREADS"]),
            run_dir=self._job.run_dir,
            returns=every_rank or rank == 0,
            out=out_there,
            err=err_there,
            channel=there,
            store=store,
        )
        with warnings.catch_warnings():
            # Python 3.12 warns of a fork beside threads; `worker` takes care of that.
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            status = 1
            try:
                _is_worker = True
                status = worker.become(assignment)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)  # a fork must not run the kernel's exit handlers
        there.close()
        os.close(out_there)
        os.close(err_there)
        member = _Worker(rank, pid, here)
        self._workers.append(member)
        self._selector.register(member.end, selectors.EVENT_READ, member)
        self._selector.register(member.channel, selectors.EVENT_READ, member)
        for descriptor, kind in ((out_here, OUTPUT), (err_here, ERROR)):
            os.set_blocking(descriptor, False)
            self._selector.register(descriptor, selectors.EVENT_READ, _Output(f"rank {rank}", kind))

    # 2. Following

    def follow(self) -> list[bytes]:
        """Show the output until all workers have ended; return their results, packed.

        Raises:
            WorkerError: one has failed.
        """
        is_released = False
        while self._living():
            self._look(_TICK_S)
            if any(member.status for member in self._workers):
                raise WorkerError(self._first_cause())
            if not is_released and all(member.payload is not None for member in self._workers):
                is_released = True
                for member in self._workers:
                    with contextlib.suppress(OSError):
                        member.channel.send_bytes(b"")
        self._look(0.0)
        return [member.payload or b"" for member in self._workers]

    def _living(self) -> list[_Worker]:
        return [member for member in self._workers if member.status is None]

    def _look(self, seconds: float) -> None:
        """Wait for something to happen, and take note of all that has."""
        for key, _ in self._selector.select(seconds):
            if isinstance(key.data, _Output):
                self._read(key.fd, key.data)
            elif key.fd == key.data.end:
                self._end(key.data)
            else:
                self._receive(key.data)

    def _read(self, descriptor: int, output: _Output) -> None:
        data = b""
        with contextlib.suppress(BlockingIOError):
            data = os.read(descriptor, _CHUNK_BYTES)
            if not data:
                self._selector.unregister(descriptor)
                os.close(descriptor)
        prefix = f"[{output.name}] ".encode() if self._job.workers > 1 else b""
        shown = b""
        for piece in _PIECE.findall(data):
            shown += self._merger.place(output.kind, output.name, prefix, piece)
        stream = sys.stderr if output.kind == ERROR else sys.stdout
        stream.write(output.decoder.decode(shown))
        stream.flush()

    def _receive(self, member: _Worker) -> None:
        self._selector.unregister(member.channel)
        # A worker that has failed closes its end without a word.
        with contextlib.suppress(EOFError, OSError):
            member.payload = member.channel.recv_bytes()

    def _end(self, member: _Worker) -> None:
        self._selector.unregister(member.end)
        with contextlib.suppress(KeyError):
            self._selector.unregister(member.channel)
        member.reap()

    # 3. Failing

    def _first_cause(self) -> str:
        """Stop the others after a moment in which they may report, too; return the first cause."""
        self._look_until(time.monotonic() + _GRACE_S)
        failures = first_cause.reported(RunDir(self._job.run_dir), self._job.workers, self._mark)
        reported = {failure.rank for failure in failures}
        for member in self._workers:
            if member.status and member.rank not in reported:
                failures.append(_failure_of(member))
        cause = first_cause.choose(failures)
        stopped = [f"rank {member.rank}" for member in self._living()]
        self._end_living(_STOP_S)
        text = first_cause.text(cause, stopped)
        if _FORKED_TOO_LATE.search(cause.message):
            text += f"\n  {_CURE}"
        return text

    def _look_until(self, deadline: float) -> None:
        while self._living() and time.monotonic() < deadline:
            self._look(min(_TICK_S, max(0.0, deadline - time.monotonic())))

    def interrupt(self) -> None:
        """Pass an interrupt on, and give the workers time to end; a second one cuts it short."""
        for member in self._living():
            member.send(signal.SIGINT)
        with contextlib.suppress(KeyboardInterrupt):
            self._look_until(time.monotonic() + _INTERRUPT_S)

    # 4. Ending

    def _end_living(self, seconds: float) -> None:
        for member in self._living():
            member.send(signal.SIGTERM)
        self._look_until(time.monotonic() + seconds)

    def stop(self) -> None:
        """End all that still runs, and close everything."""
        if self._forker is not None and self._forker.ident is not None:
            self._has_forked.wait()  # an interrupt may come while it forks
        # Not by way of the selector: an interrupt may have cut `_end` short.
        for member in self._living():
            member.send(signal.SIGKILL)
            member.reap()
        self._look(0.0)  # the last words
        kill_marked(LAUNCH_MARK, self._mark)
        for key in list(self._selector.get_map().values()):
            if isinstance(key.data, _Output):
                os.close(key.fd)
        self._selector.close()
        self._may_end.set()


def _failure_of(member: _Worker) -> Failure:
    """Return the failure of a worker that has ended badly and reported nothing."""
    status = member.status or 1
    kind = FailureKind.EXIT
    message = f"ended with status {status}"
    if status < 0:
        kind = FailureKind.SIGNAL
        message = f"was ended by {signal_name(-status)}"
        if -status == signal.SIGKILL:
            message += " (did memory run out? see dmesg)"
    return Failure(member.rank, host_name(), None, member.ended_at, kind, message)
