"""The report as a table on the terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scaletrain.scaling.explain.headline import oversubscribed
from scaletrain.scaling.measure import servers
from scaletrain.scaling.model import Report
from scaletrain.scaling.show.columns import columns_of
from scaletrain.scaling.show.text import UNKNOWN, note, outcome, outlying


def show(report: Report, console: Console) -> None:
    """Print the cells, the lost time by cause, the servers, the failures and the summary."""
    console.print(_cells(report))
    marked = oversubscribed(report)
    if marked:
        console.print(f"* {marked}")
    if report.losses:
        console.print(_losses(report))
    for line in outlying(report):
        console.print(line, highlight=False, markup=False)
    for row in report.rows:
        if row.servers:
            # Without highlight and markup: rich would colour numbers and swallow brackets.
            line = f"{row.label}: {servers.text(row.servers)}"
            console.print(line, highlight=False, markup=False)
    for row in report.rows:
        for reason in dict.fromkeys(row.failures):
            console.print(f"[red]failed[/red] {row.label}: {escape(reason)}", highlight=False)
    console.print(report.summary, highlight=False, markup=False)


def _cells(report: Report) -> Table:
    emulated = " (EMULATED)" if report.header.emulated else ""
    baseline = report.header.baseline or "nothing was measured"
    table = Table(
        title=f"{report.header.mode} scaling{emulated}",
        caption=f"{note(report)} Speed-up over {baseline}.",
    )
    columns = columns_of(report, "terminal")
    for column in columns:
        justify = "left" if column.is_left else "right"
        table.add_column(column.title_in("terminal"), justify=justify)  # type: ignore[arg-type]
    for row in report.rows:
        if row.runs:
            # A hyphen: not every terminal shows the dash.
            cells = [column.text(row).replace(UNKNOWN, "-") for column in columns]
        else:
            cells = [column.text(row) for column in columns if column.is_name]
            cells.append(f"[red]{escape(outcome(row))}[/red]")
        table.add_row(*cells)
    return table


def _losses(report: Report) -> Table:
    # ``limiter.split`` gives every loss the same causes.
    names = list(report.losses[0].causes)
    table = Table(title="lost time, ms a step")
    table.add_column("exchange", justify="left")
    for column in ["workers", "lost", *names]:
        table.add_column(column, justify="right")
    for loss in report.losses:
        causes = [f"{1000 * loss.causes[name]:z.2f}" for name in names]
        table.add_row(loss.exchange, str(loss.workers), f"{1000 * loss.loss_s:.2f}", *causes)
    return table
