"""Signs of life: how far a worker is, its waits, and its failure.

A worker overwrites one small file in place (``RunDir.progress``), which takes 10 to 15 us: cheap
enough for every step. It writes another one, once, if it fails (``RunDir.failure``). The supervisor
reads both. This module imports no torch.

Engines call ``entering`` for each collective, and everything else that waits for other processes
says so with ``waiting``. That is how a hang gets a name, and how the rank that holds up the others
is told apart from those that wait for it (``launching.supervision.hangs``).
"""

import contextlib
import faulthandler
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil

from scaletrain.host.names import host_name
from scaletrain.host.processes import machine, start_ticks, state
from scaletrain.run import flight
from scaletrain.run.atomic import write_json
from scaletrain.run.failure import failure_from_exception
from scaletrain.run.layout import RunDir
from scaletrain.timeouts import ENDS_ITSELF_S, WATCHED_S
from scaletrain.world import OWN_LAUNCHERS, World

# Set by batch scripts, which show the first cause themselves when their workers have ended.
SUPERVISED = "SCALETRAIN_SUPERVISED"
# Every process of a launch carries this variable. Nested launches append their own marks.
LAUNCH_MARK = "SCALETRAIN_LAUNCH"

# A worker that gets this signal writes the Python stacks of all its threads (``RunDir.stacks``).
# A real-time signal, which neither training nor a person's script has a handler for.
STACKS_SIGNAL = signal.SIGRTMIN + 1

# Values of ``Progress.doing`` in the phases that the supervisor knows.
STARTING = "starting"
LOOKING_FOR_RANK_0 = "looking for rank 0"
SCRIPT = "running a script"  # a person's own program promises no signs of life
FINISHED = "finished"
FAILED = "failed"

# A wait on a hot path reports itself once it has lasted this long. Shorter waits cost nothing.
LONG_WAIT_S = 1.0

_WIDTH = 896  # bytes of a progress file, so that each report overwrites the whole one before
_WEIGH_S = 2.0  # how often memory is asked for
_SYNC_S = 2.0  # how often the file is brought to a folder that several hosts share


@dataclass(slots=True)
class Progress:
    """The last report of one worker: the content of its progress file."""

    rank: int
    pid: int
    host: str
    time: float = 0.0  # unix seconds of this report, the worker's last sign of life
    step: int | None = None  # steps done; None until the worker says that it begins
    doing: str = STARTING
    collective: str = ""  # the last collective it entered, with its size and number
    num_collectives: int = 0  # collectives entered so far
    # The others that it waits for; empty if it does not wait. It may still name a collective that
    # the worker has left, because leaving one is not reported.
    waiting_for: str = ""
    status: int | None = (
        None  # the exit status that its process is about to have, once it has ended
    )
    kept_by: str = ""  # what may keep the process from ending; empty: nothing that is known
    memory_bytes: int | None = None  # resident, of this process alone
    device_memory_bytes: int | None = None  # of tensors, at most so far; None: no GPU is in use
    machine: str = ""  # that the process id belongs to (``host.processes.machine``)
    started: int | None = None  # when the process did, in clock ticks since the machine's boot

    @property
    def process_state(self) -> str | None:
        """The letter of the process's state, as in ``/proc``; empty if it is gone.

        None: it runs on another machine, which alone knows.
        """
        if not self.machine or self.machine != machine():
            return None
        letter = state(self.pid)
        # Another process may have got its id since. A zombie keeps the id, and has no start.
        is_same = letter == "Z" or self.started in (None, start_ticks(self.pid))
        return letter if is_same else ""

    @property
    def ended(self) -> bool:
        """Whether the worker has ended by itself, well or not."""
        return self.doing in (FINISHED, FAILED)

    @property
    def reports_steps(self) -> bool:
        """Whether the worker promises signs of life."""
        return not self.ended and self.doing != SCRIPT

    @property
    def has_joined(self) -> bool:
        """Whether the worker has come to where all workers meet."""
        return self.doing not in (STARTING, LOOKING_FOR_RANK_0)

    @property
    def num_steps(self) -> int:
        """Steps done; -1 until the worker says that it begins."""
        return -1 if self.step is None else self.step

    def to_json(self) -> dict[str, Any]:
        """Return the content of the file. The file's name holds the rank."""
        return {
            "pid": self.pid,
            "host": self.host,
            "time": self.time,
            "step": self.step,
            "doing": self.doing,
            "collective": self.collective[:80],
            "num_collectives": self.num_collectives,
            "waiting_for": self.waiting_for[:80],
            "status": self.status,
            "kept_by": self.kept_by[:120],
            "memory_bytes": self.memory_bytes,
            "device_memory_bytes": self.device_memory_bytes,
            "machine": self.machine,
            "started": self.started,
        }


