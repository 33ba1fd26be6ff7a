"""The supervisor: a process of its own that starts a plan's commands and ends them all.

Its life has five steps (``Supervisor.run``):

1. Remove the reports of an earlier job in the run directory.
2. Start the companions, then the workers or the launchers that start them.
3. Watch them: show their output, look for failures and hangs, answer signals.
4. After a failure, wait a moment for the reports of other workers, and choose the first cause.
5. End everything, and show the first cause and the way to go on.

It has one thread. Signal handlers only append to ``Supervisor.signals``.
"""

import os
import signal
import socket
import time

from scaletrain.host.forkserver import Server
from scaletrain.host.names import host_name
from scaletrain.host.processes import signal_name
from scaletrain.host.stopwatch import Stopwatch
from scaletrain.launching.job import STORE_FD, Companion, Job, Program
from scaletrain.launching.plan import Command, LaunchPlan
from scaletrain.launching.store import bind_store
from scaletrain.launching.supervision import first_cause, hangs, leftovers, warm
from scaletrain.launching.supervision.ends import LateEnds
from scaletrain.launching.supervision.evidence import Evidence
from scaletrain.launching.supervision.processes import Process, Processes
from scaletrain.launching.supervision.screen import Display
from scaletrain.run import flight, job_key, progress
from scaletrain.run.atomic import write_json
from scaletrain.run.failure import Failure, FailureKind
from scaletrain.run.layout import RunDir
from scaletrain.run.progress import LAUNCH_MARK
from scaletrain.timeouts import (
    COMPANION_STOP_S,
    GRACE_S,
    LAUNCHER_S,
    PEERS_S,
    STOP_S,
    Timeouts,
)
from scaletrain.units import plural

_TICK_S = 0.1
_LOADING_TICK_S = 0.05  # the same while a forkserver loads
_SAY_START_AFTER_S = (3.0, 10.0, 30.0, 60.0, 120.0)  # since the start, while no step is done
_LEFT_BEHIND_SAID_S = 1.0  # after the workers, processes that they left end without a word
_ENDING = (signal.SIGINT, signal.SIGTERM)  # the second of these ends the job at once


