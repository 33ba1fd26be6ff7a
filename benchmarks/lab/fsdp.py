"""FSDP2's step over our backend beside gloo, on CPU: ``benchmarks/results/fsdp.md``."""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import click

from benchmarks.lab import commands, pages
from scaletrain.cli.options import numbers
from scaletrain.run.environment import environment
from scaletrain.scaling.measure import intervals

RANK = "benchmarks/suites/fsdp_rank.py"
MODELS = ("perceptron", "transformer")  # of RANK
TARGET = 1.3  # times as fast as over gloo


class Row(NamedTuple):
    """One model on a number of workers."""

    model: str
    workers: int
    blocks: int  # of each backend
    ours_ms: float  # a step
    gloo_ms: float
    speed: float  # of ours, as a multiple of gloo's
    speed_ci95: float

    @property
    def verdict(self) -> str:
        """Whether the whole interval is on one side of the target."""
        if self.speed - self.speed_ci95 >= TARGET:
            return "met"
        if self.speed + self.speed_ci95 < TARGET:
            return "MISSED"
        return "not decided by these blocks"


@click.command("fsdp")
@click.option("--workers", default="2,4", show_default=True, callback=numbers, help="Ranks.")
@click.option("--blocks", default=20, show_default=True, help="Blocks of 4 steps, in turns.")
@pages.out_option("fsdp")
def command(workers: tuple[int, ...], blocks: int, out: Path) -> None:
    """Time FSDP2's step over the backend scaletrain and over gloo, in turns.

    \b
    Example:
      python -m benchmarks.lab fsdp --workers 2 --blocks 6
    """
    header = environment()
    header["load_average"] = os.getloadavg()[1]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in MODELS:
            for count in workers:
                row = _measure(model, count, blocks, Path(folder) / f"{model}-{count}.json")
                click.echo(f"{model}, {count}: {row.speed:.2f} ± {row.speed_ci95:.2f}")
                rows.append(row)
    measured = {"environment": header, "rows": [row._asdict() for row in rows]}
    pages.publish(out, "fsdp", measured, rows=rows, target=TARGET)


def _measure(model: str, workers: int, blocks: int, out: Path) -> Row:
    launch = [sys.executable, "-m", "scaletrain.cli", "launch", "-n", str(workers), "--"]
    commands.run([*launch, RANK, model, str(blocks), str(out)], RANK, timeout_s=900)
    times = json.loads(out.read_text(encoding="utf-8"))
    ours, gloo = times["scaletrain"], times["gloo"]
    speed = intervals.ratio(gloo, ours)
    assert speed.ci95 is not None
    return Row(
        model=model,
        workers=workers,
        blocks=len(ours),
        ours_ms=1e3 * intervals.typical(ours).value,
        gloo_ms=1e3 * intervals.typical(gloo).value,
        speed=speed.value,
        speed_ci95=speed.ci95,
    )
