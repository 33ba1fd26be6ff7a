"""Submit a batch script and follow the job to its end.

    python -P -m scaletrain.programs.follow_slurm SCRIPT [POLL_S [OPTION_OF_SBATCH ...]]

Shows the states and the output of the job, or of each task of its array. SIGINT and SIGTERM cancel
the job; SIGUSR1 goes to its tasks. Ends with the job's own status.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scaletrain.launching.growing import GrowingOutput
from scaletrain.run.layout import RunDir

_UNKNOWN_LOOKS = 5  # until a job that the controller does not know counts as forgotten
_EXTRA_LOOKS = 2  # at a bad end: a job that is being requeued shows one for a moment
_SILENT_S = 120.0  # how long the controller may be away: a job goes on without it
_ANSWER_S = 30.0  # how long one answer of the controller may take
_LAST_OUTPUT_S = 0.2  # how late the last output may come


class SlurmState(NamedTuple):
    """The meaning of a state of a SLURM job to its follower."""

    has_ended: bool
    looks: int = 0  # how often the state must be seen again before it is believed
    status: int | None = None  # of this process at the end; None: the job's own exit code


_GOES_ON = SlurmState(has_ended=False)
# Every state that is not in the table, such as FAILED or NODE_FAIL, is a bad end.
_BAD_END = SlurmState(has_ended=True, looks=_EXTRA_LOOKS)
_STATES = {
    "PENDING": _GOES_ON,
    "CONFIGURING": _GOES_ON,
    "RUNNING": _GOES_ON,
    "COMPLETING": _GOES_ON,
    "SUSPENDED": _GOES_ON,
    "REQUEUED": _GOES_ON,
    "REQUEUE_HOLD": _GOES_ON,
    "RESIZING": _GOES_ON,
    "SIGNALING": _GOES_ON,
    "STOPPED": _GOES_ON,
    "COMPLETED": SlurmState(has_ended=True),
    # The statuses that a shell shows for Ctrl-C (130), `timeout` (124) and SIGKILL (137).
    "CANCELLED": SlurmState(has_ended=True, status=130),
    "TIMEOUT": SlurmState(has_ended=True, looks=_EXTRA_LOOKS, status=124),
    "DEADLINE": SlurmState(has_ended=True, looks=_EXTRA_LOOKS, status=124),
    "OUT_OF_MEMORY": SlurmState(has_ended=True, looks=_EXTRA_LOOKS, status=137),
}


class JobRecord(NamedTuple):
    """SLURM's record of a job, or of one task of its array, as scontrol prints it."""

    state: str
    task: str = ""  # its number in the array; a range such as "3-9%2" for those that wait
    nodes: str = ""
    reason: str = ""
    restarts: int = 0
    exit_code: int = 1
    exit_signal: int = 0  # that ended it

    @classmethod
    def parse(cls, line: str) -> "JobRecord | None":
        """Read one line of ``scontrol show job -o``; None if it holds no job."""
        fields: dict[str, str] = {}
        for word in line.split():
            name, equals, value = word.partition("=")
            if equals:
                fields[name] = value
        # An error's text, or an empty line.
        if "JobState" not in fields:
            return None
        # SLURM writes STATUS:SIGNAL.
        code, _, number = fields.get("ExitCode", "1:0").partition(":")
        return cls(
            state=fields["JobState"],
            task=fields.get("ArrayTaskId", ""),
            nodes=_known(fields.get("NodeList", "")),
            reason=_known(fields.get("Reason", "")),
            restarts=int(fields.get("Restarts", 0)),
            exit_code=int(code),
            exit_signal=int(number or 0),
        )

    @classmethod
    def from_account(cls, line: str) -> "JobRecord | None":
        """Read one line of ``sacct -P``, such as ``7_0|CANCELLED by 0|0:15|n0``."""
        fields = line.split("|")
        if len(fields) != 4 or not fields[1]:
            return None
        number, state, exit_code, nodes = fields
        code, _, killed_by = exit_code.partition(":")
        return cls(
            state=state.split()[0],
            task=number.partition("_")[2],
            nodes=nodes,
            exit_code=int(code),
            exit_signal=int(killed_by or 0),
        )

    @property
    def meaning(self) -> SlurmState:
        """The meaning of its state."""
        return _STATES.get(self.state, _BAD_END)

    @property
    def stands_for_many(self) -> bool:
        """True for the one record that the waiting tasks of an array share."""
        return bool(self.task) and not self.task.isdigit() and not self.meaning.has_ended

    @property
    def status(self) -> int:
        """The exit status that this process takes from it."""
        if self.meaning.status is not None:
            return self.meaning.status
        status = self.exit_code
        if status == 0 and self.exit_signal:
            status = 128 + self.exit_signal
        # A node that failed leaves 0:0 behind, and that is no success.
        if status == 0 and self.meaning is _BAD_END:
            return 1
        return status


