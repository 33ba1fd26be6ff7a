"""``scaletrain top``: how each rank of a run is doing, live, from the files of its directory."""

import contextlib
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from scaletrain.errors import UserError

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

    from scaletrain.run.layout import RunDir
    from scaletrain.run.watch import RankStatus


@click.command()
@click.argument("run_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--once", is_flag=True, help="Print one table and end, for scripts.")
@click.option(
    "--every",
    "every_s",
    type=click.FloatRange(min=0.1),
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
def command(run_dir: Path, once: bool, every_s: float) -> None:
    """Show how each rank of the run in RUN_DIR is doing, live.

    Below the table it names who holds up the others: rank, host or link, and why. It reads the
    ends of the run's files, and costs the training nothing. RUN_DIR may lie on a file system that
    another machine trains on. Ctrl-C ends it, and so does the end of the run.

    \b
    Examples:
      scaletrain top runs/digits-20261129-091500
      scaletrain top runs/digits-20261129-091500 --once
    """
    from rich.console import Console
    from rich.live import Live

    from scaletrain.run import watch
    from scaletrain.run.layout import RunDir

    files = RunDir(run_dir)
    # Jobs of `scaletrain launch` have no configuration.
    if not files.config.exists() and not files.all_progress():
        raise UserError(f"{run_dir}: holds no run (allowed: the --run-dir of a run)")
    console = Console()
    if not console.is_terminal:
        console = Console(width=200)  # a pipe has no width: one line a rank
    if once:
        statuses = watch.ranks(files)
        console.print(_view(files, statuses, watch.state(files, statuses)[1]))
        return
    # Ctrl-C is the usual way to leave.
    with contextlib.suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        is_over = False
        while not is_over:
            statuses = watch.ranks(files)
            is_over, words = watch.state(files, statuses)
            live.update(_view(files, statuses, words), refresh=True)
            if not is_over:
                time.sleep(every_s)
    if not console.is_terminal:
        console.print()  # the last table has no end of line there


def _view(files: "RunDir", statuses: "list[RankStatus]", words: str) -> "Group":
    """Return the table of all ranks, and below it who holds up the others."""
    from rich.console import Group
    from rich.text import Text

    from scaletrain.run import watch

    lines = [Text(each.sentence(), style="yellow") for each in watch.culprits(files, statuses)]
    return Group(_table(files, statuses, words), *lines)


def _table(files: "RunDir", statuses: "list[RankStatus]", words: str) -> "Table":
    """Return the table of all ranks, below a line about the run."""
    from rich.table import Table
    from rich.text import Text

    title = Text(f"{files.path.name}: {words}")
    table = Table(title=title, title_justify="left", title_style="bold", box=None)
    table.add_column("rank", justify="right")
    table.add_column("host")
    for name in (
        "step",
        "samples/s",
        "step ms",
        "input",
        "wait",
        "update",
        "memory",
        "GPU",
        "loss",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("last step", justify="right", no_wrap=True)
    table.add_column("")
    num_steps = _num_steps(files)
    for status in statuses:
        table.add_row(*_cells(status, num_steps), style="yellow" if status.holds_up else None)
    return table


def _cells(status: "RankStatus", num_steps: int | None) -> list[str]:
    report = status.report
    step = "-" if report.step is None else f"{report.step:,}"
    if num_steps:
        step += f"/{num_steps:,}"
    age = "-"
    if status.record_age_s is not None and not status.end:
        age = f"{status.record_age_s:.1f} s ago"
    return [
        str(report.rank),
        report.host,
        step,
        _number(status.samples_per_s, "{:,.0f}"),
        _number(status.step_s, "{:,.1f}", 1e3),
        _share(status.input_s, status.step_s),
        _share(status.wait_s, status.step_s),
        _share(status.update_s, status.step_s),
        _number(report.memory_bytes, "{:,.0f} MB", 1e-6),
        _number(report.device_memory_bytes, "{:,.0f} MB", 1e-6),
        _number(status.loss, "{:.4f}"),
        age,
        _remark(status),
    ]


def _number(value: float | None, form: str, factor: float = 1.0) -> str:
    return "-" if value is None else form.format(value * factor)


def _share(part_s: float | None, step_s: float | None) -> str:
    """Return a part of a step in percent."""
    return "-" if part_s is None or not step_s else f"{part_s / step_s:.0%}"


def _remark(status: "RankStatus") -> str:
    """Return a remark on a rank that is special, in a few words."""
    report = status.report
    if status.end:
        return status.end
    remarks = []
    if status.num_behind > 1:
        remarks.append(f"{status.num_behind:,} steps behind")
    if status.holds_up:
        remarks.append("the others wait for it")
    # A collective under way is normal while training.
    if report.waiting_for and status.silent_s > 1:
        remarks.append(f"waits for {report.waiting_for}")
    elif report.doing != "step":
        remarks.append(report.doing)
    return ", ".join(remarks)


def _num_steps(files: "RunDir") -> int | None:
    """Return the length of the run; None if no worker has said it yet."""
    try:
        header = json.loads(files.header(0).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    num_steps: int | None = header.get("num_steps")
    return num_steps
