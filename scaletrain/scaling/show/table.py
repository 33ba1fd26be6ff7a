"""The report as a table on the terminal."""

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from scaletrain.scaling.explain.headline import oversubscribed
from scaletrain.scaling.measure import servers
from scaletrain.scaling.model import Report
from scaletrain.scaling.show.render import note, outcome, to_target


def show(report: Report, console: Console) -> None:
    """Print a table of the rows, the lost time by cause, what parameter servers counted, and the summary sentence."""
    header, rows = report.header, report.rows
    title = f"{header.mode} scaling" + (" (EMULATED)" if header.emulated else "")
    table = Table(
        title=title,
        caption=f"{note(report)} Speed-up over {header.baseline or 'nothing was measured'}.",
    )
    several = report.has_variants
    columns = [
        "exchange",
        "workers",
        "samples/s",
        "speed-up",
        "efficiency",
        "step min ms",
        "p10",
        "p50",
        "p90",
        "p95",
        "exposed comm ms",
        "accuracy",
        *["to accuracy s"] * any(row.target_s is not None for row in rows),
    ]
    for column in (["config"] if several else []) + columns:
        table.add_column(column, justify="left" if column in ("config", "exchange") else "right")
    for row in rows:
        label = (
            [" ".join([row.config, *(f"{k}={v}" for k, v in row.variant.items())])]
            if several
            else []
        )
        marks = "*" if row.oversubscribed else ""
        if row.samples_per_s is None:
            table.add_row(
                *label, row.exchange, str(row.workers), f"[red]{escape(outcome(row))}[/red]"
            )
            continue
        table.add_row(
            *label, row.exchange, f"{row.workers}{marks}",
            _with_ci(row.samples_per_s, row.samples_per_s_ci95, ",.0f"),
            _with_ci(row.speedup, row.speedup_ci95, ".2f"),
            _number(row.efficiency, ".2f"),
            *(_ms(step_s) for step_s in (row.step_s_min, row.step_s_p10, row.step_s_p50, row.step_s_p90, row.step_s_p95)),
            _ms(row.exposed_comm_s, row.exposed_comm_s_ci95), _number(row.test_accuracy, ".4f"),
            *[to_target(row)] * ("to accuracy s" in columns),
        )  # fmt: skip
    console.print(table)
    if crowded := oversubscribed(report):
        console.print(f"* {crowded}")
    if report.losses:
        console.print(_losses(report))
    for row in rows:
        if row.servers:
            told = f"{row.exchange} on {row.workers}: {servers.text(row.servers)}"
            console.print(told, highlight=False, markup=False)
    for row in rows:
        for reason in dict.fromkeys(row.failures):
            console.print(
                f"[red]failed[/red] {row.exchange} on {row.workers}: {escape(reason)}",
                highlight=False,
            )
    console.print(report.summary, highlight=False, markup=False)


def _losses(report: Report) -> Table:
    names = list(report.losses[0].causes)
    table = Table(title="lost time, ms a step")
    for column in ["exchange", "workers", "lost", *names]:
        table.add_column(column, justify="left" if column == "exchange" else "right")
    for loss in report.losses:
        cells = [f"{1000 * loss.causes[name]:.2f}" for name in names]
        table.add_row(loss.exchange, str(loss.workers), f"{1000 * loss.loss_s:.2f}", *cells)
    return table


def _with_ci(value: float | None, ci95: float | None, form: str) -> str:
    if value is None:
        return "-"
    return f"{value:{form}}" + (f" ± {ci95:{form}}" if ci95 is not None else "")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _ms(seconds: float | None, ci95: float | None = None) -> str:
    return (
        "-"
        if seconds is None
        else _with_ci(1000 * seconds, None if ci95 is None else 1000 * ci95, ".2f")
    )
