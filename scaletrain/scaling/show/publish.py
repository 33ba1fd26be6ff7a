"""What a report becomes: report.json, the terminal's table, report.html, and exports for papers and spreadsheets."""

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from scaletrain.errors import UserError, unknown
from scaletrain.run.atomic import write_json
from scaletrain.run.environment import environment
from scaletrain.run.layout import RunDir
from scaletrain.scaling.explain import compare, report
from scaletrain.scaling.measure import sweep
from scaletrain.scaling.model import Report
from scaletrain.scaling.predict import simulate
from scaletrain.scaling.predict.fit import FAR
from scaletrain.scaling.show import plots, render, table
from scaletrain.scaling.show import trace as traces

FORMATS = ("html", "md", "csv", "svg", "png")


def terminal() -> Console:
    """Where tables go. A pipe has no width: lines are then as long as the table needs."""
    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 150))


def publish_sweep(
    out: Path,
    *,
    trace: bool = False,
    formats: Sequence[str] = ("html",),
    console: Console | None = None,
) -> Report:
    """Read a sweep's directory and write its report beside it."""
    made = report.of_sweep(out)
    publish(made, out, formats=formats, console=console)
    if trace:
        write_traces(out)
    return made


def publish(
    made: Report,
    out: Path,
    *,
    formats: Sequence[str] = ("html",),
    console: Console | None = None,
) -> None:
    """Write ``report.json`` and the wanted formats to ``out``; print the table when there is a console."""
    for form in formats:
        if form not in FORMATS:
            raise unknown("--format", form, FORMATS)
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "report.json"]
    write_json(written[0], made.to_json())
    for form, rendered in (("html", render.html), ("md", render.markdown)):
        if form in formats:
            written.append(out / f"report.{form}")
            written[-1].write_text(rendered(made), encoding="utf-8")
    if "csv" in formats:
        written.append(out / "report.csv")
        _write_csv(written[-1], [row.to_json() for row in made.rows])
    for form in ("svg", "png"):
        if form in formats:
            for name, image in render.images(made, form).items():
                written.append(out / f"{name}.{form}")
                written[-1].write_bytes(image)
    if console:
        table.show(made, console)
        console.print(f"written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)


def _write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a row; lists and mappings become JSON text."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        for row in rows:
            writer.writerow(
                {k: json.dumps(v) if isinstance(v, list | dict) else v for k, v in row.items()}
            )


def write_traces(out: Path) -> list[Path]:
    """A Chrome trace of the first finished repeat of every cell: OUT/traces/<cell>.json."""
    made = sweep.read(out)
    written = []
    (out / "traces").mkdir(exist_ok=True)
    for cell in made.cells():
        done = [
            d
            for d in (sweep.run_dir(out, cell, repeat) for repeat in range(made.repeats))
            if RunDir(d).has_finished()
        ]
        if done:
            path = out / "traces" / f"{cell.name}.json"
            traces.write(done[0], path)
            written.append(path)
    return written


def read_report(path: Path) -> Report:
    """Read a ``report.json``.

    Raises:
        UserError: the file is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{path}: not JSON") from None
    if not isinstance(value, dict) or "rows" not in value or "header" not in value:
        raise UserError(f"{path}: not a scaling report (no rows and header)")
    try:
        return Report.from_json(value)
    except (KeyError, TypeError):
        raise UserError(f"{path}: not a scaling report") from None


def compare_and_exit(new: Path, old: Path) -> None:
    """Print how every cell changed; leave with status 2 when a slowdown is beyond its interval."""
    reports = read_report(new), read_report(old)
    changes = compare.compare(*reports)
    if unlike := compare.differences(*reports):
        click.echo(unlike)
    for line in compare.lines(changes):
        click.echo(line)
    if any(change.regressed for change in changes):
        sys.exit(2)


def show_simulation(
    job: simulate.SimulatedJob,
    points: Sequence[simulate.Point],
    console: Console,
    asked: Sequence[int],
) -> None:
    """A table of speed-ups (columns: worker counts), the best strategy of each marked, and its price. ``asked``: for which counts."""
    counts = sorted({p.workers for p in points})
    names = list(dict.fromkeys(p.strategy for p in points))
    fastest, best = simulate.fastest(points), simulate.best(points)
    grid = Table(
        title=f"predicted speed-up, {job.mode} scaling, {job.num_bytes / 1e6:,.1f} MB a step, batch {job.batch_size}"
    )
    grid.add_column("strategy")
    for count in counts:
        grid.add_column(str(count), justify="right")
    by = {(p.strategy, p.workers): p for p in points}
    for name in names:
        cells = [by[name, count] for count in counts]
        marked = [
            p in fastest[p.workers] and p.workers > 1 and len(fastest[p.workers]) < len(names)
            for p in cells
        ]
        grid.add_row(
            name,
            *(
                f"[bold]{p.speedup:.1f}*[/bold]" if m else f"{p.speedup:.1f}"
                for p, m in zip(cells, marked, strict=True)
            ),
        )
    console.print(grid)
    if left_out := sorted(set(asked) - set(counts)):
        console.print(
            f"left out: {', '.join(map(str, left_out))} workers cannot share a batch of {job.batch_size} (a larger --batch, or --mode weak)",
            highlight=False,
        )
    console.print(f"network: {job.network.source}", highlight=False, markup=False)
    if job.price_per_worker_hour is not None:
        console.print(
            f"an epoch is {job.epoch_samples:,} samples (--epoch-samples)", highlight=False
        )
    if any(p.machines > p.workers for p in points):
        price = "; prices count them" if job.price_per_worker_hour is not None else ""
        console.print(
            f"server and server:K take 1 and K machines beside the workers, +N takes N backup workers{price}",
            highlight=False,
        )
    for count in counts:
        p, equal = best[count], fastest[count]
        alike = (
            "all alike" if len(equal) == len(names) > 1 else " or ".join(q.strategy for q in equal)
        )
        alike = alike if count > 1 else "nothing to exchange"
        more = f" ({p.machines} machines)" if p.machines > p.workers else ""
        price = f", {p.cost_per_epoch:,.2f} an epoch" if p.cost_per_epoch is not None else ""
        # More machines than workers may be a poor bargain: what the workers alone can do stands beside it.
        own = min(
            (q for q in points if q.workers == count == q.machines),
            key=lambda q: q.step_s,
            default=None,
        )
        without = (
            f"; without more machines {own.strategy}, {1e3 * own.step_s:.2f} ms"
            if own and more
            else ""
        )
        console.print(
            f"{count:>5} worker{'s' * (count > 1)}: {alike}{more}, {1e3 * p.step_s:.2f} ms a step,"
            f" efficiency {p.efficiency:.2f}{price}{without}",
            highlight=False,
        )


def write_simulation(
    out: Path, job: simulate.SimulatedJob, points: Sequence[simulate.Point], measured: int | None
) -> None:
    """simulation.json, .csv, .svg and .png. Beyond what was ``measured`` (times ``fit.FAR``) lines are dashed."""
    out.mkdir(parents=True, exist_ok=True)
    rows = simulate.as_rows(points)
    network = {"network": job.network.network._asdict(), "source": job.network.source}
    write_json(
        out / "simulation.json",
        {"header": {**environment(), "job": job._asdict() | {"network": network}}, "rows": rows},
    )
    _write_csv(out / "simulation.csv", rows)
    reach = None if measured is None else measured * FAR
    for form in ("svg", "png"):
        (out / f"simulation.{form}").write_bytes(
            plots.image(plots.simulation(points, reach), form, watermark="PREDICTED")
        )
