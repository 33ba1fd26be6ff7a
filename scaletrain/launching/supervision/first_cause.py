"""Which of many failures is the cause: one rank's mistake makes all the others fail too, and those reports are noise."""

import contextlib
import json
import os
import re
import signal
import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from scaletrain.host.processes import handles_signal, state
from scaletrain.run.failure import Failure
from scaletrain.run.progress import (
    SCRIPT,
    STACKS_SIGNAL,
    failure_path,
    host_name,
    progress_path,
    stacks_path,
)

# A rank that raised or was killed is a cause; one that lost its peer is a consequence; that its launcher then ended, too.
_ORDER = {
    "user": 0,
    "exception": 0,
    "signal": 0,
    "exit": 0,
    "cut": 1,
    "hang": 2,
    "peer": 3,
    "launcher": 4,
}
_STACKS_S = 1.0  # how long a worker may take to write its stacks
# Functions in whose frames a main thread waits for other ranks: such a rank is a victim of a hang, not its cause.
_WAITING = re.compile(
    r'/(distributed_c10d|rendezvous|autograd/graph|process_group|execute|futures/__init__)\.py"|/(engine|parameter_server)/'
)

_RUNNERS = re.compile(
    r'\n  File "(<frozen runpy>|[^"\n]*/programs/script\.py)".*'
)  # frames around a person's script


class Known(NamedTuple):
    """What a rank last wrote of itself (``progress``)."""

    rank: int
    pid: int
    host: str
    time: float
    step: int | None
    doing: str
    collective: str
    num_collectives: int

    @property
    def watched(self) -> bool:
        """Whether this rank promises signs of life; a person's own script does not."""
        return not self.ended and self.doing != SCRIPT

    @property
    def num_steps(self) -> int:
        """Steps done; -1 before it said that it begins."""
        return -1 if self.step is None else self.step

    @property
    def ended(self) -> bool:
        return self.doing in ("finished", "failed")


class Progress:
    """Reads the workers' progress files."""

    def __init__(self, run_dir: Path, workers: int):
        self.run_dir, self.workers = run_dir, workers
        self._looked = 0.0
        self._behind: dict[int, float] = {}  # ranks that are least far, and since when

    def read(self, rank: int) -> Known | None:
        """A rank's progress; ``None`` when it wrote none, or was writing just now."""
        try:
            value = json.loads(progress_path(self.run_dir, rank).read_text(encoding="utf-8"))
            return Known(rank=rank, **value)
        except (OSError, ValueError, TypeError):
            return None

    def all(self) -> list[Known]:
        return [known for rank in range(self.workers) if (known := self.read(rank))]

    def stale(self, limit_s: float, starting_s: float, lost: Collection[int] = ()) -> bool:
        """Whether nobody waits for a rank that is alive: of those that report steps, one that is least far has given no sign of life
        for too long since then. (Who is further may wait for one that is slow, in asynchronous training for long.) Looks at most twice a second.
        """
        if time.monotonic() - self._looked < 0.5:
            return False
        self._looked = time.monotonic()
        now = time.time()
        watched = [known for known in self.all() if known.watched and known.rank not in lost]
        least = min((known.num_steps for known in watched), default=0)
        behind = [known for known in watched if known.num_steps == least]
        self._behind = {known.rank: self._behind.get(known.rank, now) for known in behind}
        return any(
            now - max(known.time, self._behind[known.rank])
            > (starting_s if known.step is None else limit_s)
            for known in behind
        )


def reported(run_dir: Path, workers: int, since: float) -> list[Failure]:
    """The failures that workers recorded after ``since`` (unix seconds)."""
    found = []
    for rank in range(workers):
        with contextlib.suppress(OSError, ValueError, TypeError):
            failure = Failure.from_json(
                json.loads(failure_path(run_dir, rank).read_text(encoding="utf-8"))
            )
            if failure.time >= since:
                found.append(failure)
    return found


# What launchers say of a rank that a signal ended: Open MPI, srun ("srun: error: h2: task 2: Killed").
_ENDED_BY_SIGNAL = (
    re.compile(
        r"process rank (?P<rank>\d+) with PID \d+ on node (?P<host>\S+) exited on\s+signal (?P<signal>\d+)"
    ),
    re.compile(
        r"error: (?P<host>\S+): tasks? (?P<rank>\d+): (?P<signal>Killed|Segmentation fault|Aborted|Bus error)"
    ),
    re.compile(r"error: (?P<host>\S+): tasks? (?P<rank>\d+): (?P<signal>Out Of Memory)"),
)
_SIGNALS = {"Killed": 9, "Segmentation fault": 11, "Aborted": 6, "Bus error": 7, "Out Of Memory": 9}


