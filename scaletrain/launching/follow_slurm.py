"""Submits a batch script and follows the job to its end: ``python -m scaletrain.launching.follow_slurm SCRIPT [POLL_S]``.

Shows the job's states and output. SIGINT and SIGTERM cancel the job; SIGUSR1 goes to its tasks. Ends with the job's own status.
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


class Follower:
    def __init__(self, script: Path, poll_s: float):
        self.script, self.poll_s = script, poll_s
        self.run_dir = script.parent
        self.job = ""
        self.shown = 0  # bytes of the output
        self.signals: list[int] = []

    def run(self) -> int:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda heard, frame: self.signals.append(heard))
        self.job = self._submit()
        print(f"submitted job {self.job}; its output: {self.run_dir}/slurm-{self.job}.out", flush=True)
        state, restarts, ended, heard = "", 0, 0, time.monotonic()
        while True:
            self._answer_signals()
            facts = self._facts()
            self._show_output()
            if facts:
                heard = time.monotonic()
                if facts["JobState"] != state:
                    state = facts["JobState"]
                    where = f" on {facts['NodeList']}" if facts.get("NodeList") not in (None, "(null)", "") else ""
                    why = f" ({facts['Reason']})" if facts.get("Reason") not in (None, "None") else ""
                    print(f"job {self.job}: {state}{where}{why}", flush=True)
                if int(facts.get("Restarts", 0)) > restarts:
                    restarts = int(facts["Restarts"])
                    self._forget()
                    print(f"job {self.job}: requeued; it goes on from its last checkpoint", flush=True)
            ended = ended + 1 if facts and state not in _RUNS_ON else 0
            if facts and ended > (0 if state in ("COMPLETED", "CANCELLED") else _SURE):
                time.sleep(0.2)
                self._show_output()
                return self._status(state, facts)
            if time.monotonic() - heard > _SILENT_S:
                print(
                    f"job {self.job}: SLURM has not answered for {_SILENT_S:.0f} s; the job may run on", file=sys.stderr
                )
                return 1
            time.sleep(self.poll_s)

    def _submit(self) -> str:
        env = {key: value for key, value in os.environ.items() if key != "SCALETRAIN_LAUNCH"}
        try:
            done = subprocess.run(["sbatch", "--parsable", str(self.script)], env=env, capture_output=True, text=True)
        except FileNotFoundError:
            print("scaletrain: error: launcher: sbatch is not there; this host is no SLURM login node", file=sys.stderr)
            sys.exit(2)
        if done.returncode:
            print(f"scaletrain: error: launcher: {done.stderr.strip()}", file=sys.stderr)
            sys.exit(2)
        return done.stdout.strip().split(";")[0]

    def _facts(self) -> dict[str, str] | None:
        """The job's record; ``None`` while the controller does not answer."""
        try:
            done = subprocess.run(
                ["scontrol", "show", "job", "-o", self.job], capture_output=True, text=True, timeout=30
            )
        except subprocess.TimeoutExpired:
            return None
        fields = dict(field.split("=", 1) for field in done.stdout.split() if "=" in field)
        return fields if "JobState" in fields else None

    def _answer_signals(self) -> None:
        for number in self.signals:
            arguments = ["--signal=USR1"] if number == signal.SIGUSR1 else []
            with contextlib.suppress(subprocess.TimeoutExpired):
                subprocess.run(["scancel", *arguments, self.job], timeout=20)
        self.signals.clear()

    def _show_output(self) -> None:
        with contextlib.suppress(OSError), open(self.run_dir / f"slurm-{self.job}.out", "rb") as file:
            file.seek(self.shown)
            data = file.read()
            self.shown += len(data)
            sys.stdout.buffer.write(data)
            sys.stdout.flush()

    def _forget(self) -> None:
        """What the workers of an earlier attempt reported is no concern of this one."""
        for pattern in ("progress-*.json", "failure-*.json", "rendezvous.json"):
            for path in self.run_dir.glob(pattern):
                path.unlink(missing_ok=True)

    def _status(self, state: str, facts: dict[str, str]) -> int:
        if state in STATUS:
            return STATUS[state]
        code, _, number = facts.get("ExitCode", "1:0").partition(":")
        status = int(code) or (128 + int(number) if int(number or 0) else 0)
        return status if state == "COMPLETED" else status or 1


if __name__ == "__main__":
    sys.exit(Follower(Path(sys.argv[1]), float(sys.argv[2]) if len(sys.argv) > 2 else 1.0).run())
