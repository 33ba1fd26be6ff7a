"""The supervisor: a process of its own that starts a plan's commands, watches them, and ends them all (see ``supervise``)."""

import os
import shlex
import signal
import socket
import time

from scaletrain.launching.job import Companion, Job, Program
from scaletrain.launching.plan import Command, LaunchPlan
from scaletrain.launching.supervision import first_cause
from scaletrain.launching.supervision.processes import Process, Processes
from scaletrain.run.atomic import write_json
from scaletrain.run.failure import Failure
from scaletrain.run.layout import RunDir
from scaletrain.run.progress import host_name, progress_path

STORE_FD = "SCALETRAIN_STORE_FD"  # the listening socket that the store is to be served on
HUNG_STATUS = 124  # as timeout(1)
_TICK_S = 0.1
_GRACE_S = 1.0  # after a failure, time for others to report an earlier or better cause
_PEERS_S = 2.0  # more time, when all that is known is that a peer was lost
_LAUNCHER_S = 8.0  # how long another launcher may take to end after one of its workers failed
_NOTICED_S = 0.1  # how late the end of another launcher's worker is noticed, at most
_STARTING_S = (
    180.0  # a worker that has not begun its first step may take this long, if timeout_s is less
)
_TELL_S = (3.0, 10.0, 30.0, 60.0, 120.0)  # after the start, while no step is done
_ON_THE_WAY = ("starting", "looking for rank 0")  # what a worker does that has not joined
_INTERRUPT_S = 30.0  # after Ctrl-C or SIGTERM, time for workers to write a checkpoint and end


