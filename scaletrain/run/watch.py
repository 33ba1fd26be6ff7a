"""How each rank of a run is doing, by the files of its directory.

Only the ends of files are read, so looking takes as long in the last hour of a run as in the first,
and the run does not notice it. The directory may lie on a file system that several hosts share. The
run may be starting, training, over or killed.
"""

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass

from scaletrain.run import blame, culprit, progress
from scaletrain.run.culprit import Culprit, Kind
from scaletrain.run.failure import Failure, FailureKind, read_failure
from scaletrain.run.layout import RunDir
from scaletrain.run.links import LinkSample, last_links
from scaletrain.run.progress import Progress
from scaletrain.run.records import WARMUP_STEPS, StepRecord, last_records
from scaletrain.run.slow_links import ServerLinks
from scaletrain.run.slow_ranks import RankSteps

_RECENT = 20  # steps that means are taken over
# A rank counts as stopped after so long without a sign of life, and so many times its usual step.
_SILENT_S = 2.0
_SILENT_STEPS = 20
_GONE = ("", "Z", "X")  # states of a process that has ended
_STOPPED = ("T", "t")
_LEAST_SHARE = 0.01  # of the time of a run, that is told at its end
# What is read of a run's records at its end, of all ranks together: half a second of work.
_MOST_BYTES = 16 << 20
_FEWEST_BYTES = 64 << 10  # of each rank
# Failures of a rank itself, and what they make it.
_FAILED = {
    FailureKind.EXCEPTION: Kind.DEAD,
    FailureKind.SIGNAL: Kind.DEAD,
    FailureKind.EXIT: Kind.DEAD,
    FailureKind.HANG: Kind.STOPPED,
}


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
    end: str  # how it ended, in words; empty: it has not, as far as the files tell


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
    slow = _slow_ranks(files, reports, recent)
    cause = read_failure(files.first_cause)
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
                end=_end(files, report, cause),
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
    # A rank that lost another one is no cause, unless nobody else has said more yet.
    failed = [rank for rank in failed if not _lost_peer(files, rank)] or failed
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


def _end(files: RunDir, report: Progress, cause: Failure | None) -> str:
    """Return how a rank ended, in words; empty if it has not."""
    if report.doing == progress.FINISHED:
        return progress.FINISHED
    lost_peer = report.doing == progress.FAILED and _lost_peer(files, report.rank)
    if cause is None:
        if lost_peer:
            return "lost another rank"
        return progress.FAILED if report.ended else ""
    if cause.rank == report.rank:
        if cause.kind is FailureKind.HANG:
            return "hung"
        # "was ended by SIGKILL", without the guesses behind it.
        is_about_its_end = cause.kind in (FailureKind.SIGNAL, FailureKind.EXIT)
        return cause.message.partition(" (")[0] if is_about_its_end else progress.FAILED
    # The supervisor ends the ranks that still run.
    if not report.ended or lost_peer or report.status == 128 + signal.SIGTERM:
        who = "another process" if cause.rank is None else f"rank {cause.rank}"
        return f"ended because of {who}"
    return progress.FAILED


def _lost_peer(files: RunDir, rank: int) -> bool:
    """Return True if a rank that failed says that it lost another one: a consequence."""
    failure = read_failure(files.failure(rank))
    return failure is not None and failure.kind is FailureKind.PEER


def _recent(files: RunDir, rank: int) -> list[StepRecord]:
    try:
        return last_records(files.records(rank))[-_RECENT:]
    except (OSError, ValueError):
        return []  # not there yet, or a person's own script, which has none


def _slow_ranks(
    files: RunDir, reports: list[Progress], recent: dict[int, list[StepRecord]]
) -> set[int]:
    """Return the ranks that the others wait for."""
    live = [report for report in reports if report.reports_steps]
    if len(live) < 2:
        return set()
    steps = [report.num_steps for report in live]
    # Where all train in step, ranks are at most a step apart.
    if max(steps) - min(steps) > 1:
        return {report.rank for report in live if report.num_steps == min(steps)}
    ranks = [_steps_of(files, report.rank, report.host, recent[report.rank]) for report in live]
    slow: set[int] = set()
    for each in blame.find(ranks):
        slow.update(each.ranks)
    return slow


def culprits(files: RunDir, statuses: Sequence[RankStatus]) -> list[Culprit]:
    """Return who holds up the others at this moment, by the last steps; the worst first.

    Args:
        files: of the run.
        statuses: of its ranks, as ``ranks`` has just returned them.
    """
    failure = read_failure(files.first_cause)
    if failure is not None:
        kind = _FAILED.get(failure.kind)
        if kind is None or failure.rank is None:
            return []
        message = failure.message.partition("\n")[0]
        last_words = _last_words(files, failure.rank) if kind is Kind.DEAD else ""
        return [culprit.halted(kind, failure.rank, failure.host, message, last_words)]
    stopped = _stopped(files, statuses)
    if stopped:
        return stopped
    ranks = []
    for status in statuses:
        report = status.report
        if report.reports_steps:
            records = _recent(files, report.rank)
            records = [record for record in records if record.step >= WARMUP_STEPS]
            links = last_links(files.links(report.rank))
            ranks.append(_steps_of(files, report.rank, report.host, records, links))
    servers = _servers(files)
    # What has begun a moment ago shows in fewer steps first.
    return blame.find(ranks, servers) or blame.find([each.newest(10) for each in ranks], servers)