def told(output: str, progress: Progress, now: float) -> Failure | None:
    """The rank that a launcher says was ended by a signal; ``output`` is what it wrote."""
    for pattern in _ENDED_BY_SIGNAL:
        match = pattern.search(output)
        if match:
            rank, given = int(match["rank"]), match["signal"]
            number = _SIGNALS.get(given) or int(given)
            known = progress.read(rank)
            why = (
                " (out of memory)"
                if given == "Out Of Memory"
                else " (did memory run out? see dmesg there)"
            )
            message = f"was ended by {signal_name(number)}" + (
                why if number == signal.SIGKILL else ""
            )
            return Failure(
                rank, match["host"], known.step if known else None, now, "signal", message,
                collective=known.collective if known else "", exit_code=128 + number,
            )  # fmt: skip
    return None


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def oom_kills() -> int | None:
    """How many processes the kernel of this host has killed for lack of memory since it started; ``None``: it does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def choose(failures: Iterable[Failure]) -> Failure:
    """The cause among failures: the earliest of the strongest kind (a rank's own, then a cut network, a hang, a lost peer,
    a launcher's end). When every rank that could tell is cut off from rank 0, then rank 0's host is the one that is cut off."""
    failures = list(failures)
    cause = min(failures, key=lambda failure: (_ORDER[failure.kind], failure.time))
    cut = [failure for failure in failures if failure.kind == "cut"]
    others = [failure for failure in failures if failure.kind == "peer" and failure.rank != 0]
    if cause.kind == "cut" and len({failure.host for failure in cut}) > 1 and not others:
        host = next((failure.host for failure in failures if failure.rank == 0), "")
        ranks = _ranks(failure.rank for failure in cut if failure.rank is not None)
        return cause._replace(
            rank=0,
            host=host,
            message=f"is cut off the network: {ranks} do not reach it any more",
            traceback="",
        )
    return cause


def hang(
    progress: Progress, lost: set[int], status: int, restarting: bool = False
) -> Failure | None:
    """The rank that holds up the others, with its stack: the one that is least far, and not itself waiting for others.

    Returns ``None`` when every rank has ended by itself; with ``restarting`` (a launcher that starts workers again), also
    while none runs on this host: it is between two attempts, and what is known of other hosts belongs to the earlier one.
    """
    living = [known for known in progress.all() if not known.ended and known.rank not in lost]
    living = [
        known
        for known in living
        if known.host != host_name() or state(known.pid) not in ("", "Z", "X")
    ]
    here = any(known.host == host_name() for known in living)
    if not living or (
        restarting and not here and any(known.host == host_name() for known in progress.all())
    ):
        return None
    stacks = _stacks(progress.run_dir, living)

    def suspicion(known: Known) -> tuple[int, int, bool, float]:
        waits = bool(_WAITING.search(stacks.get(known.rank, "")))
        return (known.num_steps, known.num_collectives, waits, known.time)

    ordered = sorted(living, key=suspicion)
    culprit = ordered[0]
    quiet_s = time.time() - culprit.time
    message = f"no progress for {quiet_s:.0f} s ({culprit.doing})"
    process_state = state(culprit.pid) if culprit.host == host_name() else ""
    if process_state in ("T", "t"):
        message += "; the process is stopped (SIGSTOP)"
    ahead = [known for known in ordered[1:] if suspicion(known)[:3] > suspicion(culprit)[:3]]
    if ahead and ahead[0].collective and ahead[0].num_collectives > culprit.num_collectives:
        first = min(ahead, key=lambda known: known.num_collectives)
        message += f"; it never entered {first.collective}, where {_ranks(known.rank for known in ahead)} waits"
    elif ahead:
        message += f"; {_ranks(known.rank for known in ahead)} waited for it"
    elif len(living) > 1:
        message += f"; {_ranks(known.rank for known in ordered[1:])} no further: which one is the cause cannot be told"
    gone = [known.rank for known in progress.all() if known.doing == "finished"]
    if gone:
        message += f"; {_ranks(gone)} had finished already"
    return Failure(
        culprit.rank, culprit.host, culprit.step, culprit.time, "hang", message,
        stacks.get(culprit.rank, ""), culprit.collective, status,
    )  # fmt: skip


def _stacks(run_dir: Path, living: list[Known]) -> dict[int, str]:
    """Ask the workers of this host for their Python stacks; the main thread's, most recent call first."""
    asked = []
    for known in living:
        if known.host == host_name() and handles_signal(known.pid, STACKS_SIGNAL):
            with contextlib.suppress(OSError):
                os.kill(known.pid, STACKS_SIGNAL)
                asked.append(known)
    if asked:
        time.sleep(_STACKS_S)
    found = {}
    for known in asked:
        with contextlib.suppress(OSError):
            text = stacks_path(run_dir, known.rank).read_text(encoding="utf-8", errors="replace")
            main = re.split(r"\n\n", text.strip())[-1]
            found[known.rank] = re.sub(_RUNNERS, "", main)
    return {rank: text for rank, text in found.items() if text}


def headline(failure: Failure) -> str:
    """One line: who, where, when, what."""
    who = "a process" if failure.rank is None else f"rank {failure.rank}"
    where = f" on {failure.host}" if failure.host else ""
    step = "" if failure.step is None else f" after {failure.step} steps"
    message = failure.message.splitlines()[0] if failure.message else ""
    if failure.kind in ("signal", "exit", "launcher"):
        return f"scaletrain: {failure.message if failure.rank is None else f'{who}{where} {message}'}{step}"
    verb = {"hang": "hangs", "user": "stopped", "peer": "lost another rank", "cut": "failed"}.get(
        failure.kind, "failed"
    )
    return f"scaletrain: {who}{where} {verb}{step}: {message}"


def text(failure: Failure, stopped: list[str]) -> str:
    """What a person sees, once: the headline, the last collective, the traceback, who was stopped because of it."""
    lines = [headline(failure)]
    if failure.collective:
        lines.append(f"  last collective: {failure.collective}")
    lines += [f"  {line}" for line in failure.traceback.splitlines()]
    if stopped:
        lines.append(f"  stopped because of it: {', '.join(stopped)}")
    return "\n".join(lines)


def _ranks(ranks: Iterable[int]) -> str:
    listed = sorted(ranks)
    return f"rank{'s' * (len(listed) > 1)} {', '.join(map(str, listed))}"