def read(run_dir: RunDir, rank: int) -> Progress | None:
    """Return the last report of a worker; None if there is none, or it is being written."""
    try:
        value = json.loads(run_dir.progress(rank).read_text(encoding="utf-8"))
        return Progress(rank=rank, **value)
    except (OSError, ValueError, TypeError):
        return None


def read_all(run_dir: RunDir, workers: int) -> list[Progress]:
    """Return the last reports of a job's workers, in the order of their ranks."""
    reports = [read(run_dir, rank) for rank in range(workers)]
    return [report for report in reports if report is not None]


class _Reporter:
    """Writes this process's progress. There is one in a process.

    The training thread writes every field. The thread on which collectives run writes the three
    fields about collectives, and only that thread calls ``entering`` while it runs.
    """

    def __init__(self, run_dir: RunDir, world: World):
        pid = os.getpid()
        self.progress = Progress(
            world.rank, pid, host_name(), machine=machine(), started=start_ticks(pid)
        )
        self.entered = ""  # the collective entered since the last sign of life of another kind
        # The waits inside ``waiting``. Any thread may add to it and remove from it.
        self.waits: list[str] = []
        self._file = os.open(
            run_dir.progress(world.rank), os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644
        )
        self._process = psutil.Process()
        self._weighed_at = -math.inf  # when memory was last asked for, on the monotonic clock
        # On several hosts only the ranks themselves can tell that the network is cut.
        self.is_supervised = world.launcher in OWN_LAUNCHERS and world.num_nodes == 1
        self._sync_s = float("inf") if world.num_nodes == 1 else _SYNC_S
        self._synced_at = time.monotonic()

    def write(self) -> None:
        self.progress.time = time.time()
        self._weigh()
        self.progress.waiting_for = ", ".join(self.waits) or self.entered
        text = json.dumps(self.progress.to_json()).ljust(_WIDTH - 1) + "\n"
        # A report is not worth a step: on a full disk the worker trains on.
        with contextlib.suppress(OSError):
            os.pwrite(self._file, text.encode(), 0)
            if time.monotonic() - self._synced_at > self._sync_s:
                os.fdatasync(self._file)
                self._synced_at = time.monotonic()

    def _weigh(self) -> None:
        """Note this process's memory, now and then: asking takes longer than a report."""
        now = time.monotonic()
        if now - self._weighed_at < _WEIGH_S:
            return
        self._weighed_at = now
        self.progress.memory_bytes = self._process.memory_info().rss
        # A GPU can only be in use if torch is loaded, which this module does not do.
        cuda = getattr(sys.modules.get("torch"), "cuda", None)
        if cuda is not None and cuda.is_initialized():
            self.progress.device_memory_bytes = cuda.max_memory_allocated()

    def end(self, doing: str, status: int) -> None:
        """Note how this worker has ended. ``close`` reports it."""
        self.progress.doing = doing
        self.progress.status = status

    @property
    def is_in_its_process(self) -> bool:
        """False in a child that the worker has forked."""
        return os.getpid() == self.progress.pid

    def close(self) -> None:
        if not self.is_in_its_process:
            return
        self.progress.kept_by = _kept_by()
        self.write()
        with contextlib.suppress(OSError):
            os.fdatasync(self._file)
        os.close(self._file)


