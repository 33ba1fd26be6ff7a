"""Submits a batch script and follows the job to its end: ``python -m scaletrain.programs.follow_slurm SCRIPT [POLL_S]``.

Shows the states and output of the job, or of each task of its array. SIGINT and SIGTERM cancel it; SIGUSR1 goes to its tasks. Ends with
the job's own status.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

# How a job that did not end by itself ends this process.
STATUS = {"CANCELLED": 130, "TIMEOUT": 124, "OUT_OF_MEMORY": 137, "DEADLINE": 124}
_RUNS_ON = {
    "PENDING",
    "CONFIGURING",
    "RUNNING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "REQUEUE_HOLD",
    "RESIZING",
    "SIGNALING",
    "STOPPED",
}
_SURE = 2  # further looks at a bad end: a job that is being requeued shows one for a moment
_SILENT_S = 120.0  # how long the controller may be away: a job goes on without it


class _Task:
    """What has been seen of a job; of an array's tasks, each is one."""

    def __init__(self, name: str, run_dir: Path, output: Path, prefix: bytes):
        self.name, self.run_dir, self.output = name, run_dir, output
        self.state, self.status = "", 0
        self._prefix, self._shown, self._restarts, self._looks = prefix, 0, 0, 0

    @property
    def ended(self) -> bool:
        sure = 0 if self.state in ("COMPLETED", "CANCELLED") else _SURE
        return self.state not in _RUNS_ON and self._looks >= sure

    def see(self, record: dict[str, str]) -> None:
        """Note, and say, what has changed in SLURM's record of it."""
        if record["JobState"] != self.state:
            self.state, self._looks = record["JobState"], 0
            where = (
                f" on {record['NodeList']}"
                if record.get("NodeList") not in (None, "(null)", "")
                else ""
            )
            why = f" ({record['Reason']})" if record.get("Reason") not in (None, "None") else ""
            print(f"job {self.name}: {self.state}{where}{why}", flush=True)
        else:
            self._looks += 1
        if int(record.get("Restarts", 0)) > self._restarts:
            self._restarts = int(record["Restarts"])
            self._forget()
            print(f"job {self.name}: requeued; it goes on from its last checkpoint", flush=True)
        self.status = _status(self.state, record)

    def show_output(self, whole_lines: bool) -> None:
        """Show what it wrote in the meantime."""
        with contextlib.suppress(OSError), open(self.output, "rb") as file:
            file.seek(self._shown)
            data = file.read()
            if self._prefix and whole_lines:
                data = data[: data.rfind(b"\n") + 1]
            self._shown += len(data)
            sys.stdout.buffer.write(
                b"".join(self._prefix + line for line in data.splitlines(keepends=True))
            )
            sys.stdout.flush()

    def _forget(self) -> None:
        """What the workers of an earlier attempt reported is no concern of this one."""
        for pattern in ("progress-*.json", "failure-*.json", "rendezvous.json"):
            for path in self.run_dir.glob(pattern):
                path.unlink(missing_ok=True)


class Follower:
    def __init__(self, script: Path, poll_s: float):
        self.script, self.poll_s = script, poll_s
        self.run_dir = script.parent
        self.job = ""
        self.tasks: dict[
            str, _Task
        ] = {}  # by its number in the array; a job without one has a single task, ""
        self.signals: list[int] = []

    def run(self) -> int:
        for caught in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(caught, lambda heard, frame: self.signals.append(heard))
        self.job = self._submit()
        print(f"submitted job {self.job}; its output is kept in {self.run_dir}", flush=True)
        heard = time.monotonic()
        while True:
            self._answer_signals()
            records = self._records()
            waiting = False
            for record in records:
                heard = time.monotonic()
                number = record.get("ArrayTaskId", "")
                if number.isdigit() or not number or record["JobState"] not in _RUNS_ON:
                    self._task(number).see(record)
                else:  # the tasks of an array that have not started share one record
                    waiting = True
            for task in self.tasks.values():
                task.show_output(whole_lines=True)
            if records and not waiting and all(task.ended for task in self.tasks.values()):
                return self._end()
            if time.monotonic() - heard > _SILENT_S:
                print(
                    f"job {self.job}: SLURM has not answered for {_SILENT_S:.0f} s; the job may run on",
                    file=sys.stderr,
                )
                return 1
            time.sleep(self.poll_s)

    def _task(self, number: str) -> _Task:
        if number not in self.tasks:
            name = f"{self.job}_{number}" if number else self.job
            run_dir = self.run_dir / f"task-{number}" if number else self.run_dir
            prefix = f"[{number}] ".encode() if number else b""
            self.tasks[number] = _Task(name, run_dir, self.run_dir / f"slurm-{name}.out", prefix)
        return self.tasks[number]

    def _end(self) -> int:
        """Show the last output; the status is that of the first task that failed."""
        time.sleep(0.2)
        for task in self.tasks.values():
            task.show_output(whole_lines=False)
        failed = [task for task in self.tasks.values() if task.status]
        if all(number.isdigit() for number in self.tasks):
            print(
                f"job {self.job}: {len(self.tasks) - len(failed)} of {len(self.tasks)} tasks ended well",
                flush=True,
            )
        return failed[0].status if failed else 0

    def _submit(self) -> str:
        env = {key: value for key, value in os.environ.items() if key != "SCALETRAIN_LAUNCH"}
        try:
            done = subprocess.run(
                ["sbatch", "--parsable", str(self.script)], env=env, capture_output=True, text=True
            )
        except FileNotFoundError:
            print(
                "scaletrain: error: launcher: sbatch was not found; run this on a login node of the"
                " cluster (--dry-run shows the batch script)",
                file=sys.stderr,
            )
            sys.exit(2)
        if done.returncode:
            print(f"scaletrain: error: launcher: {done.stderr.strip()}", file=sys.stderr)
            print(
                "scaletrain: does `sinfo` answer here? It shows the partitions that a job may ask for",
                file=sys.stderr,
            )
            sys.exit(2)
        return done.stdout.strip().split(";")[0]

    def _records(self) -> list[dict[str, str]]:
        """SLURM's records: one, or one for each task of an array; none while the controller does not answer."""
        try:
            command = ["scontrol", "show", "job", "-o", self.job]
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except subprocess.TimeoutExpired:
            return []
        records = [
            dict(field.split("=", 1) for field in line.split() if "=" in field)
            for line in done.stdout.splitlines()
        ]
        return [record for record in records if "JobState" in record]

    def _answer_signals(self) -> None:
        for number in self.signals:
            arguments = ["--signal=USR1"] if number == signal.SIGUSR1 else []
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(["scancel", *arguments, self.job], timeout=20)
        self.signals.clear()


def _status(state: str, record: dict[str, str]) -> int:
    if state in STATUS:
        return STATUS[state]
    code, _, number = record.get("ExitCode", "1:0").partition(":")
    status = int(code) or (128 + int(number) if int(number or 0) else 0)
    return status if state == "COMPLETED" or state in _RUNS_ON else status or 1


if __name__ == "__main__":
    sys.exit(Follower(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 1.0).run())
