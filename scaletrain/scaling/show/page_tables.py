"""The tables of a report's pages as values, which HTML and Markdown then write down."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

from scaletrain.scaling.measure import servers
from scaletrain.scaling.model import Loss, Report
from scaletrain.scaling.show.columns import columns_of
from scaletrain.scaling.show.text import UNKNOWN, cell_name, ms, number, outcome


@dataclasses.dataclass(frozen=True)
class Title:
    """The head of one column."""

    text: str
    is_left: bool = False  # whether the column is aligned to the left


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a table."""

    cells: tuple[str, ...]
    reason: str = ""  # why there are no more cells; it takes their place


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of texts.

    Each line has a cell for every title, or a reason for the last ones that it lacks.
    """

    titles: tuple[Title, ...]
    lines: tuple[Line, ...]


def cells(report: Report, place: Literal["md", "html"]) -> Table:
    """Return the table of all cells. One that failed has its reason in place of figures."""
    columns = columns_of(report, place)
    lines = []
    for row in report.rows:
        if row.runs:
            lines.append(Line(tuple(column.text(row) for column in columns)))
        else:
            # Names come first among the columns.
            names = tuple(column.text(row) for column in columns if column.is_name)
            lines.append(Line(names, outcome(row)))
    titles = tuple(Title(column.title_in(place), column.is_left) for column in columns)
    return Table(titles, tuple(lines))


def lost_time(report: Report) -> Table:
    """Return the lost time of each cell by cause, in milliseconds a step."""
    # ``limiter.split`` gives every loss the same causes.
    causes = list(report.losses[0].causes)
    titles = [Title("exchange", is_left=True)]
    titles += map(Title, ["workers", "step (ms)", "ideal (ms)", "lost (ms)", *causes])
    lines = []
    for loss in report.losses:
        figures = [loss.step_s, loss.ideal_s, loss.loss_s, *loss.causes.values()]
        exchange = f"{job_of(loss, report)}{loss.exchange}"
        lines.append(Line((exchange, str(loss.workers), *map(ms, figures))))
    return Table(tuple(titles), tuple(lines))


def job_of(loss: Loss, report: Report) -> str:
    """Return the job of a loss with a space behind it; empty if all losses are of one job."""
    if not report.has_variants:
        return ""
    return " ".join([loss.config, *map(str, loss.variant.values()), ""])


def time_to_loss(report: Report) -> Table:
    """Return throughput beside the time to the loss that every run reached."""
    titles = [
        Title("exchange", is_left=True),
        Title("workers"),
        Title("samples/s"),
        Title("time to loss (s)"),
        Title("servers", is_left=True),
    ]
    lines = []
    for row in report.rows:
        if row.samples_per_s is not None:
            name = f"{cell_name(row)} {row.exchange}" if report.has_variants else row.exchange
            rate = number(row.samples_per_s, ",.0f")
            seconds = number(row.time_to_loss_s)
            lines.append(Line((name, str(row.workers), rate, seconds, servers.text(row.servers))))
    return Table(tuple(titles), tuple(lines))


def convergence(report: Report) -> Table:
    """Return the samples to the target accuracy beside those of the reference."""
    titles = [
        Title("exchange", is_left=True),
        *map(Title, ["workers", "batch", "samples", "reference", "ratio"]),
        Title("verdict", is_left=True),
    ]
    lines = []
    for each in report.convergence:
        job = [each.config, *map(str, each.variant.values())] if report.has_variants else []
        verdict = "as the reference, or more"
        if each.is_too_fast:
            verdict = "! fewer than the reference allows"
        line = [
            " ".join([*job, each.exchange]),
            str(each.workers),
            f"{each.batch_size:,}",
            number(each.samples, ",.0f", each.samples_ci95),
            f"{number(each.reference_samples, ',.0f', each.reference_ci95)} ({each.reference})",
            number(each.samples / each.reference_samples),
            verdict,
        ]
        lines.append(Line(tuple(line)))
    return Table(tuple(titles), tuple(lines))


def batches(report: Report) -> Table:
    """Return how long one worker computes on a sample at each batch size."""
    titles = [Title("batch"), Title("forward and backward a sample (ms)")]
    titles.append(Title("efficiency against the largest"))
    if report.has_variants:
        titles.insert(0, Title("config", is_left=True))
    lines = []
    for point in report.batches:
        figures = [str(point.batch_size), number(1000 * point.sample_s, ".4f")]
        figures.append(number(point.efficiency))
        if report.has_variants:
            figures.insert(0, " ".join([point.config, *map(str, point.variant.values())]))
        lines.append(Line(tuple(figures)))
    return Table(tuple(titles), tuple(lines))


def predicted(report: Report) -> Table:
    """Return predicted beside measured steps."""
    names = ["workers", "measured (ms)", "predicted (ms)", "error", "95 % interval (ms)"]
    titles = [
        Title("exchange", is_left=True),
        *map(Title, names),
        Title("what it is", is_left=True),
    ]
    lines = []
    for point in report.predictions:
        interval = UNKNOWN
        if point.interval_s is not None:
            interval = " to ".join(map(ms, point.interval_s))
        elif point.low_s is not None:
            interval = "too wide to say"
        cells = [point.exchange, str(point.workers), ms(point.measured_s), ms(point.predicted_s)]
        cells += [f"{100 * point.error:+.1f} %", interval]
        cells.append("residual of the fit" if point.in_fit else "prediction")
        lines.append(Line(tuple(cells)))
    return Table(tuple(titles), tuple(lines))


def markdown(table: Table) -> str:
    """Return a table in Markdown.

    >>> print(markdown(Table((Title("a"), Title("b", is_left=True)), (Line(("1", "x|y")),))))
    | a | b |
    |--:|---|
    | 1 | x/y |
    """
    marks = ["---" if title.is_left else "--:" for title in table.titles]
    lines = [_line([title.text for title in table.titles]), f"|{'|'.join(marks)}|"]
    for line in table.lines:
        cells = list(line.cells)
        if line.reason:
            cells.append(line.reason)
        # Markdown knows no cells that span columns.
        cells += [""] * (len(table.titles) - len(cells))
        lines.append(_line(cells))
    return "\n".join(lines)


def _line(cells: Sequence[str]) -> str:
    # A bar would begin another cell.
    texts = [cell.replace("|", "/") for cell in cells]
    return f"| {' | '.join(texts)} |"
