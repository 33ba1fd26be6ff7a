"""The first cause: which of many failures to blame, and how to put it into words.

One rank's mistake makes all other ranks fail, too. Their reports are noise, and a person should
read about the cause alone, once.
"""

import re
import signal
from collections.abc import Collection, Iterable

from scaletrain.host.processes import signal_name
from scaletrain.run import progress
from scaletrain.run.failure import Failure, FailureKind, read_failure
from scaletrain.run.layout import RunDir
from scaletrain.run.progress import Progress
from scaletrain.units import plural

# How strong a kind of failure is as an explanation, the strongest first. A rank that raised or was
# killed is a cause. A rank that lost its peer is a consequence, and so is a launcher that then
# ended.
_STRENGTH = {
    FailureKind.USER: 0,
    FailureKind.DIVERGED: 0,
    FailureKind.EXCEPTION: 0,
    FailureKind.SIGNAL: 0,
    FailureKind.EXIT: 0,
    FailureKind.CUT: 1,
    FailureKind.HANG: 2,
    FailureKind.PEER: 3,
    FailureKind.LAUNCHER: 4,
}


# Failures that are known


def reported(run_dir: RunDir, workers: int, launch: str | None) -> list[Failure]:
    """Return the failures that workers of a launch (None: of any) reported, by rank."""
    reports = []
    for rank in range(workers):
        failure = read_failure(run_dir.failure(rank))
        if failure is not None and failure.belongs_to(launch):
            reports.append(failure)
    return reports


# The words of launchers about a rank that a signal ended.
_ENDED_BY_SIGNAL = (
    # Open MPI
    re.compile(
        r"process rank (?P<rank>\d+) with PID \d+ on node (?P<host>\S+)"
        r" exited on\s+signal (?P<signal>\d+)"
    ),
    # srun, such as "srun: error: h2: task 2: Killed"
    re.compile(
        r"error: (?P<host>\S+): tasks? (?P<rank>\d+):"
        r" (?P<signal>Killed|Segmentation fault|Aborted|Bus error)"
    ),
    re.compile(r"error: (?P<host>\S+): tasks? (?P<rank>\d+): (?P<signal>Out Of Memory)"),
)
_OUT_OF_MEMORY = "Out Of Memory"
_SRUN_SIGNALS = {
    "Killed": signal.SIGKILL,
    "Segmentation fault": signal.SIGSEGV,
    "Aborted": signal.SIGABRT,
    "Bus error": signal.SIGBUS,
    _OUT_OF_MEMORY: signal.SIGKILL,
}


def reported_by_launcher(output: str, run_dir: RunDir, now: float) -> Failure | None:
    """Return the failure of the rank that, by a launcher's words, was ended by a signal.

    Args:
        output: the launcher's output.
        run_dir: where the rank reported how far it was.
        now: the time to note, in unix seconds: launchers write none.
    """
    for pattern in _ENDED_BY_SIGNAL:
        match = pattern.search(output)
        if match:
            return _ended_by_signal(match, run_dir, now)
    return None


def _ended_by_signal(match: re.Match[str], run_dir: RunDir, now: float) -> Failure:
    rank = int(match["rank"])
    name = match["signal"]
    # srun writes a signal in words, and Open MPI its number.
    number = int(_SRUN_SIGNALS.get(name) or name)
    message = f"was ended by {signal_name(number)}"
    if name == _OUT_OF_MEMORY:
        message += " (out of memory)"
    elif number == signal.SIGKILL:
        message += " (did memory run out? see dmesg there)"
    worker = progress.read(run_dir, rank) or Progress(rank, pid=0, host=match["host"])
    return Failure(
        rank=rank,
        host=match["host"],
        step=worker.step,
        time=now,
        kind=FailureKind.SIGNAL,
        message=message,
        collective=worker.collective,
        exit_code=128 + number,
    )


# The choice


def choose(failures: Iterable[Failure]) -> Failure:
    """Return the cause among failures: the earliest of the strongest kind.

    When the ranks of several hosts cannot reach rank 0, and no other rank has lost a peer, rank 0's
    own host is the one that is cut off the network.
    """
    known = list(failures)
    cause = min(known, key=lambda failure: (_STRENGTH[failure.kind], failure.time))
    if cause.kind is not FailureKind.CUT:
        return cause
    cut = [failure for failure in known if failure.kind is FailureKind.CUT]
    reach_rank_0 = [f for f in known if f.kind is FailureKind.PEER and f.rank != 0]
    hosts = {failure.host for failure in cut}
    # One host alone is itself cut off. If other ranks still reach rank 0, its host is not.
    if len(hosts) < 2 or reach_rank_0:
        return cause
    host_of_rank_0 = next((failure.host for failure in known if failure.rank == 0), "")
    ranks = [failure.rank for failure in cut if failure.rank is not None]
    do_not = ranks_with_verb(ranks, "does not", "do not")
    message = f"is cut off the network: {do_not} reach it any more"
    return cause._replace(rank=0, host=host_of_rank_0, message=message, traceback="")


# Words

_VERBS = {
    FailureKind.HANG: "hangs",
    FailureKind.USER: "stopped",
    FailureKind.DIVERGED: "stopped",
    FailureKind.PEER: "lost another rank",
}


def headline(failure: Failure) -> str:
    """Return one line that says which rank failed, where, when and how."""
    message = failure.message.partition("\n")[0]
    steps = ""
    if failure.step is not None:
        steps = f" after {plural(failure.step, 'step')}"
    subject = "a process"
    if failure.rank is not None:
        subject = f"rank {failure.rank}"
    if failure.host:
        subject += f" on {failure.host}"
    if failure.kind not in (FailureKind.SIGNAL, FailureKind.EXIT, FailureKind.LAUNCHER):
        verb = _VERBS.get(failure.kind, "failed")
        return f"scaletrain: {subject} {verb}{steps}: {message}"
    if failure.rank is None:  # the message begins with the process's name
        return f"scaletrain: {failure.message}{steps}"
    return f"scaletrain: {subject} {message}{steps}"


def text(failure: Failure, stopped: list[str]) -> str:
    """Return the text for a person: headline, last collective, traceback, stopped processes.

    Args:
        failure: the first cause.
        stopped: names of the processes that were stopped because of it.
    """
    lines = [headline(failure)]
    if failure.collective:
        lines.append(f"  last collective: {failure.collective}")
    for line in failure.traceback.splitlines():
        lines.append(f"  {line}")
    if stopped:
        lines.append(f"  stopped because of it: {', '.join(stopped)}")
    return "\n".join(lines)


def listed_ranks(ranks: Iterable[int]) -> str:
    """Return ranks as a person reads them.

    >>> listed_ranks([2, 0])
    'ranks 0, 2'
    """
    numbers = ", ".join(map(str, sorted(ranks)))
    return f"ranks {numbers}" if "," in numbers else f"rank {numbers}"


def ranks_with_verb(ranks: Collection[int], one: str, several: str) -> str:
    """Return ranks with the form of a verb that fits them.

    >>> ranks_with_verb([2, 0], "waits", "wait")
    'ranks 0, 2 wait'
    """
    verb = one if len(ranks) == 1 else several
    return f"{listed_ranks(ranks)} {verb}"