class Supervisor:
    def __init__(self, plan: LaunchPlan, job: Job):
        self.plan, self.job = plan, job
        self.started_at = time.time()
        self.environ = dict(os.environ)
        self.signals: list[int] = []
        self.lost: set[int] = set()  # ranks that ended badly while the job goes on without them
        self.pids: set[int] = set()  # workers of other launchers that are watched
        self.vanished: dict[
            first_cause.Known, Failure
        ] = {}  # those of them that ended without a report
        self.failing_since = 0.0  # when a launcher's worker was first seen to have failed
        self.socket: socket.socket | None = None
        self.asked_companions = job.companions if plan.companions is None else plan.companions
        self.all = Processes(prefixed=len(plan.commands) + len(self.asked_companions) > 1)
        self.progress = first_cause.Progress(job.run_dir, job.workers)
        self.oom_kills = first_cause.oom_kills()
        self.tell_at: tuple[float, ...] = _TELL_S if job.trains else ()

    def run(self) -> int:
        for path in self.job.run_dir.glob("failure*.json"):
            path.unlink(missing_ok=True)
        for rank in range(self.job.workers):
            progress_path(self.job.run_dir, rank).unlink(missing_ok=True)
        try:
            self._start()
        except OSError as error:
            self.all.stop()
            self.all.say(
                f"scaletrain: error: cannot start {error.filename or 'a worker'}: {error.strerror}"
                " (scaletrain doctor: what works here, and how to get the rest)"
            )
            return 2
        while True:
            self.all.read(_TICK_S)
            if self.all.orphaned:
                self.all.stop()
                return 1
            if self.signals:
                return self._interrupted(self.signals[0])
            self._tell_start()
            failure = self._failed() or self._hung()
            if failure:
                return self._end(failure)
            if not self.all.running():
                self.all.stop()
                return 0

    def _end(self, failure: Failure) -> int:
        """Say what was the cause, stop the rest."""
        write_json(self.job.run_dir / "failure.json", failure._asdict())
        running = [p.name for p in self.all.workers if p.status is None and p.rank != failure.rank]
        self.all.stop()
        if failure.message in [
            p.mistake for p in (*self.all.workers, *self.all.companions) if p.mistake
        ]:
            return failure.exit_code
        if (
            f"scaletrain: rank {failure.rank} on " not in self.all.said
        ):  # a batch script says it itself
            self.all.say(first_cause.text(failure, running))
            if saved := self._saved():
                self.all.say(f"scaletrain: {saved}")
        return failure.exit_code or 1

    # Starting

    def _start(self) -> None:
        if self.plan.store_address:
            self.socket = socket.create_server(
                (self.plan.store_address, 0), backlog=max(128, 2 * self.job.workers)
            )
            self.socket.set_inheritable(True)
            self.environ["MASTER_ADDR"] = self.plan.store_address
            self.environ["MASTER_PORT"] = str(self.socket.getsockname()[1])
            self.environ["TORCHELASTIC_USE_AGENT_STORE"] = (
                "True"  # torch's env:// then joins our store; it serves none
            )
        store_fd = self.socket.fileno() if self.socket else -1
        if self.socket and not self.job.serves_store:
            self._start_companion(Companion("store", Program.STORE.command()), fd=store_fd)
        for companion in self.asked_companions:
            self._start_companion(companion)
        for command in self.plan.commands:
            served = command.rank == 0 and self.job.serves_store and self.socket is not None
            environ = self.environ | ({STORE_FD: str(store_fd)} if served else {})
            self.all.start(command, environ, fd=store_fd if served else -1)
        if self.socket:
            self.socket.close()  # whoever serves the store holds it now

    def _start_companion(self, companion: Companion, restarts: int = 0, fd: int = -1) -> None:
        command = Command(companion.name, companion.argv, companion.env, stop_s=5.0)
        environ = self.environ | ({STORE_FD: str(fd)} if fd >= 0 else {})
        self.all.start(command, environ, companion, fd).restarts = restarts

    def _tell_start(self) -> None:
        """Before the first step is done, a line now and then: how many workers have met. Only of training: other programs do not say."""
        if not self.tell_at or time.time() - self.started_at < self.tell_at[0]:
            return
        known = self.progress.all()
        if any(worker.step is not None or worker.ended for worker in known):
            self.tell_at = ()
            return
        self.tell_at = self.tell_at[1:]
        here, of = sum(worker.doing not in _ON_THE_WAY for worker in known), self.job.workers
        now = (
            f"{here} of {of} workers have joined"
            if here < of
            else "all have joined, the first step is not done yet"
        )
        self.all.say(f"scaletrain: starting: {now} ({time.time() - self.started_at:.0f} s)")

    # Watching

    def _failed(self) -> Failure | None:
        """The first cause, when a process has failed that the job cannot do without."""
        for process in self.all.companions[:]:
            if process.ended_at is not None and self._companion_ended(process):
                return self._settle()
        bad = [
            p
            for p in self.all.workers
            if p.ended_at is not None and p.status != 0 and p.rank not in self.lost
        ]
        if not bad:
            return self._failed_inside()
        if self.job.min_workers is None or any(process.rank is None for process in bad):
            return self._settle()
        living = sum(process.status is None or process.status == 0 for process in self.all.workers)
        if living < self.job.min_workers or living == 0:
            return self._settle()
        for process in bad:
            self.lost.add(process.rank or 0)
            failure = self._failure_of(process)
            goes_on = f"the job goes on with {living} of {self.job.workers} workers (at least {self.job.min_workers})"
            self.all.say(f"{first_cause.headline(failure)}; {goes_on}")
        return None

    def _failed_inside(self) -> Failure | None:
        """A launcher ends when one of its workers fails. When it does not within a few seconds, we do not wait for it."""
        if not any(process.is_launcher and process.status is None for process in self.all.workers):
            return None
        if any(process.restarts_workers for process in self.all.workers) or not (
            self.vanished
            or first_cause.reported(self.job.run_dir, self.job.workers, self.started_at)
        ):
            return None
        self.failing_since = self.failing_since or time.monotonic()
        return self._settle() if time.monotonic() - self.failing_since > _LAUNCHER_S else None

    def _companion_ended(self, process: Process) -> bool:
        """Start a companion again while it may be; say whether its end is the job's."""
        companion = process.companion
        assert companion
        if process.restarts >= companion.restarts:
            return True
        self.all.companions.remove(process)
        how = self._how_it_ended(process.status or 0)
        self.all.say(
            f"scaletrain: {companion.name} {how}; started again ({process.restarts + 1} of {companion.restarts})"
        )
        self._start_companion(companion, process.restarts + 1)
        return False

    def _settle(self) -> Failure:
        """Wait a moment for other reports, then choose the first cause among all."""
        self._wait_for_reports(_GRACE_S)
        cause = first_cause.choose(self._failures())
        if (
            cause.kind == "peer"
        ):  # nobody has said more than that: time-outs end all ranks, but not in the same instant
            self._wait_for_reports(_PEERS_S)
            cause = first_cause.choose(self._failures())
        if cause.kind == "peer":  # is one of those that still run the one that hangs?
            cause = self._who_hangs() or cause
        return cause

    def _wait_for_reports(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and self.all.running():
            self.all.read(0.05)

    def _failures(self) -> list[Failure]:
        failures = [
            self._failure_of(p) for p in self.all.workers if p.ended_at is not None and p.status
        ]
        failures += [self._failure_of(p) for p in self.all.companions if p.ended_at is not None]
        failures += first_cause.reported(self.job.run_dir, self.job.workers, self.started_at)
        said = first_cause.told(self.all.said, self.progress, time.time())
        failures += [said] if said else []
        # Only the ends that came before every report: later ones are the launcher's doing.
        first = min((failure.time for failure in failures), default=time.time())
        failures += [failure for failure in self._vanished() if failure.time <= first + _NOTICED_S]
        return failures

    def _failure_of(self, process: Process) -> Failure:
        """What ended a process: its own report, or what its exit status says."""
        rank, status = process.rank, process.status or 0
        for failure in first_cause.reported(self.job.run_dir, self.job.workers, self.started_at):
            if failure.rank is not None and failure.rank == rank:
                return failure
        known = None if rank is None else self.progress.read(rank)
        if process.mistake and status == 2:
            return Failure(
                rank,
                process.host,
                None,
                process.ended_at or time.time(),
                "user",
                process.mistake,
                exit_code=2,
            )
        how = self._how_it_ended(status)
        return Failure(
            rank=rank, host=known.host if known else process.host, step=known.step if known else None,
            time=process.ended_at or time.time(), kind="launcher" if process.is_launcher else "signal" if status < 0 else "exit",
            message=how if rank is not None else f"{process.name} {how}",
            collective=known.collective if known else "", exit_code=128 - status if status < 0 else status or 1,
        )  # fmt: skip

    def _watch_pids(self) -> None:
        """Under another launcher, watch the workers of this host by the process ids they reported: it tells who ended first."""
        for known in self.progress.all():
            if known.pid in self.pids or known.host != host_name() or known.ended:
                continue
            if self.all.watch_pid(known.pid, lambda known=known: self._pid_ended(known)):  # type: ignore[misc]
                self.pids.add(known.pid)

    def _pid_ended(self, then: first_cause.Known) -> None:
        known = self.progress.read(then.rank) or then
        if known.pid == then.pid and not known.ended:
            self.vanished[then] = Failure(
                then.rank, then.host, known.step, time.time(), "signal",
                f"was killed (it ended without a word; {self._memory()})", collective=known.collective,
                exit_code=128 + signal.SIGKILL,
            )  # fmt: skip

    def _vanished(self) -> list[Failure]:
        """Of the workers that ended without a report, those that no later attempt has replaced."""
        now = {known.rank: known.pid for known in self.progress.all()}
        said = first_cause.told(self.all.said, self.progress, time.time())
        return [
            failure
            for then, failure in self.vanished.items()
            if now.get(then.rank) == then.pid and not (said and said.rank == then.rank)
        ]

    def _hung(self) -> Failure | None:
        if any(process.is_launcher for process in self.all.workers):
            self._watch_pids()
        limit_s = self.job.timeout_s
        if not self.progress.stale(limit_s, max(limit_s, _STARTING_S), self.lost):
            return None
        hung = self._who_hangs()
        if hung is None:
            return None
        # The workers' own time-outs are due just now, too, and may tell more: whose network is cut, for one.
        self._wait_for_reports(_GRACE_S)
        return first_cause.choose(
            [hung, *first_cause.reported(self.job.run_dir, self.job.workers, self.started_at)]
        )

    def _who_hangs(self) -> Failure | None:
        restarting = any(process.restarts_workers for process in self.all.workers)
        return first_cause.hang(self.progress, self.lost, HUNG_STATUS, restarting)

    def _how_it_ended(self, status: int) -> str:
        if status < 0:
            why = f" ({self._memory()})" if -status == signal.SIGKILL else ""
            return f"was ended by {first_cause.signal_name(-status)}{why}"
        return f"ended with status {status}"

    def _memory(self) -> str:
        """Whether a lack of memory on this host explains a SIGKILL."""
        now = first_cause.oom_kills()
        if now is None or self.oom_kills is None:
            return "did memory run out? see dmesg"
        return (
            "the kernel ran out of memory"
            if now > self.oom_kills
            else "by another process; memory did not run out"
        )

    # Stopping

    def _interrupted(self, number: int) -> int:
        """Pass signals on, and give the workers time to end in good order. A second signal ends them at once."""
        passed = 0
        until = time.monotonic() + _INTERRUPT_S
        if self._trains() and number != signal.SIGUSR1 and self.all.running():
            self.all.say("scaletrain: stopping in good order; a second signal ends it at once")
        while time.monotonic() < until and self.all.running():
            for heard in self.signals[passed:]:
                for process in self.all.workers:
                    process.signal(
                        signal.SIGTERM if self._imports(process) else process.interrupt or heard
                    )
            passed = len(self.signals)
            if (
                self.signals.count(signal.SIGINT) + self.signals.count(signal.SIGTERM) > 1
                or self.all.orphaned
            ):
                break
            self.all.read(_TICK_S)
            if number == signal.SIGUSR1 and not (
                {signal.SIGINT, signal.SIGTERM} & set(self.signals)
            ):
                # A request to write a checkpoint and end, from a batch system or a person: workers answer in their own time.
                until = time.monotonic() + _INTERRUPT_S
        self.all.stop()
        statuses = [process.status for process in self.all.workers]
        self.all.say(
            f"scaletrain: stopped by {first_cause.signal_name(number)}{self._what_is_left()}"
        )
        return 0 if all(status == 0 for status in statuses) else 128 + number

    def _imports(self, process: Process) -> bool:
        """Whether a worker of ours has said nothing yet: a SIGINT would only show what it was importing."""
        if not self.job.joins_store or process.rank is None:
            return False
        return self.progress.read(process.rank) is None

    def _trains(self) -> bool:
        """Whether this is a training job, and not somebody's own program."""
        return (self.job.run_dir / "config.yaml").exists()

    def _what_is_left(self) -> str:
        """Of a training run that was stopped: how far it got, and the command that goes on with it."""
        if not self._trains():
            return ""
        if RunDir(self.job.run_dir).has_finished():
            return ", when it had finished"
        if saved := self._saved():
            return f"; {saved}"
        done = max((known.step or 0 for known in self.progress.all()), default=0)
        return (
            " before the first step was done"
            if not done
            else f" after {done} steps; no checkpoint was written"
        )

    def _saved(self) -> str:
        """The newest checkpoint and the command that goes on from it; nothing where there is none."""
        saved = [
            int(path.stem.removeprefix("step-"))
            for path in self.job.run_dir.glob("step-*.safetensors")
        ]
        if not saved:
            return ""
        config = str(self.job.run_dir / "config.yaml")
        again = shlex.join(
            ["scaletrain", "train", config, "--run-dir", str(self.job.run_dir), "--resume"]
        )
        return f"the checkpoint holds {max(saved)} steps. To go on: {again}"
