"""Write a report: report.json, the terminal's tables, pages, images and spreadsheets."""

import csv
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import click
from rich.console import Console

from scaletrain.errors import UserError, unknown
from scaletrain.run.atomic import write_json
from scaletrain.run.layout import RunDir
from scaletrain.scaling.explain import compare, report
from scaletrain.scaling.measure import sweep
from scaletrain.scaling.model import Report
from scaletrain.scaling.show import render, table
from scaletrain.scaling.show import trace as traces

FORMATS = ("html", "md", "csv", "svg", "png")
PAGES: dict[str, Callable[[Report], str]] = {"html": render.html, "md": render.markdown}
MIN_COLUMNS = 150  # of a table that is written to a file or a pipe
REGRESSED = 2  # exit status


def terminal() -> Console:
    """Return the console for tables.

    A terminal narrower than a table cuts its cells. In a pipe or a file, which have no width, lines
    are at least ``MIN_COLUMNS`` long.
    """
    console = Console()
    if console.is_terminal:
        return console
    return Console(width=max(console.width, MIN_COLUMNS))


def publish_sweep(directory: Path, *, trace: bool = False, console: Console | None = None) -> None:
    """Read a sweep's directory, and write its report there."""
    publish(report.of_sweep(directory), directory, console=console)
    if trace:
        write_traces(directory)


def publish(
    finished: Report,
    out: Path,
    *,
    formats: Sequence[str] = ("html",),
    console: Console | None = None,
) -> None:
    """Write ``report.json`` and the wanted formats to ``out``; print the table on the console.

    Raises:
        UserError: a format does not exist.
    """
    # Before anything is written.
    for form in formats:
        if form not in FORMATS:
            raise unknown("--format", form, FORMATS)
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "report.json"]
    write_json(written[0], finished.to_json())
    for form, page in PAGES.items():
        if form in formats:
            path = out / f"report.{form}"
            path.write_text(page(finished), encoding="utf-8")
            written.append(path)
    if "csv" in formats:
        path = out / "report.csv"
        write_csv(path, [row.to_json() for row in finished.rows])
        written.append(path)
    for form in ("svg", "png"):
        if form in formats:
            for name, image in render.images(finished, form).items():
                path = out / f"{name}.{form}"
                path.write_bytes(image)
                written.append(path)
    if console:
        table.show(finished, console)
        console.print(f"written: {', '.join(map(str, written))}", highlight=False, soft_wrap=True)


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write one line a row. Lists and mappings become JSON text."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else [])
        writer.writeheader()
        for row in rows:
            writer.writerow({key: _flat(value) for key, value in row.items()})


def _flat(value: object) -> object:
    return json.dumps(value) if isinstance(value, list | dict) else value


def write_traces(out: Path) -> None:
    """Write a Chrome trace of the first finished repeat of every cell: OUT/traces/<cell>.json."""
    plan = sweep.read(out)
    (out / "traces").mkdir(exist_ok=True)
    for cell in plan.cells():
        for repeat in range(plan.repeats):
            directory = sweep.run_dir(out, cell, repeat)
            if RunDir(directory).has_finished():
                traces.write(directory, out / "traces" / f"{cell.name}.json")
                break


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
    """Print how every cell changed; exit with status 2 if one is slower beyond its interval."""
    new_report, old_report = read_report(new), read_report(old)
    changes = compare.compare(new_report, old_report)
    if compare.took_turns(new_report, old_report):
        click.echo(f"in turns with {old_report.header.source}:")
    differences = compare.differences(new_report, old_report)
    if differences:
        click.echo(differences)
    for line in compare.lines(changes):
        click.echo(line)
    if any(change.regressed for change in changes):
        sys.exit(REGRESSED)
