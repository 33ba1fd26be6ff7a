"""The supervisor: a process of its own that starts a plan's commands, watches them, and ends them all (see ``supervise``)."""

import contextlib
import ctypes
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from typing import BinaryIO

from scaletrain.errors import UserError
from scaletrain.launching import first_cause
from scaletrain.launching.job import Command, Companion, Failure, Job, LaunchPlan
from scaletrain.launching.progress import host_name, progress_path
from scaletrain.launching.supervise import FORWARDED, MARK, ORDER, end_all
from scaletrain.metrics import write_json

STORE_FD = "SCALETRAIN_STORE_FD"  # the listening socket that the store is to be served on
HUNG_STATUS = 124  # as timeout(1)
_TICK_S = 0.1
_GRACE_S = 1.0  # after a failure, time for others to report an earlier or better cause
_PEERS_S = 2.0  # more time, when all that is known is that a peer was lost
_LAUNCHER_S = 8.0  # how long another launcher may take to end after one of its workers failed
_NOTICED_S = 0.1  # how late the end of another launcher's worker is noticed, at most
_STARTING_S = 180.0  # a worker that has not begun its first step may take this long, if timeout_s is less
_INTERRUPT_S = 30.0  # after Ctrl-C or SIGTERM, time for workers to write a checkpoint and end


class _Process:
    """A started command and what is known of it."""

    def __init__(self, command: Command, environ: dict[str, str], companion: Companion | None = None, fd: int = -1):
        self.name, self.rank, self.stop_s = command.name, command.rank, command.stop_s
        self.companion, self.restarts = companion, 0
        self.restarts_workers, self.interrupt = command.restarts_workers, command.interrupt
        self.is_launcher = self.rank is None and companion is None
        # A launcher gets the chance to end its own workers; a worker has no business without its supervisor.
        death_signal = signal.SIGTERM if self.is_launcher else signal.SIGKILL
        ours = os.getpid()

        def before_exec() -> None:
            _PRCTL(1, death_signal)  # PR_SET_PDEATHSIG
            if os.getppid() != ours:
                os._exit(1)

        self.popen = subprocess.Popen(
            command.argv, env=environ | dict(command.env), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, process_group=0, preexec_fn=before_exec, pass_fds=() if fd < 0 else (fd,),
        )  # fmt: skip
        self.ended_at: float | None = None

    @property
    def status(self) -> int | None:
        return self.popen.returncode

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if self.is_launcher:
                self.popen.send_signal(number)  # mpirun and torchrun pass it on themselves
            else:
                os.killpg(self.popen.pid, number)


_PRCTL = ctypes.CDLL(None, use_errno=True).prctl


