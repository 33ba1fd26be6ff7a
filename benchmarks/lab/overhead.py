"""What our training step costs beside a bare DDP loop: ``benchmarks/results/overhead.md``."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import click
import yaml

from benchmarks.lab import commands, pages
from scaletrain.run.environment import environment
from scaletrain.scaling.measure import intervals

RANK = "benchmarks/suites/overhead_rank.py"
BLOCK = 20  # steps, as in RANK
TARGET = 0.005  # of a step of 25 ms
# Always on: records, a schedule with warm-up, a check of the loss, progress, looks for a signal.
MLP = {"model": {"name": "mlp", "sizes": [64, 128, 10]}, "batch_size": 64}
CNN = {"model": {"name": "digits_cnn", "width": 64}, "batch_size": 96}
# Everything that watches over a run or keeps it.
WATCHED = {
    "precision": "bf16",
    "nonfinite": "skip",
    "callbacks": [{"name": "clip", "norm": 1.0}, {"name": "drift", "every": 100}],
    "checkpoint": {"every_steps": 100},
}
JOBS = {
    "mlp": MLP,
    "mlp, watched": MLP | WATCHED,
    "cnn": CNN,
    "cnn, watched": CNN | WATCHED,
}
COMMON = {
    "data": "digits",
    "optimizer": {"name": "sgd", "lr": 0.01, "momentum": 0.9},
    "lr_schedule": {"name": "cosine", "warmup_steps": 10},
    "exchange": "native",
}


class Row(NamedTuple):
    """One job on a number of workers; rank 0's blocks, paired."""

    job: str
    workers: int
    blocks: int
    bare_ms: float
    ours_ms: float
    extra_ms: float
    extra_ci95_ms: float

    @property
    def share(self) -> float:
        """The extra time as a part of a bare step."""
        return self.extra_ms / self.bare_ms

    @property
    def of_25_ms(self) -> float:
        """The extra time as a part of a step of 25 ms."""
        return self.extra_ms / 25

    @property
    def verdict(self) -> str:
        """Whether the whole interval is on one side of the target."""
        if self.extra_ms + self.extra_ci95_ms <= 25 * TARGET:
            return "met"
        if self.extra_ms - self.extra_ci95_ms > 25 * TARGET:
            return "MISSED"
        return "not decided by these pairs"


@click.command("overhead")
@click.option("--blocks", default=40, show_default=True, help="Pairs of blocks of 20 steps.")
@pages.out_option("overhead")
def command(blocks: int, out: Path) -> None:
    """Time our step beside a bare DDP loop, in turns, on 1 and 2 workers.

    \b
    Example:
      python -m benchmarks.lab overhead --blocks 10
    """
    header = environment()
    header["load_average"] = os.getloadavg()[1]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (job, keys) in enumerate(JOBS.items()):
            config = Path(folder) / f"job-{number}.yaml"
            steps = (blocks + 2) * BLOCK
            config.write_text(yaml.safe_dump(COMMON | keys | {"steps": steps}), encoding="utf-8")
            for workers in (1, 2):
                row = _measure(job, config, Path(folder) / f"out-{number}-{workers}", workers)
                click.echo(f"{job}, {workers}: {row.extra_ms:.3f} ± {row.extra_ci95_ms:.3f} ms")
                rows.append(row)
    measured = {"environment": header, "rows": [row._asdict() for row in rows]}
    pages.publish(out, "overhead", measured, rows=rows, target=TARGET, block=BLOCK)


def _measure(job: str, config: Path, out: Path, workers: int) -> Row:
    launch = [sys.executable, "-m", "scaletrain.cli", "launch", "-n", str(workers), "--"]
    commands.run([*launch, RANK, str(config), str(out)], RANK, timeout_s=900)
    measured = json.loads((out / "0.json").read_text(encoding="utf-8"))
    pairs = [*zip(measured["ours_s"], measured["bare_s"], strict=True)]
    extra = intervals.mean([1e3 * (ours - bare) for ours, bare in pairs])
    assert extra.ci95 is not None
    return Row(
        job=job,
        workers=workers,
        blocks=len(pairs),
        bare_ms=1e3 * intervals.mean(measured["bare_s"]).value,
        ours_ms=1e3 * intervals.mean(measured["ours_s"]).value,
        extra_ms=extra.value,
        extra_ci95_ms=extra.ci95,
    )
