"""Evidence of failures: reports of workers, ends of processes, and output of launchers."""

import signal
import time

from scaletrain.host.names import host_name
from scaletrain.host.processes import oom_kills, signal_name
from scaletrain.launching.job import Job
from scaletrain.launching.supervision import first_cause
from scaletrain.launching.supervision.processes import Process, Processes
from scaletrain.run import progress
from scaletrain.run.failure import Failure, FailureKind, read_failure
from scaletrain.run.layout import RunDir
from scaletrain.run.progress import Progress

_CLOCKS_S = 5.0  # a report is seen within this time, if the clocks of both hosts agree
_NOTICED_S = 0.1  # the end of another launcher's worker is noticed this late, at most


class Evidence:
    """Collects the failures of a launch. Only the supervisor's thread uses it.

    Args:
        job: the job that is launched.
        processes: all processes that were started for it.
        launch: the id of this launch (LAUNCH_MARK), which tells its reports from those of an
            earlier one; None: other hosts take part, whose ids are not known.
    """

    def __init__(self, job: Job, processes: Processes, launch: str | None):
        self._workers = job.workers
        self._run_dir = RunDir(job.run_dir)
        self._processes = processes
        self._launch = launch
        self._oom_kills = oom_kills()  # of this host, before the launch
        # Workers that another launcher started on this host: their process ids are watched, since
        # that launcher does not say in which order they ended.
        self._watched_pids: set[int] = set()
        # When a report came, in unix seconds by our clock, by its rank and its own time.
        self._came_at: dict[tuple[int | None, float], float] = {}
        self._looked_at = time.monotonic()  # for reports
        # Those of them that ended without a report, by (rank, pid).
        self._silent_ends: dict[tuple[int, int], Failure] = {}

    def reports(self) -> list[Failure]:
        """Return the failures that workers have reported.

        A report whose host's clock is far from ours has the time when it came. Otherwise the
        failures of that host would all lie before those of other hosts, or after.
        """
        now = time.monotonic()
        since_look_s, self._looked_at = now - self._looked_at, now
        reports = []
        for report in first_cause.reported(self._run_dir, self._workers, self._launch):
            # What came while nobody looked may be as old as it says.
            time_seen = time.time() if since_look_s <= _CLOCKS_S else report.time
            came_at = self._came_at.setdefault((report.rank, report.time), time_seen)
            if abs(came_at - report.time) > _CLOCKS_S:
                report = report._replace(time=came_at)
            reports.append(report)
        return reports

    def all(self) -> list[Failure]:
        """Return every failure that is known."""
        failures = []
        for process in self._processes.workers:
            if process.ended_at is not None and process.status:
                failures.append(self.of_process(process))
        for process in self._processes.companions:
            # A companion has to outlive the workers, so that even status 0 comes too early.
            if process.ended_at is not None:
                failures.append(self.of_process(process))
        failures += self.reports()
        by_launcher = self._reported_by_launcher()
        if by_launcher:
            failures.append(by_launcher)
        # Workers that ended after the first report were ended by their launcher.
        first = min((failure.time for failure in failures), default=time.time())
        for failure in self.silent_ends():
            if failure.time <= first + _NOTICED_S:
                failures.append(failure)
        return failures

    def of_process(self, process: Process) -> Failure:
        """Return the failure of a process that has ended: its own report, else its exit status."""
        rank = process.rank
        status = process.status or 0
        ended_at = process.ended_at or time.time()
        if rank is not None:
            report = read_failure(self._run_dir.failure(rank))
            if report is not None and report.belongs_to(self._launch):
                return report
        # The process has told the person itself what to change. Its exit status would say less.
        if process.mistake and status == 2:
            return Failure(
                rank, process.host, None, ended_at, FailureKind.USER, process.mistake, exit_code=2
            )
        failure = Failure(
            rank=rank,
            host=process.host,
            step=None,
            time=ended_at,
            kind=_kind_of_end(process, status),
            message=self.how_it_ended(status),
            exit_code=_exit_code(status),
        )
        if rank is None:
            return failure._replace(message=f"{process.name} {failure.message}")
        worker = progress.read(self._run_dir, rank)
        if worker is None:
            return failure
        return failure._replace(host=worker.host, step=worker.step, collective=worker.collective)

    def how_it_ended(self, status: int) -> str:
        """Return words for an exit status, such as "ended with status 1"."""
        if status >= 0:
            return f"ended with status {status}"
        ended = f"was ended by {signal_name(-status)}"
        if -status == signal.SIGKILL:
            ended += f" ({self._explain_sigkill()})"
        return ended

    def _explain_sigkill(self) -> str:
        """Say if a lack of memory on this host explains a SIGKILL."""
        kills = oom_kills()
        if kills is None or self._oom_kills is None:
            return "did memory run out? see dmesg"
        if kills > self._oom_kills:
            return "the kernel ran out of memory"
        return "by another process; memory did not run out"

    def _reported_by_launcher(self) -> Failure | None:
        output = self._processes.launcher_output
        return first_cause.reported_by_launcher(output, self._run_dir, time.time())

    # Workers that another launcher started

    def watch_workers(self) -> None:
        """Watch those workers of this host that report their process ids, and are not watched."""
        for worker in progress.read_all(self._run_dir, self._workers):
            if worker.ended or worker.host != host_name() or worker.pid in self._watched_pids:
                continue

            # The default holds this turn's worker: the loop has moved on by the time of the call.
            def on_end(worker: Progress = worker) -> None:
                self._worker_ended(worker)

            if self._processes.watch_pid(worker.pid, on_end):
                self._watched_pids.add(worker.pid)

    def _worker_ended(self, watched: Progress) -> None:
        """Note the end of a worker that did not report it."""
        latest = progress.read(self._run_dir, watched.rank) or watched
        # Another attempt has taken the rank over, or the worker has reported its end by now.
        if latest.pid != watched.pid or latest.ended:
            return
        self._silent_ends[watched.rank, watched.pid] = Failure(
            rank=watched.rank,
            host=watched.host,
            step=latest.step,
            time=time.time(),
            kind=FailureKind.SIGNAL,
            message=f"was killed (it ended without a report; {self._explain_sigkill()})",
            collective=latest.collective,
            # Only the launcher knows the true status. A worker that can still act leaves a report.
            exit_code=128 + signal.SIGKILL,
        )

    def silent_ends(self) -> list[Failure]:
        """Return the failures of workers that ended without a report.

        A worker is left out if a later attempt has replaced it, or if the launcher reported it.
        """
        workers = progress.read_all(self._run_dir, self._workers)
        pids = {worker.rank: worker.pid for worker in workers}
        by_launcher = self._reported_by_launcher()
        failures = []
        for (rank, pid), failure in self._silent_ends.items():
            replaced = pids.get(rank) != pid
            if replaced or (by_launcher and by_launcher.rank == rank):
                continue
            failures.append(failure)
        return failures

    def any_silent_end(self) -> bool:
        """Return True if a worker of another launcher has ended without a report."""
        return bool(self._silent_ends)


def _kind_of_end(process: Process, status: int) -> FailureKind:
    if process.is_launcher:
        return FailureKind.LAUNCHER
    if status < 0:
        return FailureKind.SIGNAL
    return FailureKind.EXIT


def _exit_code(status: int) -> int:
    """Return the exit status that a process's end gives the whole job, as a shell has it."""
    if status < 0:
        return 128 - status
    return status or 1  # a companion that ends well has ended too early all the same