class FollowedTask:
    """A job, or one task of its array, as its follower has seen it so far."""

    def __init__(self, name: str, run_dir: RunDir, output: GrowingOutput):
        self.name = name
        self.output = output
        self.status = 0  # of the latest record
        self._run_dir = run_dir
        self._state = ""
        self._looks = 0  # how often the present state has been seen again
        self._restarts = 0

    @property
    def has_ended(self) -> bool:
        """True once it is sure that nothing more happens."""
        meaning = _STATES.get(self._state, _BAD_END)
        return meaning.has_ended and self._looks >= meaning.looks

    def see(self, record: JobRecord) -> None:
        """Note a record, and print its changes since the one before."""
        if record.state == self._state:
            self._looks += 1
        else:
            self._state = record.state
            self._looks = 0
            line = f"job {self.name}: {self._state}"
            if record.nodes:
                line += f" on {record.nodes}"
            if record.reason:
                line += f" ({record.reason})"
            print(line, flush=True)
        # Requeued: the attempt's workers report afresh, and old failures must not be blamed.
        if record.restarts > self._restarts:
            self._restarts = record.restarts
            self._remove_reports()
            print(f"job {self.name}: requeued; it goes on from its last checkpoint", flush=True)
        self.status = record.status

    def forget(self) -> None:
        """Note that SLURM has forgotten it: its last state counts at once, if it was an end."""
        self._looks = max(self._looks, _EXTRA_LOOKS)

    def _remove_reports(self) -> None:
        """Remove reports of an earlier attempt's workers, which would mislead about this one."""
        reports = [path for _, path in self._run_dir.all_progress()]
        reports += [path for _, path in self._run_dir.all_failures()]
        # The meeting point, too: rank 0 of the new attempt is somewhere else.
        for path in [*reports, self._run_dir.rendezvous]:
            path.unlink(missing_ok=True)


