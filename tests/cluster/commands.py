"""Running ``scaletrain`` as a person does, for the tests of launchers."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]
DIGITS = str(ROOT / "examples" / "digits.yaml")
# What a single process reaches on the digits job cut to one epoch; every launcher has to reach it,
# too (fixture `alone`).
SHORT = ("--set", "epochs=1")


def command(*arguments: str, python: str = sys.executable) -> list[str]:
    return [python, "-m", "scaletrain.cli", *arguments]


def scaletrain(
    *arguments: str,
    python: str = sys.executable,
    env: Mapping[str, str] | None = None,
    timeout: float = 90,
) -> subprocess.CompletedProcess[str]:
    """One command, to its end. Variables of the launcher that runs the tests (a CI job under SLURM,
    say) do not leak in.
    """
    return subprocess.run(
        command(*arguments, python=python),
        env=clean(env),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def clean(env: Mapping[str, str] | None = None) -> dict[str, str]:
    prefixes = ("SLURM_", "OMPI_COMM", "PMI_", "PMIX_", "HOROVOD_", "SCALETRAIN_LAUNCH")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(prefixes) and key not in names
    }
    return kept | dict(env or {})


def train(run_dir: Path, *arguments: str, config: str = DIGITS, **options) -> dict:
    """Train a job; returns its summary. Fails with the whole output."""
    done = scaletrain("train", config, "--run-dir", str(run_dir), *arguments, **options)
    assert done.returncode == 0, f"status {done.returncode}\n{done.stdout}\n{done.stderr}"
    return summary(run_dir)


def summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def step_of(run_dir: Path, rank: int = 0) -> int:
    """How many steps a rank has reported; -1 before the first."""
    try:
        step = json.loads((run_dir / f"progress-{rank}.json").read_text())["step"]
    except (OSError, ValueError):
        return -1
    return -1 if step is None else step


def until(condition: Callable[[], bool], what: str, timeout_s: float = 40) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s: {what}"
        time.sleep(0.1)


def gone(run_dir: Path) -> bool:
    """Whether no process has this run directory in its command line any more."""
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            text = Path(f"/proc/{entry}/cmdline").read_bytes()
        except OSError:
            continue
        if str(run_dir).encode() in text and int(entry) != os.getpid():
            return False
    return True
