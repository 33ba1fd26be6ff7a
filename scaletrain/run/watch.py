"""How each rank of a run is doing, by the files of its directory.

Only the ends of files are read, so looking takes as long in the last hour of a run as in the first,
and the run does not notice it. The directory may lie on a file system that several hosts share. The
run may be starting, training, over or killed.
"""

import statistics
import time
from dataclasses import dataclass

from scaletrain.run import progress
from scaletrain.run.failure import read_failure
from scaletrain.run.layout import RunDir
from scaletrain.run.progress import Progress
from scaletrain.run.records import StepRecord, last_records

_RECENT = 20  # steps that means are taken over
# From where on a rank counts as slow: its own work beside the median of all ranks.
_SLOW = 1.2


@dataclass(frozen=True, slots=True)
class RankStatus:
    """One rank at one moment. Times are means over its last steps, in seconds.

    None: not known, such as before the first step.
    """

    report: Progress  # its last sign of life
    silent_s: float  # since that, by this host's clock
    record_age_s: float | None  # since its last step ended
    loss: float | None
    samples_per_s: float | None
    step_s: float | None
    input_s: float | None  # waiting for the batch
    wait_s: float | None  # waiting for gradients or weights: of other ranks, or of a server
    update_s: float | None  # of the optimizer, or until a server's weights are there
    num_behind: int  # steps behind the rank that is furthest; 1 is usual
    holds_up: bool  # whether the others wait for it, as far as the files tell


def ranks(files: RunDir, now: float | None = None) -> list[RankStatus]:
    """Return how all ranks of a run are doing, in their order.

    Args:
        files: of the run.
        now: unix seconds; None: now.
    """
    now = time.time() if now is None else now
    reports = []
    for rank, _ in files.all_progress():
        report = progress.read(files, rank)
        if report is not None:  # else it is being written
            reports.append(report)
    recent = {report.rank: _recent(files, report.rank) for report in reports}
    furthest = max((report.num_steps for report in reports), default=0)
    slow = _slow_ranks(reports, recent)
    statuses = []
    for report in reports:
        records = recent[report.rank]
        newest = records[-1] if records else None
        statuses.append(
            RankStatus(
                report=report,
                silent_s=max(0.0, now - report.time),
                record_age_s=max(0.0, now - newest.time - newest.step_s) if newest else None,
                loss=newest.loss if newest else None,
                samples_per_s=_samples_per_s(records),
                step_s=_mean([record.step_s for record in records]),
                input_s=_mean([record.input_s for record in records]),
                wait_s=_mean([record.wait_s for record in records]),
                update_s=_mean([record.update_s for record in records]),
                num_behind=furthest - report.num_steps,
                holds_up=report.rank in slow,
            )
        )
    return statuses


def state(files: RunDir, statuses: list[RankStatus]) -> tuple[bool, str]:
    """Return whether a run is over, and its state in words.

    Args:
        files: of the run.
        statuses: of its ranks.
    """
    failure = read_failure(files.first_cause)
    if failure is not None:
        of_rank = "" if failure.rank is None else f"rank {failure.rank}: "
        return True, f"failed: {of_rank}{failure.message}"
    if not statuses:
        return False, "starting"
    failed = [status.report.rank for status in statuses if status.report.doing == progress.FAILED]
    if failed:
        return False, f"failing: rank {', '.join(map(str, failed))}"
    if all(status.report.ended for status in statuses):
        return True, "finished" if files.has_finished() else "ended"
    if all(status.report.doing == progress.SCRIPT for status in statuses):
        return False, progress.SCRIPT  # which promises no signs of life
    silent_s = min(status.silent_s for status in statuses)
    if silent_s > 60:
        return False, f"no rank has given a sign of life for {silent_s:.0f} s"
    if all(status.report.step is None for status in statuses):
        return False, "starting"
    return False, "running"


def _recent(files: RunDir, rank: int) -> list[StepRecord]:
    try:
        return last_records(files.records(rank))[-_RECENT:]
    except (OSError, ValueError):
        return []  # not there yet, or a person's own script, which has none


def _slow_ranks(reports: list[Progress], recent: dict[int, list[StepRecord]]) -> set[int]:
    """Return the ranks that the others wait for."""
    live = [report for report in reports if report.reports_steps]
    if len(live) < 2:
        return set()
    steps = [report.num_steps for report in live]
    # Where all train in step, ranks are at most a step apart.
    if max(steps) - min(steps) > 1:
        return {report.rank for report in live if report.num_steps == min(steps)}
    own_s = {}
    for report in live:
        mean = _mean([record.step_s - record.wait_s for record in recent[report.rank]])
        if mean is not None:
            own_s[report.rank] = mean
    if not own_s:
        return set()
    # The lower one: of two ranks, the slower one is not its own yardstick.
    usual_s = statistics.median_low(own_s.values())
    return {rank for rank, seconds in own_s.items() if seconds > _SLOW * usual_s}


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _samples_per_s(records: list[StepRecord]) -> float | None:
    seconds = sum(record.step_s for record in records)
    return sum(record.samples for record in records) / seconds if seconds else None