class SlurmFollower:
    """Submits a batch script and follows its job."""

    def __init__(self, script: Path, poll_s: float, options: Sequence[str] = ()):
        self.script = script
        self.poll_s = poll_s
        self.run_dir = RunDir(script.parent)
        self.job = ""  # its number, once it is submitted
        # By the task's number in the array. A job without an array has a single task, "".
        self.tasks: dict[str, FollowedTask] = {}
        # Signals not answered yet. The handler appends to it; the loop of ``run`` empties it.
        self.signals: list[int] = []
        self._options = options  # of sbatch
        # Tells SLURM's commands where the job is, if there are several clusters.
        self._cluster: tuple[str, ...] = ()
        self._unknown_looks = 0  # how often in turn the controller did not know the job

    def run(self) -> int:
        """Submit the script, follow the job to its end, and return the exit status."""
        # Before sbatch runs: a signal that comes meanwhile waits until the job has a number.
        # Handlers only append. The loop calls scancel, which takes time.
        for caught in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(caught, lambda number, frame: self.signals.append(number))
        self.job = self._submit()
        print(f"submitted job {self.job}; its output is kept in {self.run_dir.path}", flush=True)
        answered_at = time.monotonic()
        while True:
            self._answer_signals()
            records = self._records()
            if records:
                answered_at = time.monotonic()
                self._unknown_looks = 0
            elif self._unknown_looks >= _UNKNOWN_LOOKS:
                # SLURM forgets a job some minutes after its end, while this process was stopped, or
                # when the controller has lost its state.
                records = self._recorded_ends()
                if not records:
                    return self._finish_forgotten()
            self._note(records)
            # Without records there may be no tasks yet, and `all` of nothing is true.
            if records and self._all_have_ended(records):
                return self._finish()
            # The controller is away. The job is not cancelled: it may be doing well.
            if time.monotonic() - answered_at > _SILENT_S:
                _print_error(
                    f"job {self.job}: SLURM has not answered for {_SILENT_S:.0f} s;"
                    " the job may run on"
                )
                return 1
            time.sleep(self.poll_s)

    def _note(self, records: list[JobRecord]) -> None:
        """Note the records of a look, and show the output since the last one."""
        # Waiting tasks of an array share one record. They become tasks of ours when they start.
        for record in records:
            if not record.stands_for_many:
                self._task(record.task).see(record)
        present = {record.task for record in records}
        for number, task in self.tasks.items():
            if records and number not in present:
                task.forget()
            task.output.show(whole_lines=True)

    def _all_have_ended(self, records: list[JobRecord]) -> bool:
        some_wait = any(record.stands_for_many for record in records)
        return not some_wait and all(task.has_ended for task in self.tasks.values())

    def _task(self, number: str) -> FollowedTask:
        """Return the task of this number in the array, new if it has not been seen before."""
        if number not in self.tasks:
            name = self.job
            run_dir = self.run_dir
            prefix = ""  # of a job without an array
            if number:
                name = f"{self.job}_{number}"
                run_dir = RunDir(self.run_dir.array_task(number))
                prefix = f"[{number}] "
            output = GrowingOutput(self.run_dir.slurm_output(name), prefix)
            self.tasks[number] = FollowedTask(name, run_dir, output)
        return self.tasks[number]

    def _finish(self) -> int:
        """Show the last output, and return the status of the first task that failed."""
        time.sleep(_LAST_OUTPUT_S)
        for task in self.tasks.values():
            task.output.show(whole_lines=False)
        failed = [task for task in self.tasks.values() if task.status]
        # Only for arrays: the single task of a job without one has the number "".
        if all(number.isdigit() for number in self.tasks):
            ended_well = len(self.tasks) - len(failed)
            print(f"job {self.job}: {ended_well} of {len(self.tasks)} tasks ended well", flush=True)
        return failed[0].status if failed else 0

    def _finish_forgotten(self) -> int:
        """End without SLURM's word on how the job has ended."""
        for task in self.tasks.values():
            task.forget()
            task.output.show(whole_lines=False)
        if self.tasks and all(task.has_ended for task in self.tasks.values()):
            return self._finish()
        _print_error(
            f"job {self.job}: SLURM does not know it any more, and keeps no account of it"
            f" (squeue, sacct); how it has ended is in its output, in {self.run_dir.path}"
        )
        return 1

    # SLURM's commands.

    def _submit(self) -> str:
        """Submit the script and return the job's number. Exits with a message if it is refused."""
        env = os.environ.copy()
        env.pop("SCALETRAIN_LAUNCH", None)  # the job is not part of this launch on this host
        sbatch = ["sbatch", "--parsable", *self._options, str(self.script)]
        try:
            done = subprocess.run(sbatch, env=env, capture_output=True, text=True)
        except FileNotFoundError:
            _print_error(
                "scaletrain: error: launcher: sbatch was not found; run this on a login node of the"
                " cluster (--dry-run shows the batch script)"
            )
            sys.exit(2)
        if done.returncode:
            _print_error(f"scaletrain: error: launcher: {done.stderr.strip()}")
            _print_error(
                "scaletrain: does `sinfo` answer here?"
                " It shows the partitions that a job may ask for"
            )
            sys.exit(2)
        # NUMBER[;CLUSTER] stands last. A site's plug-ins may print before it, such as a balance.
        *others, last = done.stdout.strip().splitlines() or [""]
        match = re.fullmatch(r"(\d+)(?:;(\S+))?", last.strip())
        for line in [*others, *done.stderr.splitlines()]:
            print(f"sbatch: {line}", flush=True)
        if not match:
            _print_error(
                f"scaletrain: error: launcher: sbatch answered {last!r} in place of a job's number;"
                " squeue shows whether there is a job"
            )
            sys.exit(1)
        if match[2]:
            self._cluster = (f"--clusters={match[2]}",)
        return match[1]

    def _records(self) -> list[JobRecord]:
        """Return SLURM's records: one, or one for each task of an array.

        There are none while the controller does not answer.
        """
        show = ["scontrol", *self._cluster, "show", "job", "-o", self.job]
        try:
            done = subprocess.run(show, capture_output=True, text=True, timeout=_ANSWER_S)
        # A busy controller. `run` counts how long it stays silent.
        except subprocess.TimeoutExpired:
            return []
        if "Invalid job id" in done.stderr:
            self._unknown_looks += 1
        records = [JobRecord.parse(line) for line in done.stdout.splitlines()]
        return [record for record in records if record]

    def _recorded_ends(self) -> list[JobRecord]:
        """Return the ends that SLURM's accounting holds, if the cluster keeps one."""
        fields = "--format=JobID,State,ExitCode,NodeList"
        sacct = ["sacct", *self._cluster, "-X", "-P", "--noheader", fields, f"--jobs={self.job}"]
        try:
            done = subprocess.run(sacct, capture_output=True, text=True, timeout=_ANSWER_S)
        except (OSError, subprocess.TimeoutExpired):
            return []
        records = []
        for line in done.stdout.splitlines():
            record = JobRecord.from_account(line)
            if record and record.meaning.has_ended:
                records.append(record)
        return records

    def _answer_signals(self) -> None:
        for number in self.signals:
            argv = ["scancel", *self._cluster, self.job]
            # Passed on as it is: training then writes a checkpoint and stops.
            if number == signal.SIGUSR1:
                argv.insert(1, "--signal=USR1")
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(argv, timeout=_ANSWER_S)
        self.signals.clear()


def _known(value: str) -> str:
    """Return a field's value, empty where SLURM writes that it has none."""
    return "" if value in ("None", "(null)") else value


def _print_error(line: str) -> None:
    print(line, file=sys.stderr)


if __name__ == "__main__":
    poll_s = float(sys.argv[2]) if len(sys.argv) > 2 else 1.0
    sys.exit(SlurmFollower(Path(sys.argv[1]), poll_s, sys.argv[3:]).run())
