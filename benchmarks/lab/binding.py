"""Whether workers that are kept on cores train faster: ``benchmarks/results/binding.md``."""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
import yaml

from benchmarks.lab import commands, pages
from scaletrain.host import cores
from scaletrain.run.environment import environment
from scaletrain.run.layout import RunDir
from scaletrain.scaling.measure import intervals

COMMON = {
    "data": "digits",
    "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
    "threads": 1,
}
# Short steps, which mostly exchange; and long ones, which mostly compute.
JOBS = {
    "mlp": COMMON | {"model": {"name": "mlp", "sizes": [64, 128, 10]}, "batch_size": 64},
    "cnn": COMMON | {"model": {"name": "digits_cnn", "width": 32}, "batch_size": 96},
}
STEPS = {"mlp": 1500, "cnn": 100}
EXCHANGES = ("native", "ring")
_BUSY = "while True: pass"


class Row(NamedTuple):
    """One job on all cores, with a worker on each."""

    job: str
    exchange: str
    busy: int  # other processes that compute
    runs: int  # pairs
    free_samples_per_s: float
    gain: float  # speed when bound, over that when free
    low: float  # of its 95 % interval
    high: float

    @property
    def verdict(self) -> str:
        """Whether the whole interval is on one side of 1."""
        if self.low > 1:
            return "faster when bound"
        if self.high < 1:
            return "slower when bound"
        return "not decided"


@click.command("binding")
@click.option("--repeats", default=10, show_default=True, help="Pairs of runs, in turns.")
@pages.out_option("binding")
def command(repeats: int, out: Path) -> None:
    """Train with a worker on each core, bound and free, alone and beside another process.

    \b
    Example:
      python -m benchmarks.lab binding --repeats 3
    """
    header = environment()
    header["load_average"] = os.getloadavg()[1]
    rows = []
    for job in JOBS:
        for exchange in EXCHANGES:
            for busy in (0, 1):
                row = _measure(job, exchange, busy, repeats)
                rows.append(row)
                click.echo(
                    f"{job}, {exchange}, beside {busy}: {row.gain:.3f}"
                    f" ({row.low:.3f} to {row.high:.3f})"
                )
    measured = {"environment": header, "rows": [row._asdict() for row in rows]}
    pages.publish(out, "binding", measured, rows=rows, workers=cores.count())


def _measure(job: str, exchange: str, busy: int, repeats: int) -> Row:
    free, ratios = [], []
    for repeat in range(repeats):
        speeds = {}
        # Turned round each time: a machine that drifts favours neither.
        for bind in (False, True) if repeat % 2 == 0 else (True, False):
            with _busy(busy):
                speeds[bind] = _samples_per_s(job, exchange, bind)
        free.append(speeds[False])
        ratios.append(math.log(speeds[True] / speeds[False]))
    gain = intervals.mean(ratios)
    return Row(
        job=job,
        exchange=exchange,
        busy=busy,
        runs=repeats,
        free_samples_per_s=intervals.mean(free).value,
        gain=math.exp(gain.value),
        low=math.exp(gain.low),
        high=math.exp(gain.high),
    )


def _samples_per_s(job: str, exchange: str, bind: bool) -> float:
    """Train once, and return the speed of all workers together."""
    with tempfile.TemporaryDirectory() as folder:
        config, run_dir = Path(folder) / "job.yaml", RunDir(Path(folder) / "run")
        run = JOBS[job] | {"exchange": exchange, "steps": STEPS[job]}
        run["launcher"] = {"name": "local", "bind": bind}
        config.write_text(yaml.safe_dump(run), encoding="utf-8")
        train = [sys.executable, "-m", "scaletrain.cli", "train", str(config)]
        options = ["--workers", str(cores.count()), "--run-dir", str(run_dir.path)]
        commands.run([*train, *options], job, timeout_s=600)
        summary = json.loads(run_dir.summary.read_text(encoding="utf-8"))
        return float(summary["samples_per_s"])


@contextlib.contextmanager
def _busy(number: int) -> Iterator[None]:
    """Let other processes compute while the body runs."""
    others = [subprocess.Popen([sys.executable, "-c", _BUSY]) for _ in range(number)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()