class Supervisor:
    """Carries out a plan in this process.

    Args:
        plan: the commands to start. Its files are written already.
        job: the workers, and the limits that they are held to.
        display: the part of their output that a person chose to see.
        standard_input: the descriptor that becomes rank 0's standard input; -1: none.
    """

    def __init__(self, plan: LaunchPlan, job: Job, display: Display, standard_input: int = -1):
        self.plan = plan
        self.job = job
        self.signals: list[int] = []  # appended to by signal handlers, read by ``run``
        self._started_at = time.monotonic()
        # The environment of all processes. ``_start`` adds the store's address.
        self._environ = dict(os.environ)
        self._run_dir = RunDir(job.run_dir)
        several = len(plan.commands) + len(plan.companions) > 1
        # The supervisors of other hosts keep the output of their launchers in the same directory.
        suffix = f" {host_name()}" if plan.is_part else ""
        self._processes = Processes(job, several, display, suffix, standard_input)
        # The supervisors of other hosts have launch ids of their own.
        launch = None if plan.is_part else os.environ[LAUNCH_MARK]
        self._evidence = Evidence(job, self._processes, launch)
        self._late_ends = LateEnds(job, self._processes)
        self._timeouts = Timeouts(job.timeout_s)
        self._hang_watch = hangs.HangWatch(
            self._run_dir, job.workers, self._timeouts.step_s, self._timeouts.start_s
        )
        # Ranks that ended badly while the job goes on without them. Added to by ``_lose``.
        self._lost: set[int] = set()
        # When a launcher's worker was first seen to have failed, monotonic; set by
        # ``_failed_inside_launcher``.
        self._failing_since: float | None = None
        # When to say how the start goes, the next time first. Only training reports it.
        self._say_start_after_s = [*_SAY_START_AFTER_S]
        if not job.trains:
            self._say_start_after_s.clear()

    def run(self) -> int:
        """Carry out the plan; return the exit status."""
        self._forget_earlier_job()
        try:
            self._start()
        except OSError as error:
            self._processes.stop()
            missing = error.filename or "a worker"
            self._processes.say(
                f"scaletrain: error: cannot start {missing}: {error.strerror}"
                " (scaletrain doctor: what works here, and how to get the rest)"
            )
            return 2
        if self.signals and not self._processes.workers:
            return self._end_interrupted(self.signals[0])
        return self._watch()

    def report_status(self, status: int) -> None:
        """Tell the process that started this one the exit status (``supervise.run``)."""
        self._processes.report_status(status)

    # 1. and 2. Starting

    def _forget_earlier_job(self) -> None:
        self._run_dir.first_cause.unlink(missing_ok=True)
        self._run_dir.save_request.unlink(missing_ok=True)
        job_key.forget(self._run_dir.path)  # one key, one job
        for _, path in self._run_dir.all_failures():
            path.unlink(missing_ok=True)
        for rank in range(self.job.workers):
            self._run_dir.progress(rank).unlink(missing_ok=True)

    def _start(self) -> None:
        """Start all processes: those that others need come first."""
        listening = self._bind_store()
        store_fd = -1 if listening is None else listening.fileno()
        serving_environ = {**self._environ, STORE_FD: str(store_fd)}
        if listening and not self.job.serves_store:
            store = Companion("store", Program.STORE.command())
            self._processes.start(_command(store), serving_environ, store, store_fd)
        for companion in self.plan.companions:
            self._processes.start(_command(companion), self._environ, companion)
        server = warm.server(self.job, self.plan, self._environ)
        if server:
            self._wait_until_loaded(server)
            if server.obstacle:
                self._processes.say(
                    f"scaletrain: workers start cold: {server.obstacle}"
                    " (--cold saves the time until this shows)"
                )
        for command in self.plan.commands:
            if self.signals or self._processes.orphaned:
                break  # while the server was loading: nothing has begun
            if listening and command.rank == 0 and self.job.serves_store:
                self._processes.start(command, serving_environ, fd=store_fd, server=server)
            else:
                self._processes.start(command, self._environ, server=server)
        if server:
            server.close()
        if listening:
            listening.close()  # the process that serves the store holds it now
        self._processes.forget_standard_input()

    def _wait_until_loaded(self, server: Server) -> None:
        """Wait until a forkserver can fork, or never will, or the job is called off."""
        while server.is_ready(_LOADING_TICK_S) is None:
            self._processes.read(0)
            self._say_how_start_goes()
            if self.signals or self._processes.orphaned:
                return

    def _bind_store(self) -> socket.socket | None:
        """Bind a free port for the store, if the plan wants one, and tell all processes.

        Returns:
            The listening socket, which the process that serves the store inherits.
        """
        if not self.plan.store_address:
            return None
        return bind_store(self.plan.store_address, self.job.workers, self._environ)

    # 3. Watching

    def _watch(self) -> int:
        """Watch until the job has ended; return its exit status."""
        while True:
            self._processes.read(_TICK_S)
            if self._processes.orphaned:
                self._processes.stop()
                return 1
            self._answer_save_requests()
            # A signal that comes when all have ended has nothing left to stop.
            ending = [number for number in self.signals if number != signal.SIGUSR2]
            if ending and self._processes.any_running():
                return self._end_interrupted(ending[0])
            self._say_how_start_goes()
            self._late_ends.look()
            failure = self._find_failure() or self._find_hang()
            if failure:
                return self._end_failed(failure)
            if not self._processes.any_running():
                self._wait_for_left_behind()
                self._processes.stop()
                return 0

    def _wait_for_left_behind(self) -> None:
        """Give processes that finished workers have left running time to end, as an upload may."""
        stopwatch = Stopwatch()
        waited_s = 0.0
        is_told = False
        limit_s = self._timeouts.leftovers_s
        while waited_s < limit_s and not self.signals and not self._processes.orphaned:
            left = self._processes.left_behind()
            if not left:
                return
            # Most end in the next moment, having noticed that their parent has.
            if waited_s > _LEFT_BEHIND_SAID_S and not is_told:
                is_told = True
                self._processes.say(
                    f"scaletrain: the workers have finished but left running:"
                    f" {self._processes.describe(left)}: ended after {limit_s:g} s"
                )
            self._processes.read(_TICK_S if is_told else 0.02)
            waited_s = stopwatch.look()

    def _answer_save_requests(self) -> None:
        """Let a training job write a checkpoint and go on, for each SIGUSR2.

        A file asks for it, because launchers pass on only some signals. Other jobs get the signal.
        """
        while signal.SIGUSR2 in self.signals:
            self.signals.remove(signal.SIGUSR2)
            if not self.job.trains:
                self._pass_on(signal.SIGUSR2)
                continue
            try:
                self._run_dir.save_request.touch()
            except OSError as error:
                self._processes.say(f"scaletrain: {error.filename}: {error.strerror}")
            else:
                self._processes.say("scaletrain: asked for a checkpoint; the run goes on")

    def _say_how_start_goes(self) -> None:
        """Say now and then how many workers have joined, until the first step is done."""
        since_start_s = time.monotonic() - self._started_at
        if not self._say_start_after_s or since_start_s < self._say_start_after_s[0]:
            return
        workers = progress.read_all(self._run_dir, self.job.workers)
        if any(worker.step is not None or worker.ended for worker in workers):
            self._say_start_after_s.clear()
            return
        self._say_start_after_s.pop(0)
        joined = len([worker for worker in workers if worker.has_joined])
        if joined == self.job.workers:
            state = "all have joined, the first step is not done yet"
        elif self.job.workers == 1:
            state = "the worker has not joined yet"
        else:
            state = f"{joined} of {self.job.workers:,} workers have joined"
        self._processes.say(f"scaletrain: starting: {state} ({since_start_s:.0f} s)")

    def _find_failure(self) -> Failure | None:
        """Return the first cause, if a process has failed that the job cannot do without."""
        # A copy of the list, since ``_restart`` changes it.
        for process in [*self._processes.companions]:
            if process.ended_at is not None and not self._restart(process):
                return self._choose_cause()
        failed = []
        for process in self._processes.workers:
            ended_badly = process.ended_at is not None and process.status != 0
            if ended_badly and process.rank not in self._lost:
                failed.append(process)
        if failed and not self._goes_on_without(failed):
            return self._choose_cause()
        for process in failed:
            self._lose(process)
        if not failed and self._failed_inside_launcher():
            return self._choose_cause()
        return None

    def _restart(self, process: Process) -> bool:
        """Start a companion that has ended once more, if it may be; return True if it was."""
        companion = process.companion
        assert companion
        if process.restarts >= companion.restarts:
            return False
        self._processes.companions.remove(process)
        restarts = process.restarts + 1
        how = self._evidence.how_it_ended(process.status or 0)
        again = f"started again ({restarts} of {companion.restarts})"
        self._processes.say(f"scaletrain: {companion.name} {how}; {again}")
        started = self._processes.start(_command(companion), self._environ, companion)
        started.restarts = restarts
        return True

    def _num_living(self) -> int:
        """Return the number of workers that run or have ended well."""
        return len([p for p in self._processes.workers if p.is_running or p.status == 0])

    def _goes_on_without(self, failed: list[Process]) -> bool:
        """Return True if enough workers live for the job to go on without those that failed."""
        if self.job.min_workers is None or any(process.rank is None for process in failed):
            return False
        return self._num_living() >= max(1, self.job.min_workers)

    def _lose(self, process: Process) -> None:
        """Go on without a worker that has failed."""
        assert process.rank is not None
        self._lost.add(process.rank)
        lost = first_cause.headline(self._evidence.of_process(process))
        workers = f"{self._num_living()} of {plural(self.job.workers, 'worker')}"
        self._processes.say(
            f"{lost}; the job goes on with {workers} (at least {self.job.min_workers})"
        )

    def _failed_inside_launcher(self) -> bool:
        """Return True if a worker has failed and its launcher runs on for too long.

        A launcher ends soon after one of its workers has failed, unless it starts workers again.
        """
        running = [launcher for launcher in self._processes.launchers() if launcher.is_running]
        if not running or self._processes.restart_workers():
            return False
        if not self._evidence.any_silent_end() and not self._evidence.reports():
            return False
        if self._failing_since is None:
            self._failing_since = time.monotonic()
        return time.monotonic() - self._failing_since > LAUNCHER_S

    def _find_hang(self) -> Failure | None:
        """Return the first cause, if the job makes no progress."""
        if self._processes.launchers():
            self._evidence.watch_workers()
        if not self._hang_watch.is_hanging(self._lost):
            return None
        hang = self._find_culprit()
        if hang is None or self._end_hung(hang):
            return None
        # Where no rank is behind, the workers' own time-outs may say more than that the job hangs,
        # for example that the network is cut.
        if self.job.trains and hang.is_ambiguous and hang.failure.step is not None:
            self._wait_for_first_report(self._timeouts.reports_s)
        self._wait_for_reports(GRACE_S)
        return first_cause.choose([hang.failure, *self._evidence.reports()])

    def _end_hung(self, hang: hangs.Hang) -> bool:
        """End a worker that hangs, if the job can go on without it; return True if it was ended."""
        can_lose = self.job.min_workers is not None and not hang.is_ambiguous
        if not can_lose or self._num_living() <= max(1, self.job.min_workers or 1):
            return False
        for process in self._processes.workers:
            if process.rank == hang.failure.rank and process.is_running:
                self._processes.say(f"{first_cause.headline(hang.failure)}: it is ended")
                process.signal(signal.SIGKILL)
                self._wait_for_end(process)
                if not process.is_running:
                    self._lose(process)
                return True
        return False

    def _wait_for_end(self, process: Process) -> None:
        until = time.monotonic() + GRACE_S
        while time.monotonic() < until and process.is_running:
            self._processes.read(0.05)

    def _find_culprit(self) -> hangs.Hang | None:
        restarting = self._processes.restart_workers()
        return hangs.find_culprit(
            self._run_dir,
            self.job.workers,
            self._lost,
            self._hang_watch.silent_s(),
            restarting,
        )

    # 4. Choosing the first cause

    def _choose_cause(self) -> Failure:
        """Wait a moment for other reports, then choose the first cause among all failures."""
        self._wait_for_reports(GRACE_S)
        cause = first_cause.choose(self._evidence.all())
        if cause.kind is FailureKind.PEER:
            # Time-outs end all ranks, but not in the same instant: one may still report more.
            self._wait_for_reports(PEERS_S)
            cause = first_cause.choose(self._evidence.all())
        if cause.kind is FailureKind.PEER:
            # Perhaps one of the ranks that still run is the one that hangs.
            hang = self._find_culprit()
            if hang:
                cause = hang.failure
        return cause

    def _wait_for_first_report(self, seconds: float) -> None:
        stopwatch = Stopwatch()
        while stopwatch.look() < seconds and not self._evidence.reports():
            if self.signals or self._processes.orphaned or not self._processes.any_running():
                return
            self._processes.read(_TICK_S)

    def _wait_for_reports(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and self._processes.any_running():
            self._processes.read(0.05)

    # 5. Ending

    def _end_failed(self, failure: Failure) -> int:
        """End everything after a failure, and show its cause; return the exit status."""
        stopped = []
        for process in self._processes.workers:
            if process.is_running and process.rank != failure.rank:
                stopped.append(process.name)
        # A full disk, or a directory that is gone, must neither keep the processes nor the cause.
        self._processes.stop()
        self._write_first_cause(failure)
        telling = [process for process in self._processes.all if process.mistake_is_shown]
        if any(failure.message == process.mistake for process in telling):
            return failure.exit_code  # the process itself has shown it
        shown_by_batch_script = f"scaletrain: rank {failure.rank} on "
        if shown_by_batch_script not in self._processes.launcher_output:
            self._processes.say(first_cause.text(failure, stopped))
            dumps = self._collectives_of(failure)
            if dumps:
                self._processes.say(f"scaletrain: {dumps}")
            checkpoint = leftovers.checkpoint_line(self.job)
            if checkpoint:
                self._processes.say(f"scaletrain: {checkpoint}")
        if failure.rank is not None:
            hidden = self._processes.hidden_output(failure.rank)
            if hidden:
                self._processes.say(f"scaletrain: the output of rank {failure.rank}: {hidden}")
        return failure.exit_code or 1

    def _collectives_of(self, failure: Failure) -> str:
        """Write the ranks' last collectives after a hang or a lost peer; return how to read them.

        Empty if no rank has called one.
        """
        if failure.kind not in (FailureKind.HANG, FailureKind.PEER, FailureKind.CUT):
            return ""
        try:
            folder = flight.write_dumps(self._run_dir, self.job.workers)
        except OSError as error:
            return f"{error.filename} cannot be written: {error.strerror}"
        if folder is None:
            return ""
        return f"the last collectives of each rank: torchfrtrace {folder} -p rank_"

    def _write_first_cause(self, failure: Failure) -> None:
        path = self._run_dir.first_cause
        try:
            write_json(path, failure._asdict())
        except OSError as error:
            self._processes.say(f"scaletrain: {path} cannot be written: {error.strerror}")

    def _end_interrupted(self, number: int) -> int:
        """Pass signals on, and give the workers time to end in good order.

        A second SIGINT or SIGTERM ends them at once. SIGUSR1, from a batch system or a person, asks
        for a checkpoint and the end: workers answer in their own time.

        Args:
            number: the signal that came first.

        Returns:
            128 + ``number``, also if workers end with 0: the job has not done all of its work. 0 if
            a training run had finished, or if all workers answered SIGUSR1 with 0.
        """
        if self.job.trains and number != signal.SIGUSR1 and self._processes.any_running():
            self._processes.say(
                "scaletrain: stopping in good order; a second signal ends it at once"
            )
        num_passed = 0
        stopwatch = Stopwatch()
        while stopwatch.look() < STOP_S and self._processes.any_running():
            while num_passed < len(self.signals):
                if self.signals[num_passed] != signal.SIGUSR2:  # a checkpoint comes anyway
                    self._pass_on(self.signals[num_passed])
                num_passed += 1
            num_ending = len([heard for heard in self.signals if heard in _ENDING])
            if num_ending > 1 or self._processes.orphaned:
                break
            self._processes.read(_TICK_S)
            # A checkpoint takes its time. The limit counts only from a signal that ends the job.
            if number == signal.SIGUSR1 and num_ending == 0:
                stopwatch = Stopwatch()
        self._processes.stop()
        left = leftovers.state_when_stopped(self.job)
        self._processes.say(f"scaletrain: stopped by {signal_name(number)}{left}")
        workers = self._processes.workers
        all_ended_well = bool(workers) and all(process.status == 0 for process in workers)
        ending = [heard for heard in self.signals if heard in _ENDING]
        has_finished = self.job.trains and self._run_dir.has_finished()
        if all_ended_well and (has_finished or not ending):
            return 0
        return 128 + (ending or [number])[0]

    def _pass_on(self, number: int) -> None:
        """Pass a signal on to all workers."""
        for process in self._processes.workers:
            if self._is_loading(process):
                # A SIGINT would only show a traceback of its imports.
                process.signal(signal.SIGTERM)
            else:
                process.signal(process.interrupt or number)

    def _is_loading(self, process: Process) -> bool:
        """Return True if a process is a worker of ours that has not reported anything yet."""
        if not self.job.joins_store or process.rank is None:
            return False
        return progress.read(self._run_dir, process.rank) is None


def _command(companion: Companion) -> Command:
    """Return a companion as a command to start."""
    return Command(companion.name, companion.argv, companion.env, stop_s=COMPANION_STOP_S)
