"""Hangs: is there one, and which rank holds up the others?

A job hangs when its slowest worker gives no sign of life for longer than its limit (``HangWatch``).
The culprit (``find_culprit``) is the rank that is furthest behind and does not wait for others:

1. Compare the reports of the workers: the fewest steps, then the fewest collectives entered.
2. Among those that are equally far, prefer a rank that does not wait for others. Workers report
   their waits (``progress.entering``, ``progress.waiting``). A person's own script under
   torch.distributed reports nothing, so the workers of this host are asked for their Python stacks
   as well, and a main thread inside torch's own waiting functions waits.
3. Among those that are still equal, take the one that has been silent for the longest time.
"""

import contextlib
import enum
import os
import re
import runpy
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from scaletrain.host.names import host_name
from scaletrain.host.processes import handles_signal, state
from scaletrain.host.stopwatch import ABSENT_S
from scaletrain.launching.job import Program
from scaletrain.launching.supervision.first_cause import listed_ranks, ranks_with_verb
from scaletrain.run import progress
from scaletrain.run.failure import Failure, FailureKind
from scaletrain.run.layout import RunDir
from scaletrain.run.progress import STACKS_SIGNAL, Progress
from scaletrain.timeouts import LOOK_S, STACKS_S

HUNG_STATUS = 124  # the exit status of a job that hangs, as timeout(1) has it

_GONE = ("", "Z", "X")  # states of a process that has ended
_STOPPED = ("T", "t")  # states of a process that was stopped, by SIGSTOP or a debugger

# Where a main thread waits for other ranks inside torch: (end of the file's name, function). None
# stands for every function of the file. Our own engines report their waits instead.
_TORCH_WAITS = (
    ("torch/distributed/distributed_c10d.py", None),  # collectives, groups being made
    ("torch/distributed/rendezvous.py", None),  # the store
    ("torch/distributed/utils.py", "_verify_param_shape_across_processes"),  # DDP being made
    ("torch/distributed/utils.py", "_sync_params_and_buffers"),  # the same
    ("torch/nn/parallel/distributed.py", "_sync_module_buffers"),  # DDP before forward
    ("torch/autograd/graph.py", None),  # DDP's reducer during backward
    ("torch/futures/__init__.py", None),  # work that somebody waits for
    ("scaletrain/training/ddp.py", "finish"),  # torch's work, which has no frame of its own
)