def culprits_of_run(files: RunDir) -> list[Culprit]:
    """Return who held up the others in a run that is over, by its steps; the worst first.

    Of a very long run, these are the newest steps.
    """
    paths = files.all_records()
    num_bytes = max(_FEWEST_BYTES, _MOST_BYTES // max(1, len(paths)))
    ranks = []
    for path in paths:
        with contextlib.suppress(OSError, ValueError):
            records = last_records(path, num_bytes)
            ranks.append([record for record in records if record.step >= WARMUP_STEPS])
    return culprits_of(files, [records for records in ranks if records])


def culprits_of(files: RunDir, ranks: Sequence[Sequence[StepRecord]]) -> list[Culprit]:
    """Return who held up the others in these steps of a run; the worst first.

    What cost less than a hundredth of all their time is left out: it is no matter of the run.

    Args:
        files: of the run.
        ranks: records of each rank, without warm-up; at least one each.
    """
    steps = []
    num_bytes = _MOST_BYTES // max(len(ranks), 1)
    for records in ranks:
        rank = records[0].rank
        links = last_links(files.links(rank), num_bytes)
        steps.append(_steps_of(files, rank, host_of(files, rank), records, links))
    total_s = max((sum(record.step_s for record in records) for records in ranks), default=0.0)
    found = blame.find(steps, _servers(files, num_bytes))
    return [culprit for culprit in found if culprit.total_s >= _LEAST_SHARE * total_s]


def _servers(files: RunDir, num_bytes: int = 32_768) -> list[ServerLinks]:
    """Return what the parameter servers of a run wrote about their connections."""
    servers = []
    for index, path in files.all_server_links():
        servers.append(ServerLinks(index, last_links(path, num_bytes)))
    return servers


def host_of(files: RunDir, rank: int) -> str:
    """Return the name of the host that a rank ran on; empty if it is not known."""
    report = progress.read(files, rank)
    return report.host if report else ""


def _steps_of(
    files: RunDir,
    rank: int,
    host: str,
    records: Sequence[StepRecord],
    links: Sequence[LinkSample] = (),
) -> RankSteps:
    """Return the steps of a rank for the search for a culprit."""
    # On a GPU, a gradient's hook runs long before the gradient is there.
    on_cpu = True
    measures = any("wait_in_backward_s" in record.exchange for record in records)
    if not measures:
        try:
            header = json.loads(files.header(rank).read_text(encoding="utf-8"))
            on_cpu = header.get("device", "cpu") == "cpu"
        except (OSError, ValueError):
            pass
    return RankSteps(rank, host, records, links, knows_backward=measures or on_cpu)


def _stopped(files: RunDir, statuses: Sequence[RankStatus]) -> list[Culprit]:
    """Return the ranks that are dead, or else the one that others have waited for too long."""
    live = [status for status in statuses if status.report.reports_steps]
    live = [status for status in live if status.report.step is not None]
    dead = []
    halted = []
    for status in live:
        process = status.report.process_state
        if process is not None and process in _GONE:
            found = _ended(Kind.DEAD, status, "it is gone")
            last_words = _last_words(files, status.report.rank)
            dead.append(dataclasses.replace(found, last_words=last_words))
        if process in _STOPPED:
            halted.append(_ended(Kind.STOPPED, status, "the process is stopped (SIGSTOP)"))
    if dead or halted:
        return dead or halted
    if len(live) < 2:
        return []
    usual_s = min((status.step_s for status in live if status.step_s), default=0.0)
    limit_s = max(_SILENT_S, _SILENT_STEPS * usual_s)

    def place(status: RankStatus) -> tuple[int, int, bool]:
        report = status.report
        return report.num_steps, report.num_collectives, bool(report.waiting_for)

    behind, *others = sorted(live, key=place)
    silent = min(status.silent_s for status in live) > limit_s / 2 and behind.silent_s > limit_s
    if silent and place(behind) < place(others[0]):
        # From another machine a process that is dead looks like one that is stopped.
        is_there = behind.report.process_state is not None
        kind = Kind.STOPPED if is_there else Kind.SILENT
        return [_ended(kind, behind, f"no sign of life for {behind.silent_s:.0f} s")]
    return []


def _ended(kind: Kind, status: RankStatus, detail: str) -> Culprit:
    return culprit.halted(kind, status.report.rank, status.report.host, detail)


def _last_words(files: RunDir, rank: int) -> str:
    """Return where a rank's last words are; empty if it left none, as after SIGKILL."""
    failure = read_failure(files.failure(rank))
    if failure is not None and failure.traceback:
        return f"its traceback is in {files.failure(rank).name}"
    log = files.rank_log(rank)
    if log.exists() and log.stat().st_size:
        return f"its last output is in {log.relative_to(files.path)}"
    return ""


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _samples_per_s(records: list[StepRecord]) -> float | None:
    seconds = sum(record.step_s for record in records)
    return sum(record.samples for record in records) / seconds if seconds else None