_reporter: _Reporter | None = None


def _forget_reporter() -> None:
    """Leave the reports to the worker, in a child that it has forked."""
    global _reporter
    _reporter = None


os.register_at_fork(after_in_child=_forget_reporter)


@contextlib.contextmanager
def reporting(
    run_dir: Path, world: World, runner_files: Collection[str] = ()
) -> Iterator[Callable[[int], None]]:
    """Supervise this worker while the body runs; yield a function to call after each step.

    The function takes the number of steps done. Call it at least every ``Job.timeout_s``.

    An exception in the body is recorded with its traceback, step and last collective, and ends the
    process with status 1 (2 for a ``UserError``). Its text is printed only if no supervisor is
    there to print it. Children that the body forks report nothing.

    Args:
        run_dir: the run's directory; made if it is missing.
        world: the worker's place in the job.
        runner_files: source files that run a person's program. Their frames are left out of the
            outer end of a traceback.
    """
    global _reporter
    run_dir.mkdir(parents=True, exist_ok=True)
    files = RunDir(run_dir)
    files.failure(world.rank).unlink(missing_ok=True)
    if world.rank == 0:
        _forget_ranks_beyond(files, world.size)
    reporter = _reporter = _Reporter(files, world)
    reporter.write()
    with (
        open(files.stacks(world.rank), "w", encoding="utf-8") as stacks,
        flight.recorded(files, world.rank, world.size),
    ):
        faulthandler.register(STACKS_SIGNAL, file=stacks, all_threads=True)
        try:
            yield step
            reporter.end(FINISHED, 0)
        except KeyboardInterrupt:
            reporter.end(FAILED, 128 + signal.SIGINT)
            raise SystemExit(128 + signal.SIGINT) from None
        except SystemExit as end:
            status = _exit_status(end)
            reporter.end(FAILED if status else FINISHED, status)
            raise
        except BaseException as error:  # such as asyncio's CancelledError
            # The worker may have handled the end of its child, and fail later of another cause.
            if not reporter.is_in_its_process:
                raise
            hidden = {*runner_files, __file__}
            failure = failure_from_exception(error, world, run_dir, hidden)
            reporter.end(FAILED, failure.exit_code)
            failure = failure._replace(
                step=reporter.progress.step,
                collective=reporter.progress.collective,
                launch=os.environ.get(LAUNCH_MARK, ""),
            )
            is_shown_by_supervisor = LAUNCH_MARK in os.environ or SUPERVISED in os.environ
            try:
                write_json(files.failure(world.rank), failure._asdict())
            except OSError:
                is_shown_by_supervisor = False  # it cannot read what could not be written
            if not is_shown_by_supervisor:
                headline = f"scaletrain: rank {world.rank} failed: {failure.message}"
                print(f"{headline}\n{failure.traceback}", file=sys.stderr)
            raise SystemExit(failure.exit_code) from error
        finally:
            reporter.close()
            _reporter = None
            faulthandler.unregister(STACKS_SIGNAL)


@contextlib.contextmanager
def ending() -> Iterator[None]:
    """End this process soon after the body has failed, whatever keeps it.

    Python waits for threads, child processes and exit handlers. Our own launchers' supervisor ends
    a failed worker that they keep. Another launcher, such as srun, would wait for it for ever.

    A status above 128 says that a signal stopped the worker: it may end in its own time.
    """
    pid = os.getpid()
    try:
        yield
    except SystemExit as end:
        status = _exit_status(end)
        is_ours = os.environ.get("SCALETRAIN_LAUNCHER") in OWN_LAUNCHERS
        # A child that the body has forked ends as it likes.
        if 0 < status < 128 and not is_ours and os.getpid() == pid:
            threading.Thread(target=_end_soon, args=(status,), daemon=True).start()
        raise