class HangWatch:
    """Notices that a job makes no progress.

    Silence is the time since a report has changed, on the supervisor's own monotonic clock. The
    times in the reports take no part: clocks of hosts differ, and may be put forward or back.

    Args:
        run_dir: where the workers report.
        workers: how many there are.
        limit_s: how long a worker may be silent between steps.
        starting_s: how long it may be silent before its first step.
        clock: returns monotonic seconds.
    """

    def __init__(
        self,
        run_dir: RunDir,
        workers: int,
        limit_s: float,
        starting_s: float,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._run_dir = run_dir
        self._workers = workers
        self._limit_s = limit_s
        self._starting_s = starting_s
        self._clock = clock
        self._looked_at: float | None = None  # by the clock; None: not yet
        self._last_reports: dict[int, Progress] = {}  # by rank, of those that could be read
        self._changed_at: dict[int, float] = {}  # when a rank's report was first seen, by the clock
        self._slowest_since: dict[int, float] = {}  # the slowest ranks; since when, by the clock

    def is_hanging(self, lost: Collection[int] = ()) -> bool:
        """Return True if a slowest rank has been silent longer than its limit.

        Faster ranks are ignored: they may be waiting for it, for a long time in asynchronous
        training. A rank's silence counts from the moment when it became one of the slowest. Between
        two looks at the progress files the answer is False.

        Args:
            lost: ranks that have ended badly while the job goes on without them.
        """
        now = self._clock()
        since_look_s = 0.0 if self._looked_at is None else now - self._looked_at
        if self._looked_at is not None and since_look_s < LOOK_S:
            return False
        self._looked_at = now
        if since_look_s > ABSENT_S:
            # The supervisor was away itself: every rank's limit starts anew.
            self._last_reports.clear()
            self._slowest_since.clear()
        reports = progress.read_all(self._run_dir, self._workers)
        self._note_changes(reports, now)
        slowest = self._slowest(reports, lost)
        # A rank's silence counts from when it became one of the slowest.
        before = self._slowest_since
        self._slowest_since = {worker.rank: before.get(worker.rank, now) for worker in slowest}
        for worker in slowest:
            silent_since = max(self._changed_at[worker.rank], self._slowest_since[worker.rank])
            if now - silent_since > self._limit_of(worker):
                return True
        return False

    def silent_s(self) -> dict[int, float]:
        """Return for how long each rank had been silent at the last look, in seconds."""
        looked_at = self._looked_at or 0.0
        return {rank: looked_at - changed_at for rank, changed_at in self._changed_at.items()}

    def _note_changes(self, reports: list[Progress], now: float) -> None:
        for report in reports:
            if self._last_reports.get(report.rank) != report:
                self._last_reports[report.rank] = report
                self._changed_at[report.rank] = now

    def _limit_of(self, worker: Progress) -> float:
        """Return how long a worker may be silent, in seconds."""
        if worker.step is None:
            return self._starting_s
        return self._limit_s

    def _slowest(self, reports: list[Progress], lost: Collection[int]) -> list[Progress]:
        """Return the workers that have done the fewest steps, of those that report steps."""
        workers = []
        for worker in reports:
            if worker.reports_steps and worker.rank not in lost:
                workers.append(worker)
        fewest = min((worker.num_steps for worker in workers), default=0)
        return [worker for worker in workers if worker.num_steps == fewest]


class Waiting(enum.IntEnum):
    """How surely a rank waits for others; the culprit does not wait."""

    CANNOT = 0  # it is stopped, or does not answer
    NO = 1  # it reported no wait
    REPORTED = 2  # it said so; it may already have left a collective that it reported
    SEEN = 3  # its main thread stands in a function that waits


@dataclass(frozen=True, order=True)
class _Place:
    """How far a rank is. The culprit has the smallest place."""

    num_steps: int
    num_collectives: int
    waiting: Waiting


class Hang(NamedTuple):
    """A job that makes no progress."""

    failure: Failure  # of the rank that holds up the others, with its stack
    is_ambiguous: bool  # others are no further than this rank: the cause may be any of them


def find_culprit(
    run_dir: RunDir,
    workers: int,
    lost: Collection[int],
    silent_s: Mapping[int, float],
    restarting: bool = False,
) -> Hang | None:
    """Return the rank that holds up the others.

    Args:
        run_dir: where the workers report.
        workers: how many there are.
        lost: ranks that have ended badly while the job goes on without them.
        silent_s: for how long each rank has been silent, in seconds (``HangWatch.silent_s``).
        restarting: the launcher starts workers again. Then the answer is None also while no worker
            runs on this host: it is between two attempts, and the reports of other hosts belong to
            the earlier one.

    Returns:
        None if every rank has ended by itself.
    """
    reports = progress.read_all(run_dir, workers)
    living = [worker for worker in reports if worker.rank not in lost and _is_alive(worker)]
    if not living:
        return None
    if restarting and _any_here(reports) and not _any_here(living):
        return None
    stacks = _ask_for_stacks(run_dir, living)
    places = {worker.rank: _place(worker, stacks) for worker in living}
    ordered = sorted(
        living, key=lambda worker: (places[worker.rank], -silent_s.get(worker.rank, 0.0))
    )
    culprit = ordered[0]
    others = ordered[1:]
    ahead = [worker for worker in others if places[worker.rank] > places[culprit.rank]]
    finished = [worker for worker in reports if worker.doing == progress.FINISHED]
    failure = Failure(
        rank=culprit.rank,
        host=culprit.host,
        step=culprit.step,
        time=time.time() - silent_s.get(culprit.rank, 0.0),
        kind=FailureKind.HANG,
        message=_message(culprit, silent_s.get(culprit.rank, 0.0), others, ahead, finished),
        traceback=stacks.get(culprit.rank, Stack("")).text,
        collective=culprit.collective,
        exit_code=HUNG_STATUS,
    )
    return Hang(failure, is_ambiguous=bool(others) and not ahead)


def _is_alive(worker: Progress) -> bool:
    """Return True if a worker has not ended, as far as this host can see."""
    if worker.ended:
        return False
    return not _is_here(worker) or state(worker.pid) not in _GONE


def _is_here(worker: Progress) -> bool:
    return worker.host == host_name()


def _any_here(workers: Iterable[Progress]) -> bool:
    return any(_is_here(worker) for worker in workers)


def _place(worker: Progress, stacks: dict[int, "Stack"]) -> _Place:
    return _Place(worker.num_steps, worker.num_collectives, _waiting(worker, stacks))


def _waiting(worker: Progress, stacks: dict[int, "Stack"]) -> Waiting:
    """Return how surely a worker waits. Workers of other hosts cannot be asked for stacks."""
    if _is_here(worker) and worker.rank not in stacks:
        return Waiting.CANNOT  # a process that runs answers even while it waits
    if worker.rank in stacks and stacks[worker.rank].waits_in_torch():
        return Waiting.SEEN
    if worker.waiting_for:
        return Waiting.REPORTED
    return Waiting.NO


def _message(
    culprit: Progress,
    silent_s: float,
    others: list[Progress],
    ahead: list[Progress],
    finished: list[Progress],
) -> str:
    """Describe the culprit's state, the ranks that wait for it, and those that had finished.

    Args:
        culprit: the rank that holds up the others.
        silent_s: for how long it has been silent, in seconds.
        others: all other ranks that live, the furthest behind first.
        ahead: the others that are further than the culprit, or wait while it does not.
        finished: ranks that have ended well.
    """
    parts = [f"no progress for {silent_s:.0f} s ({culprit.doing})"]
    if _is_here(culprit) and state(culprit.pid) in _STOPPED:
        parts.append("the process is stopped (SIGSTOP)")
    if ahead:
        if ahead[0].collective and ahead[0].num_collectives > culprit.num_collectives:
            missed = min(ahead, key=lambda worker: worker.num_collectives)
            wait = ranks_with_verb(_ranks(ahead), "waits", "wait")
            parts.append(f"it never entered {missed.collective}, where {wait}")
        else:
            parts.append(f"{listed_ranks(_ranks(ahead))} waited for it")
    elif others:
        are = ranks_with_verb(_ranks(others), "is", "are")
        parts.append(f"{are} no further: the cause may be any of them")
    if finished:
        parts.append(f"{listed_ranks(_ranks(finished))} had finished already")
    return "; ".join(parts)


def _ranks(workers: Iterable[Progress]) -> list[int]:
    return [worker.rank for worker in workers]


# Stacks


_FRAME = re.compile(r'  File "(?P<file>[^"\n]*)", line \d+ in (?P<function>.*)')
# The files that run a person's script: their frames explain nothing.
_PACKAGE = Path(progress.__file__).parents[1]
_RUNNER_FILES = (
    str(_PACKAGE.joinpath(*Program.SCRIPT.value.split(".")[1:]).with_suffix(".py")),
    runpy.run_path.__code__.co_filename,  # such as "<frozen runpy>"
)


class Stack:
    """The Python stack of a worker's main thread, most recent call first.

    Args:
        text: as ``faulthandler`` writes it for one thread.
    """

    def __init__(self, text: str):
        self._frames: list[tuple[str, str]] = []  # (file, function)
        shown = []
        for line in text.splitlines():
            frame = _FRAME.fullmatch(line)
            if frame:
                self._frames.append((frame["file"], frame["function"]))
                if frame["file"] in _RUNNER_FILES:
                    continue
            shown.append(line)
        self.text = "\n".join(shown)

    def waits_in_torch(self) -> bool:
        """Return True if the thread stands in a function of torch that waits for other ranks."""
        for file, function in self._frames:
            for torch_file, waiting_function in _TORCH_WAITS:
                if file.endswith(f"/{torch_file}") and waiting_function in (None, function):
                    return True
        return False


def _ask_for_stacks(run_dir: RunDir, workers: list[Progress]) -> dict[int, Stack]:
    """Return the stacks of those workers of this host that answer, by rank."""
    asked = {}  # rank to the length of its stacks file, which holds earlier answers
    for worker in workers:
        if not _is_here(worker) or not handles_signal(worker.pid, STACKS_SIGNAL):
            continue
        with contextlib.suppress(OSError):
            asked[worker.rank] = run_dir.stacks(worker.rank).stat().st_size
            os.kill(worker.pid, STACKS_SIGNAL)
    if asked:
        time.sleep(STACKS_S)
    stacks = {}
    for rank, earlier_bytes in asked.items():
        with contextlib.suppress(OSError):
            answer = run_dir.stacks(rank).read_bytes()[earlier_bytes:]
            threads = answer.decode(errors="replace").strip().split("\n\n")
            main_thread = threads[-1]  # faulthandler writes it last
            if main_thread:
                stacks[rank] = Stack(main_thread)
    return stacks
