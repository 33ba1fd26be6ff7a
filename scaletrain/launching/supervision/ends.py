"""Ends that were reported, while the process runs on.

A worker reports how its script ended before Python waits for threads, child processes and exit
handlers. Any of them may keep the process for ever. The report counts: ``LateEnds`` ends the
process, which then has the status that it reported.
"""

import signal
import time

from scaletrain.host.stopwatch import ABSENT_S
from scaletrain.launching.job import Job
from scaletrain.launching.supervision.processes import Process, Processes
from scaletrain.run import progress
from scaletrain.run.layout import RunDir
from scaletrain.run.progress import Progress
from scaletrain.timeouts import FAILED_S, LOOK_S, Timeouts


class LateEnds:
    """Ends processes that run on after their worker has ended. Only the supervisor uses it.

    A failed worker gets ``FAILED_S``. A finished one may still serve the others, or bring results
    to safety: it gets ``Timeouts.leftovers_s``, once every worker has ended.

    Args:
        job: the workers, and the limit for those that have finished.
        processes: all processes that were started for it.
    """

    def __init__(self, job: Job, processes: Processes):
        self._workers = job.workers
        self._finished_s = Timeouts(job.timeout_s).leftovers_s
        self._run_dir = RunDir(job.run_dir)
        self._processes = processes
        self._looked_at = 0.0  # monotonic
        # Since when a process has been late, monotonic, by process id.
        self._late_since: dict[int, float] = {}
        # When a process that got SIGTERM from us gets SIGKILL, monotonic, by process id.
        self._kill_at: dict[int, float] = {}

    def look(self) -> None:
        """End the processes that have been late for too long."""
        now = time.monotonic()
        if now - self._looked_at < LOOK_S:
            return
        if now - self._looked_at > ABSENT_S:
            self._late_since.clear()  # the whole job was stopped: all limits start anew
        self._looked_at = now
        reports = {
            report.rank: report for report in progress.read_all(self._run_dir, self._workers)
        }
        all_have_ended = self._all_have_ended(reports)
        for process in self._processes.workers:
            if not process.is_running:
                continue
            pid = process.popen.pid
            if pid in self._kill_at:
                if now >= self._kill_at[pid]:
                    process.signal(signal.SIGKILL)
                continue
            if process.is_launcher:
                self._look_at_launcher(process, reports, now)
            elif process.rank in reports:
                self._look_at_worker(process, reports[process.rank], all_have_ended, now)

    def _all_have_ended(self, reports: dict[int, Progress]) -> bool:
        """Return True if no worker that we started works any more."""
        for process in self._processes.workers:
            report = reports.get(process.rank) if process.rank is not None else None
            if process.is_running and not (report and report.ended):
                return False
        return True

    def _look_at_worker(
        self, process: Process, report: Progress, all_have_ended: bool, now: float
    ) -> None:
        has_failed = report.doing == progress.FAILED
        if report.status is None or not (has_failed or all_have_ended):
            self._late_since.pop(process.popen.pid, None)
            return
        limit_s = FAILED_S if has_failed else self._finished_s
        how = "has failed" if has_failed else "has finished"
        keeper = report.kept_by or "an exit handler, perhaps"
        self._end_if_late(
            process, report.status, limit_s, f"{process.name} {how} but runs on ({keeper})", now
        )

    def _look_at_launcher(
        self, launcher: Process, reports: dict[int, Progress], now: float
    ) -> None:
        """End a launcher that runs on after all its workers.

        It is left alone if it starts workers again. It ends by itself if one of them has failed.
        """
        finished = [r for r in reports.values() if r.doing == progress.FINISHED]
        if launcher.restarts_workers or len(finished) < self._workers:
            self._late_since.pop(launcher.popen.pid, None)
            return
        line = f"{launcher.name} runs on after all its workers have finished"
        self._end_if_late(launcher, 0, self._finished_s, line, now)

    def _end_if_late(
        self, process: Process, status: int, limit_s: float, line: str, now: float
    ) -> None:
        pid = process.popen.pid
        if now - self._late_since.setdefault(pid, now) < limit_s:
            return
        self._processes.say(f"scaletrain: {line}: it is ended after {limit_s:g} s")
        process.reported_status = status
        process.signal(signal.SIGTERM)
        self._kill_at[pid] = now + process.stop_s
