"""How long workers take to their first step: ``benchmarks/results/start.md``."""

import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import click

from benchmarks.lab import commands, pages
from scaletrain.cli.options import numbers
from scaletrain.errors import UserError
from scaletrain.run.environment import environment

RANK = "benchmarks/suites/start_rank.py"
TARGET = 1.3  # times the start of one worker, for the most workers
WARM, COLD, TORCHRUN = "warm", "cold", "torchrun"


class Start(NamedTuple):
    """One start of a number of workers."""

    way: str
    workers: int
    first_step_s: float  # from the command to the end of the slowest rank's first step
    cpu_s: float  # processor time of the whole command


class Row(NamedTuple):
    """The starts of one number of workers in one way."""

    way: str
    workers: int
    starts: int
    median_s: float
    least_s: float
    most_s: float
    cpu_s: float  # the median


@click.command("start")
@click.option(
    "--workers", default="1,2,4,8", show_default=True, callback=numbers, help="Worker counts."
)
@click.option("--repeats", default=5, show_default=True, help="Starts of each kind, interleaved.")
@pages.out_option("start")
def command(workers: tuple[int, ...], repeats: int, out: Path) -> None:
    """Time from the command to the first step: warm, cold, and under torchrun.

    \b
    Example:
      python -m benchmarks.lab start --workers 1,2 --repeats 2
    """
    header = environment()
    header["load_average"] = os.getloadavg()[1]
    starts = []
    for repeat in range(repeats):
        for count in workers:
            ways = [WARM, COLD, TORCHRUN]
            # Turned round each time: a machine that drifts favours none.
            for way in ways if repeat % 2 == 0 else reversed(ways):
                start = _start(way, count)
                starts.append(start)
                click.echo(
                    f"[{repeat + 1}/{repeats}] {way}, {count}: {start.first_step_s:.2f} s,"
                    f" processor time {start.cpu_s:.1f} s"
                )
    rows = _rows(starts, workers)
    measured = {"environment": header, "starts": [start._asdict() for start in starts]}
    ratio = _ratio(rows, workers)
    pages.publish(out, "start", measured, rows=rows, most=max(workers), ratio=ratio, target=TARGET)


def _start(way: str, workers: int) -> Start:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        out.mkdir()
        cpu_before_s = _cpu_s()
        began = time.time()
        argv = [*_command(way, workers, Path(folder) / "run"), RANK, str(out)]
        commands.run(argv, RANK, timeout_s=300)
        ended = [float(path.read_text(encoding="utf-8")) for path in out.iterdir()]
        if len(ended) != workers:
            raise UserError(f"{RANK}: {len(ended)} of {workers} ranks have made a step")
        return Start(way, workers, max(ended) - began, _cpu_s() - cpu_before_s)


def _command(way: str, workers: int, run_dir: Path) -> list[str]:
    if way == TORCHRUN:
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        return [*torchrun, "--standalone", "--nproc-per-node", str(workers)]
    launch = [sys.executable, "-m", "scaletrain.cli", "launch", "-n", str(workers)]
    if way == COLD:
        launch.append("--cold")
    return [*launch, "--run-dir", str(run_dir), "--"]


def _cpu_s() -> float:
    """Return the processor time of all descendants that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _rows(starts: list[Start], workers: tuple[int, ...]) -> list[Row]:
    rows = []
    for count in workers:
        for way in (WARM, COLD, TORCHRUN):
            of_row = [start for start in starts if (start.way, start.workers) == (way, count)]
            seconds = [start.first_step_s for start in of_row]
            rows.append(
                Row(
                    way=way,
                    workers=count,
                    starts=len(of_row),
                    median_s=statistics.median(seconds),
                    least_s=min(seconds),
                    most_s=max(seconds),
                    cpu_s=statistics.median(start.cpu_s for start in of_row),
                )
            )
    return rows


def _ratio(rows: list[Row], workers: tuple[int, ...]) -> float | None:
    """Return the warm start of the most workers over that of one; None if one was not measured."""
    seconds = {row.workers: row.median_s for row in rows if row.way == WARM}
    return seconds[max(workers)] / seconds[1] if 1 in seconds else None