def _end_soon(status: int) -> None:
    time.sleep(ENDS_ITSELF_S)
    keeper = _kept_by() or "an exit handler, perhaps"
    line = f"scaletrain: this rank has failed but runs on ({keeper}): it ends itself\n"
    # Past Python's streams, whose locks a stuck thread may hold.
    with contextlib.suppress(OSError):
        os.write(2, line.encode(errors="backslashreplace"))
    os._exit(status)


def _exit_status(end: SystemExit) -> int:
    """Return the exit status that Python gives a process for a ``SystemExit``."""
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        return end.code & 0xFF
    return 1  # a text, which Python prints


def _kept_by() -> str:
    """Name the threads and child processes that Python waits for before this process ends."""
    keepers = []
    for thread in threading.enumerate():
        if thread.name.startswith("QueueFeederThread"):
            keepers.append("a multiprocessing queue that nobody reads")
        elif not thread.daemon and thread is not threading.main_thread():
            keepers.append(f"thread {thread.name!r}")
    # Children of multiprocessing can only be there if it is loaded.
    if "multiprocessing" in sys.modules:
        for child in sys.modules["multiprocessing"].active_children():
            if not child.daemon:
                keepers.append(f"child process {child.name!r}")
    return ", ".join(dict.fromkeys(keepers))


def _forget_ranks_beyond(run_dir: RunDir, size: int) -> None:
    """Remove the reports of ranks that an elastic job goes on without."""
    for rank, path in run_dir.all_progress():
        if rank >= size:
            path.unlink(missing_ok=True)


# Without ``reporting`` the functions below do nothing, so that libraries may call them anywhere.


def step(done: int) -> None:
    """Report that this worker has done this many steps."""
    if _reporter:
        _reporter.progress.step = done
        alive("step")


def alive(doing: str) -> None:
    """Report a sign of life in a long phase between steps, such as "evaluating" or "joining"."""
    if _reporter:
        _reporter.progress.doing = doing
        _reporter.entered = ""
        _reporter.write()


def entering(collective: str, num_bytes: int | None = None) -> None:
    """Report that this worker enters a collective, such as "allreduce", and waits in it.

    Collectives are numbered from 1 in the order of the calls. Leaving one is not reported, since a
    second write would cost as much again: the next sign of life says so.
    """
    if _reporter:
        progress = _reporter.progress
        progress.num_collectives += 1
        size = "" if num_bytes is None else f" {num_bytes:,} bytes"
        progress.collective = f"{collective}{size} #{progress.num_collectives}"
        _reporter.entered = collective
        _reporter.write()


def library_limit(limit: timedelta) -> timedelta:
    """Return the limit for a wait inside a library that a rank's own limit becomes.

    Such a wait goes on counting while the whole job is stopped, and would end a healthy job. If our
    supervisor ends this job should it hang, its verdict comes first: it names the rank, and leaves
    pauses out. Elsewhere the limit is as it is.
    """
    reporter = _reporter
    if reporter is None or not (reporter.is_supervised and reporter.progress.reports_steps):
        return limit
    return timedelta(seconds=WATCHED_S)


@contextlib.contextmanager
def waiting(what: str) -> Iterator[None]:
    """Report that this worker waits for other processes while the body runs.

    Both ends are reported, which takes two writes. On a hot path, enter it only when the wait has
    lasted for ``LONG_WAIT_S``. It also works as a decorator:

    >>> @waiting("the other workers")
    ... def meet() -> None: ...
    """
    reporter = _reporter
    if reporter is None:
        yield
        return
    reporter.waits.append(what)
    reporter.write()
    try:
        yield
    finally:
        reporter.waits.remove(what)
        if reporter is _reporter:  # else ``reporting`` has ended, and its file is closed
            reporter.write()