class _Supervisor:
    def __init__(self, plan: LaunchPlan, job: Job):
        self.plan, self.job = plan, job
        self.started_at = time.time()
        self.environ = dict(os.environ)
        self.processes: list[_Process] = []
        self.companions: list[_Process] = []
        self.selector = selectors.DefaultSelector()
        self.signals: list[int] = []
        self.orphaned = False
        self.lost: set[int] = set()  # ranks that ended badly while the job goes on without them
        self.pids: set[int] = set()  # workers of other launchers that are watched
        self.vanished: dict[first_cause.Known, Failure] = {}  # those of them that ended without a report
        self.failing_since = 0.0  # when a launcher's worker was first seen to have failed
        self.said = ""  # the last of what other launchers wrote
        self.socket: socket.socket | None = None
        self.asked_companions = job.companions if plan.companions is None else plan.companions
        self.many = len(plan.commands) + len(self.asked_companions) > 1
        self.progress = first_cause.Progress(job.run_dir, job.workers)

    def run(self) -> int:
        for path in self.job.run_dir.glob("failure*.json"):
            path.unlink(missing_ok=True)
        for rank in range(self.job.workers):
            progress_path(self.job.run_dir, rank).unlink(missing_ok=True)
        self.selector.register(sys.stdin.buffer, selectors.EVENT_READ, None)
        try:
            self._start()
        except OSError as error:
            self._stop()
            self._say(f"scaletrain: error: cannot start {error.filename or 'a worker'}: {error.strerror}", error=True)
            return 2
        failure, status = None, 0
        while True:
            self._read(_TICK_S)
            if self.orphaned:
                self._stop()
                return 1
            if self.signals:
                return self._interrupted(self.signals[0])
            failure = self._failed() or self._hung()
            if failure:
                break
            if all(process.status is not None for process in self.processes):
                break
        if failure:
            status = failure.exit_code or 1
            write_json(self.job.run_dir / "failure.json", failure._asdict())
            running = [p.name for p in self.processes if p.status is None and p.rank != failure.rank]
            self._stop()
            if f"scaletrain: rank {failure.rank} on " not in self.said:  # a batch script says it itself
                self._say(first_cause.text(failure, running), error=True)
        self._stop()
        return status

    # Starting

    def _start(self) -> None:
        if self.plan.store_address:
            self.socket = socket.create_server((self.plan.store_address, 0), backlog=max(128, 2 * self.job.workers))
            self.socket.set_inheritable(True)
            self.environ["MASTER_ADDR"] = self.plan.store_address
            self.environ["MASTER_PORT"] = str(self.socket.getsockname()[1])
            self.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # torch's env:// then joins our store; it serves none
        store_fd = self.socket.fileno() if self.socket else -1
        if self.socket and not self.job.serves_store:
            argv = (sys.executable, "-m", "scaletrain.engine.rendezvous")
            self._start_companion(Companion("store", argv), fd=store_fd)
        for companion in self.asked_companions:
            self._start_companion(companion)
        for command in self.plan.commands:
            served = command.rank == 0 and self.job.serves_store and self.socket is not None
            environ = self.environ | ({STORE_FD: str(store_fd)} if served else {})
            process = _Process(command, environ, fd=store_fd if served else -1)
            self._watch(process)
            self.processes.append(process)
        if self.socket:
            self.socket.close()  # whoever serves the store holds it now

    def _start_companion(self, companion: Companion, restarts: int = 0, fd: int = -1) -> None:
        command = Command(companion.name, companion.argv, companion.env, stop_s=5.0)
        environ = self.environ | ({STORE_FD: str(fd)} if fd >= 0 else {})
        process = _Process(command, environ, companion, fd)
        process.restarts = restarts
        self._watch(process)
        self.companions.append(process)

    def _watch(self, process: _Process) -> None:
        for pipe, stream in ((process.popen.stdout, b"1"), (process.popen.stderr, b"2")):
            assert pipe
            os.set_blocking(pipe.fileno(), False)
            self.selector.register(pipe, selectors.EVENT_READ, _Lines(process, self._prefix(process), stream))

    def _prefix(self, process: _Process) -> bytes:
        return f"[{process.name}] ".encode() if self.many else b""

    # Watching

    def _read(self, timeout_s: float) -> None:
        """Show what processes wrote in the meantime, and note which ended."""
        for key, _ in self.selector.select(timeout_s):
            if key.data is None:
                if not os.read(sys.stdin.fileno(), 4096):
                    self.orphaned = True
                    self.selector.unregister(key.fileobj)
                continue
            if isinstance(key.data, first_cause.Known):
                self._pid_ended(key.data)
                self.selector.unregister(key.fileobj)
                os.close(key.fd)
                continue
            pipe: BinaryIO = key.fileobj  # type: ignore[assignment]
            try:
                data = os.read(pipe.fileno(), 65536)
            except BlockingIOError:
                continue
            lines = key.data.feed(data)
            if key.data.process.is_launcher:
                self.said = (self.said + lines.decode(errors="replace"))[-20000:]
            self._emit(lines)
            if not data:
                self.selector.unregister(pipe)
                pipe.close()
        for process in [*self.processes, *self.companions]:
            if process.ended_at is None and process.popen.poll() is not None:
                process.ended_at = time.time()

    def _emit(self, lines: bytes) -> None:
        while lines:
            try:
                lines = lines[os.write(sys.stdout.fileno(), lines) :]
            except OSError:  # nobody listens any more; the next read of standard input says so
                return

    def _say(self, text: str, error: bool = False) -> None:
        mark = "2" if error else "1"
        self._emit("".join(f"{mark}{line}\n" for line in text.splitlines()).encode())

    def _failed(self) -> Failure | None:
        """The first cause, when a process has failed that the job cannot do without."""
        for process in self.companions[:]:
            if process.ended_at is not None and self._companion_ended(process):
                return self._settle()
        bad = [p for p in self.processes if p.ended_at is not None and p.status != 0 and p.rank not in self.lost]
        if not bad:
            return self._failed_inside()
        if self.job.min_workers is None or any(process.rank is None for process in bad):
            return self._settle()
        living = sum(process.status is None or process.status == 0 for process in self.processes)
        if living < self.job.min_workers or living == 0:
            return self._settle()
        for process in bad:
            self.lost.add(process.rank or 0)
            failure = self._failure_of(process)
            goes_on = f"the job goes on with {living} of {self.job.workers} workers (at least {self.job.min_workers})"
            self._say(f"{first_cause.headline(failure)}; {goes_on}", error=True)
        return None

    def _failed_inside(self) -> Failure | None:
        """A launcher ends when one of its workers fails. When it does not within a few seconds, we do not wait for it."""
        if not any(process.is_launcher and process.status is None for process in self.processes):
            return None
        if any(process.restarts_workers for process in self.processes) or not (
            self.vanished or first_cause.reported(self.job.run_dir, self.job.workers, self.started_at)
        ):
            return None
        self.failing_since = self.failing_since or time.monotonic()
        return self._settle() if time.monotonic() - self.failing_since > _LAUNCHER_S else None

    def _companion_ended(self, process: _Process) -> bool:
        """Start a companion again while it may be; say whether its end is the job's."""
        companion = process.companion
        assert companion
        if process.restarts >= companion.restarts:
            return True
        self.companions.remove(process)
        how = _how_it_ended(process.status or 0)
        self._say(
            f"scaletrain: {companion.name} {how}; started again ({process.restarts + 1} of {companion.restarts})", True
        )
        self._start_companion(companion, process.restarts + 1)
        return False

    def _settle(self) -> Failure:
        """Wait a moment for other reports, then choose the first cause among all."""
        self._wait_for_reports(_GRACE_S)
        cause = first_cause.choose(self._failures())
        if cause.kind == "peer":  # nobody has said more than that: time-outs end all ranks, but not in the same instant
            self._wait_for_reports(_PEERS_S)
            cause = first_cause.choose(self._failures())
        if cause.kind == "peer":  # is one of those that still run the one that hangs?
            cause = self._who_hangs() or cause
        return cause

    def _wait_for_reports(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(process.status is None for process in self.processes):
            self._read(0.05)

    def _failures(self) -> list[Failure]:
        failures = [self._failure_of(p) for p in self.processes if p.ended_at is not None and p.status]
        failures += [self._failure_of(p) for p in self.companions if p.ended_at is not None]
        failures += first_cause.reported(self.job.run_dir, self.job.workers, self.started_at)
        said = first_cause.told(self.said, self.progress, time.time())
        failures += [said] if said else []
        # Only the ends that came before every report: later ones are the launcher's doing.
        first = min((failure.time for failure in failures), default=time.time())
        failures += [failure for failure in self._vanished() if failure.time <= first + _NOTICED_S]
        return failures

    def _failure_of(self, process: _Process) -> Failure:
        """What ended a process: its own report, or what its exit status says."""
        rank, status = process.rank, process.status or 0
        for failure in first_cause.reported(self.job.run_dir, self.job.workers, self.started_at):
            if failure.rank is not None and failure.rank == rank:
                return failure
        known = None if rank is None else self.progress.read(rank)
        how = _how_it_ended(status)
        return Failure(
            rank=rank, host=host_name(), step=known.step if known else None, time=process.ended_at or time.time(),
            kind="launcher" if process.is_launcher else "signal" if status < 0 else "exit",
            message=how if rank is not None else f"{process.name} {how}",
            collective=known.collective if known else "", exit_code=128 - status if status < 0 else status or 1,
        )  # fmt: skip

    def _watch_pids(self) -> None:
        """Under another launcher, watch the workers of this host by the process ids they reported: it tells who ended first."""
        for known in self.progress.all():
            if known.pid in self.pids or known.host != host_name() or known.ended:
                continue
            with contextlib.suppress(OSError):
                self.selector.register(os.pidfd_open(known.pid), selectors.EVENT_READ, known)
                self.pids.add(known.pid)

    def _pid_ended(self, then: first_cause.Known) -> None:
        known = self.progress.read(then.rank) or then
        if known.pid == then.pid and not known.ended:
            self.vanished[then] = Failure(
                then.rank, then.host, known.step, time.time(), "signal",
                "was killed (it ended without a word; out of memory? see dmesg)", collective=known.collective,
                exit_code=128 + signal.SIGKILL,
            )  # fmt: skip

    def _vanished(self) -> list[Failure]:
        """Of the workers that ended without a report, those that no later attempt has replaced."""
        now = {known.rank: known.pid for known in self.progress.all()}
        said = first_cause.told(self.said, self.progress, time.time())
        return [
            failure
            for then, failure in self.vanished.items()
            if now.get(then.rank) == then.pid and not (said and said.rank == then.rank)
        ]

    def _hung(self) -> Failure | None:
        if any(process.is_launcher for process in self.processes):
            self._watch_pids()
        limit_s = self.job.timeout_s
        if not self.progress.stale(limit_s, max(limit_s, _STARTING_S)):
            return None
        hung = self._who_hangs()
        if hung is None:
            return None
        # The workers' own time-outs are due just now, too, and may tell more: whose network is cut, for one.
        self._wait_for_reports(_GRACE_S)
        return first_cause.choose([hung, *first_cause.reported(self.job.run_dir, self.job.workers, self.started_at)])

    def _who_hangs(self) -> Failure | None:
        return first_cause.hang(self.progress, self.lost, HUNG_STATUS)

    # Stopping

    def _interrupted(self, number: int) -> int:
        """Pass signals on, and give the workers time to end in good order. A second signal ends them at once."""
        passed = 0
        until = time.monotonic() + _INTERRUPT_S
        while time.monotonic() < until and any(process.status is None for process in self.processes):
            for heard in self.signals[passed:]:
                for process in self.processes:
                    process.signal(process.interrupt or heard)
            passed = len(self.signals)
            if self.signals.count(signal.SIGINT) + self.signals.count(signal.SIGTERM) > 1 or self.orphaned:
                break
            self._read(_TICK_S)
            if number == signal.SIGUSR1 and not ({signal.SIGINT, signal.SIGTERM} & set(self.signals)):
                # A request to write a checkpoint and end, from a batch system or a person: workers answer in their own time.
                until = time.monotonic() + _INTERRUPT_S
        self._stop()
        statuses = [process.status for process in self.processes]
        self._say(f"scaletrain: stopped by {first_cause.signal_name(number)}", error=True)
        return 0 if all(status == 0 for status in statuses) else 128 + number

    def _stop(self) -> None:
        """End everything: SIGTERM, then SIGKILL to what is left; companions last."""
        for group in (self.processes, self.companions):
            running = [process for process in group if process.popen.poll() is None]
            for process in running:
                process.signal(signal.SIGCONT)
                process.signal(signal.SIGTERM)
            until = time.monotonic() + max([process.stop_s for process in running], default=0)
            while time.monotonic() < until and any(process.popen.poll() is None for process in running):
                self._read(0.05)
            for process in running:
                process.signal(signal.SIGKILL)
        end_all(os.environ[MARK])
        self._read(0)
        for process in [*self.processes, *self.companions]:
            process.popen.wait()
        self._drain()

    def _drain(self) -> None:
        """Show the last output; every writer has ended."""
        for _ in range(1000):
            ready = [key for key, _ in self.selector.select(0) if isinstance(key.data, _Lines)]
            if not ready:
                return
            self._read(0)


class _Lines:
    """Cuts a stream into whole lines, each marked with its stream and prefixed with its process."""

    def __init__(self, process: _Process, prefix: bytes, stream: bytes):
        self.process = process
        self._prefix, self._stream, self._rest = prefix, stream, b""

    def feed(self, data: bytes) -> bytes:
        """The lines that ``data`` completes; without data (the end) what is left. Lines over 64 KiB are cut."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if self._rest and (not data or len(self._rest) > 65536):
            lines.append(self._rest)
            self._rest = b""
        return b"".join(self._stream + self._prefix + line + b"\n" for line in lines)


def _how_it_ended(status: int) -> str:
    if status < 0:
        hint = " (out of memory? see dmesg)" if -status == signal.SIGKILL else ""
        return f"was ended by {first_cause.signal_name(-status)}{hint}"
    return f"ended with status {status}"


def _first_line(fd: int) -> bytes:
    """A line and not a byte more: what comes after it is for the selector."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(fd, 1)):
        line += byte
    return line


def main() -> int:
    if MARK not in os.environ:
        raise UserError("this is started by scaletrain, not by hand")
    supervisor = _Supervisor(*ORDER.validate_json(_first_line(sys.stdin.fileno())))
    for number in FORWARDED:
        signal.signal(number, lambda heard, frame: supervisor.signals.append(heard))
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
