"""Run trainings one after the other, each a command of its own with a directory of its own.

Trainings that have finished are left alone, so that a series that was stopped goes on where it was.
One that fails loses nothing but itself: its reason is kept in its directory.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from scaletrain.host.forkserver import Forked
from scaletrain.host.processes import telling_line
from scaletrain.run.atomic import write_json
from scaletrain.run.failure import Failure, FailureKind
from scaletrain.run.failure import read_failure as read_failure_file
from scaletrain.run.layout import RunDir
from scaletrain.scaling.measure import machine
from scaletrain.scaling.measure.starting import Starter

FAILED = "failed.json"  # in a run's directory: why the training failed
# Failures of workers that had lost another process.
CONSEQUENCES = (FailureKind.PEER, FailureKind.LAUNCHER)


@dataclasses.dataclass(frozen=True)
class Training:
    """One training of a series."""

    title: str  # for progress lines, such as "digits-native-w2-b96 repeat 1"
    run_dir: Path
    command: Sequence[str]
    launcher: str  # local, ...
    timeout_s: float
    environ: Mapping[str, str] | None = None  # None: this process's; others start cold


def missing(trainings: Sequence[Training]) -> list[Training]:
    """Return the trainings that have not finished. Failed ones are among them."""
    return [training for training in trainings if not RunDir(training.run_dir).has_finished()]


def starter(trainings: Sequence[Training], threads: int, *, cold: bool) -> Starter:
    """Return what starts a series: warm if that is possible and saves time.

    Args:
        trainings: the series.
        threads: of each worker.
        cold: whether each worker imports torch itself.
    """
    # Workers of other launchers are not forked by ours. A series with other environments starts
    # cold as a whole, so that its trainings can be compared.
    all_alike = all(training.environ is None for training in trainings)
    all_local = all(training.launcher == "local" for training in trainings)
    if cold or not all_local or not all_alike or len(trainings) < 2:
        return Starter()
    return Starter.warm(threads)


def run(
    trainings: Sequence[Training], starter: Starter, tell: Callable[[str], None], out: Path
) -> None:
    """Run a series in its order.

    Failures are kept (``read_failure``). Ctrl-C or a signal ends the training and the series.

    Args:
        trainings: the series.
        starter: starts them.
        tell: is called with one line about each training.
        out: the directory with which the same command goes on, for the line about a stop.
    """
    started = time.monotonic()
    for number, training in enumerate(trainings, 1):
        try:
            outcome = _run(training, starter)
        # Ctrl-C, too. The exception itself goes on.
        except BaseException:
            tell(
                f"stopped: {len(trainings) - number + 1} runs are missing;"
                f" the same command with --out {out} goes on"
            )
            raise
        left_s = (time.monotonic() - started) / number * (len(trainings) - number)
        left = f"{left_s / 60:.0f} min" if left_s > 90 else f"{left_s:.0f} s"
        tell(f"[{number}/{len(trainings)}] {training.title}: {outcome} (about {left} to go)")


def read_failure(directory: Path) -> str | None:
    """Return why a training failed; None if it did not, or has not run yet."""
    path = directory / FAILED
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))["reason"]


def diverged(directory: Path) -> str | None:
    """Return when and why a training diverged; None if it has not run, or ended in another way."""
    failure = _first_failure(directory)
    if failure is None or failure.kind is not FailureKind.DIVERGED:
        return None
    return _described(failure)


def _run(training: Training, starter: Starter) -> str:
    """Run one training and note how it ended. Return the same for people."""
    directory = training.run_dir
    if directory.exists():
        shutil.rmtree(directory)  # half a run, which this series made
    directory.parent.mkdir(parents=True, exist_ok=True)
    began, watch = time.monotonic(), machine.Watch()
    reason = _run_command(training, starter)
    if reason:
        # A training that failed at once has not made its directory.
        directory.mkdir(exist_ok=True)
        write_json(directory / FAILED, {"reason": reason})
        return f"FAILED: {reason}"
    duration_s = time.monotonic() - began
    # Other launchers' workers are no descendants: their work would count as that of others.
    if training.launcher in machine.CHILDREN:
        others = watch.others()
        if others is not None:
            machine.write(directory, others)
    return f"{duration_s:.1f} s"


def _run_command(training: Training, starter: Starter) -> str | None:
    """Run one training. Return why it failed; None if it did not."""
    directory = training.run_dir
    # Beside the run's directory, which the training makes itself.
    log = directory.with_name(f"{directory.name}.log")
    with open(log, "w", encoding="utf-8") as output:
        process = starter.start(training.command, output.fileno(), training.environ)
        try:
            status = process.wait(training.timeout_s)
        except subprocess.TimeoutExpired:
            _stop(process)
            return f"not done after the time limit of {training.timeout_s:g} s a cell"
        except BaseException:
            _stop(process)
            raise
    # Status 0 is not enough: the summary says whether all steps were done.
    if status == 0 and RunDir(directory).has_finished():
        return None
    return _reason(directory, log, status)


def _stop(process: subprocess.Popen[bytes] | Forked) -> None:
    """Ask the launcher to stop its workers, then end the whole session that it leads."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            # The launcher leads its session, so its id is the group's. It may just have ended.
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _reason(directory: Path, log: Path, status: int) -> str:
    """Return the first cause of a failed run.

    That is the earliest failure that is not the loss of a peer, else the command's output.
    """
    first = _first_failure(directory)
    if first is not None:
        return _described(first)
    text = log.read_text(encoding="utf-8", errors="replace")
    # Cut, since the reason becomes a cell of a table.
    return f"exit status {status}: {telling_line(text, 'it printed nothing')[:300]}"


def _first_failure(directory: Path) -> Failure | None:
    failures = [read_failure_file(path) for _, path in RunDir(directory).all_failures()]
    readable = [failure for failure in failures if failure is not None]
    if not readable:
        return None
    # False sorts first: causes before consequences, then by time.
    return min(readable, key=lambda failure: (failure.kind in CONSEQUENCES, failure.time))


def _described(failure: Failure) -> str:
    step = "" if failure.step is None else f" at step {failure.step}"
    return f"rank {failure.rank}{step}: {failure.message}"
