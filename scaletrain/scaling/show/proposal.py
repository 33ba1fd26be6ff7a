"""A proposal as one page: HTML that prints on one sheet, the sheet as PDF, or Markdown."""

import functools
import math
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Literal

from matplotlib.axes import Axes

from scaletrain.scaling.explain import headline
from scaletrain.scaling.explain.proposal import Interval, Point, Proposal, Scaling
from scaletrain.scaling.measure.intervals import ONE_RUN
from scaletrain.scaling.show import page_tables, plots, sheet, text
from scaletrain.scaling.show.page_tables import Line, Table, Title
from scaletrain.scaling.show.plots import Drawing, Plot
from scaletrain.scaling.show.render import Figure, template
from scaletrain.units import duration, plural

SIZE = (4.6, 3.1)  # inches of each plot: two stand side by side on a sheet
TITLES = (
    "workers", "nodes", "batch", "samples/s", "speed-up", "efficiency (95 %)", "one run takes",
    "node hours a run", "all runs",
)  # fmt: skip
DOTS_PER_INCH = 300  # of a plot on paper
WARNING = "#a02010"
EMULATED = (
    "Emulated: real bytes moved between processes of one machine; these are no measurements of a"
    " cluster."
)
ABOUT_KNEE = (
    "The knee has the highest efficiency over the time of a step (Eager, Zahorjan, Lazowska 1989):"
    " beyond it, twice the nodes are less than 1.41 times as fast."
)
# Strong scaling has round marks and a full line, weak scaling squares and dashes.
LOOKS = {"strong": ("o", "-"), "weak": ("s", "--")}


def html(proposal: Proposal, command: str) -> str:
    """Return the page. ``command``: the one that makes it again."""
    mark = _watermark(proposal)
    figures = []
    for plot in figures_of(proposal):
        image = plots.image(plot.draw, size=SIZE, watermark=mark)
        figures.append(Figure(plot.name, plot.title, plots.inline(image, plot.title)))
    return _page("proposal.html", proposal, command, figures=figures)


def markdown(proposal: Proposal, command: str) -> str:
    """Return the page in Markdown, which refers to the files of ``images``."""
    return _page("proposal.md", proposal, command, plots=figures_of(proposal))


def pdf(proposal: Proposal, command: str) -> bytes:
    """Return the page as a PDF, on one sheet of A4 if it can be read there."""
    heading_of = functools.partial(sheet.Paragraph, size=10.0, is_bold=True, before=6.0)
    small = functools.partial(sheet.Paragraph, size=7.0)
    first, *others = request(proposal)
    blocks: list[sheet.Block] = [sheet.Paragraph(_title(proposal), size=14.0, is_bold=True)]
    if _is_emulated(proposal):
        blocks.append(sheet.Paragraph(EMULATED, is_bold=True, colour=WARNING))
    blocks.append(sheet.Paragraph(first, size=9.0, is_bold=True, before=4.0))
    blocks += map(sheet.Paragraph, others)
    blocks.append(_pictures(proposal))
    for scaling in proposal.scalings:
        blocks.append(heading_of(heading(scaling)))
        blocks.append(sheet.Grid(table(scaling, proposal)))
        blocks.append(sheet.Paragraph(f"Knee: {scaling.knee.sentence}", before=3.0))
    blocks.append(small(ABOUT_KNEE))
    blocks.append(heading_of("Measured and predicted"))
    blocks.append(sheet.Paragraph(proposal.scalings[0].predicted))
    blocks += [small(note(scaling)) for scaling in proposal.scalings]
    blocks += [sheet.Paragraph(doubt, is_bold=True, colour=WARNING) for doubt in doubts(proposal)]
    blocks.append(heading_of("Environment"))
    blocks += map(small, environments(proposal))
    blocks.append(heading_of("How to reproduce"))
    blocks += [small(line, is_code=True) for line in _commands(proposal, command)]
    return sheet.pdf(blocks, _title(proposal), _created(proposal))


def _created(proposal: Proposal) -> datetime:
    """Return when the figures were measured; the beginning of time where no report says so."""
    told = [scaling.report.header.created for scaling in proposal.scalings]
    return datetime.fromisoformat(max(filter(None, told), default="1970-01-01T00:00:00Z"))


def _pictures(proposal: Proposal) -> sheet.Pictures:
    mark = _watermark(proposal)
    figures = figures_of(proposal)
    images = [plots.image(each.draw, "png", SIZE, mark, DOTS_PER_INCH) for each in figures]
    return sheet.Pictures(images, [each.title for each in figures])


def images(proposal: Proposal) -> dict[str, bytes]:
    """Return the plots as SVG, by the names of their files."""
    mark = _watermark(proposal)
    return {
        f"{plot.name}.svg": plots.image(plot.draw, size=SIZE, watermark=mark)
        for plot in figures_of(proposal)
    }


def _page(name: str, proposal: Proposal, command: str, **facts: object) -> str:
    return template(name).render(
        title=_title(proposal),
        proposal=proposal,
        request=request(proposal),
        scalings=proposal.scalings,
        heading=heading,
        note=note,
        table=table,
        tables=page_tables,
        emulated=EMULATED if _is_emulated(proposal) else "",
        about_knee=ABOUT_KNEE,
        doubts=doubts(proposal),
        environments=environments(proposal),
        commands=_commands(proposal, command),
        **facts,
    )


def _title(proposal: Proposal) -> str:
    title = f"Scaling and computing time of {proposal.config}"
    return f"{title} (EMULATED)" if _is_emulated(proposal) else title


def _is_emulated(proposal: Proposal) -> bool:
    return any(scaling.report.header.emulated for scaling in proposal.scalings)


def _commands(proposal: Proposal, command: str) -> list[str]:
    """Return the commands that measured, and the one that made the page."""
    measured = [scaling.report.header.argv for scaling in proposal.scalings]
    return [*filter(None, measured), command]


def environments(proposal: Proposal) -> list[str]:
    """Return where the scalings were measured, each place once."""
    return list(dict.fromkeys(environment(scaling) for scaling in proposal.scalings))


def request(proposal: Proposal) -> list[str]:
    """Return the request in sentences: the total first, then what it is made of."""
    asked, runs = proposal.asked, proposal.request.runs
    basis = "measured" if asked.is_measured else "PREDICTED"
    first = proposal.scalings[0]
    sentences = [
        f"{_with_ends(proposal.node_hours, hours)} node hours ({basis}): {plural(runs, 'run')} of"
        f" {proposal.request.samples:,.0f} samples, each {_with_ends(asked.run_s, duration)} on"
        f" {plural(asked.workers, 'worker')} of {plural(asked.nodes, 'node')}.",
        f"{first.mode.capitalize()} scaling, exchange {asked.exchange}, batch"
        f" {asked.batch_size:,}, {plural(proposal.workers_per_node, 'worker')} a node.",
    ]
    if asked.workers > first.pays_up_to:
        sentences.append(f"These are more workers than pay (knee: {first.pays_up_to}).")
    sentences.append(
        "Node hours are those of training steps, with nodes counted whole. Starting, evaluations"
        " and checkpoints come on top."
    )
    return sentences


def heading(scaling: Scaling) -> str:
    """Return the heading of one scaling: what is fixed, and the exchange."""
    point = scaling.points[-1]
    if scaling.mode == "strong":
        return f"Strong scaling (batch {point.batch_size:,}), {scaling.exchange}"
    share = point.batch_size // point.workers
    return f"Weak scaling (batch {share:,} a worker), {scaling.exchange}"


def note(scaling: Scaling) -> str:
    """Return what the figures of one scaling are."""
    header = scaling.report.header
    return (
        f"{scaling.mode.capitalize()} scaling: speed-up over {header.baseline}. In brackets, the"
        f" 95 % interval over {plural(header.repeats, 'repeat')} (Student's t; that of efficiency"
        " pairs each repeat with the baseline's)."
    )


def table(scaling: Scaling, proposal: Proposal) -> Table:
    """Return the table of one scaling, a line for each number of workers."""
    lines = []
    for point in scaling.points:
        node_hours = point.node_hours
        crowded = "*" if point.oversubscribed else ""
        basis = "measured" if point.is_measured else "PREDICTED"
        if point.exchange != scaling.exchange:
            basis = f"{basis} ({point.exchange})"
        cells = [
            f"{point.workers}{crowded}",
            str(point.nodes),
            f"{point.batch_size:,}",
            f"{point.samples_per_s.value:,.0f}",
            f"{point.speedup.value:.2f}",
            _with_ends(point.efficiency, "{:.2f}".format),
            duration(point.run_s.value),
            _with_ends(node_hours, hours),
            hours(node_hours.times(proposal.request.runs).value),
            basis,
        ]
        lines.append(Line(tuple(cells)))
    titles = [*map(Title, TITLES), Title("basis", is_left=True)]
    return Table(tuple(titles), tuple(lines))


def doubts(proposal: Proposal) -> list[str]:
    """Return what a reader of the figures has to know."""
    sentences: list[str] = []
    crowded: dict[str, None] = {}
    for scaling in proposal.scalings:
        sentences += headline.doubts(scaling.report)
        crowded.update(dict.fromkeys(p.oversubscribed for p in scaling.points if p.oversubscribed))
        if any(point.is_measured and len(point.rates) < 2 for point in scaling.points):
            sentences.append(f"{scaling.mode.capitalize()} scaling: {ONE_RUN}.")
    if crowded:
        sentences.append(f"* oversubscribed: {', '.join(crowded)}.")
    return list(dict.fromkeys(sentences))


def environment(scaling: Scaling) -> str:
    """Return where a scaling was measured, in a sentence."""
    header = scaling.report.header
    parts = [f"{header.processor}, {plural(header.cores or 0, 'core')}"]
    parts += header.devices or ()
    parts.append(header.os or "")
    parts.append(f"Python {header.python}")
    versions = [f"{name} {version}" for name, version in header.versions.items() if version]
    parts += [", ".join(versions), f"launcher {header.launcher or 'not noted'}"]
    parts.append(f"commit {header.commit}")
    emulated = f" EMULATED: {'; '.join(header.emulation or ())}." if header.emulated else ""
    return f"{'; '.join(filter(None, parts))}.{emulated}"


def hours(value: float) -> str:
    """Return node hours with three digits, and large ones whole.

    >>> hours(12345.6), hours(26.0), hours(0.012345)
    ('12,346', '26.0', '0.0123')
    """
    if value >= 99.95 or value == 0:
        return f"{value:,.0f}"
    return f"{value:#.3g}"


def _with_ends(interval: Interval, form: Callable[[float], str]) -> str:
    """Return a figure with its interval, if it has one."""
    if interval.low is None or interval.high is None:
        return form(interval.value)
    # A rate whose interval reaches zero bounds no time.
    high = "or more" if math.isinf(interval.high) else f"to {form(interval.high)}"
    return f"{form(interval.value)} ({form(interval.low)} {high})"


def _watermark(proposal: Proposal) -> str:
    marks = dict.fromkeys(text.watermark(scaling.report) for scaling in proposal.scalings)
    return ", ".join(filter(None, marks))


def figures_of(proposal: Proposal) -> list[Plot]:
    """Return the two plots of a proposal."""
    scalings = proposal.scalings
    return [
        Plot("proposal_speedup", "Speed-up", curves(scalings, "speedup")),
        Plot(
            "proposal_efficiency", "Efficiency, with its 95 % band", curves(scalings, "efficiency")
        ),
    ]


def curves(scalings: Sequence[Scaling], figure: Literal["speedup", "efficiency"]) -> Drawing:
    """Draw speed-up or efficiency against workers, with bands. Predicted points are hollow."""

    def draw(axes: Axes) -> None:
        counts = sorted({point.workers for scaling in scalings for point in scaling.points})
        ideal = [float(count) if figure == "speedup" else 1.0 for count in counts]
        axes.plot(counts, ideal, ":", color=plots.PALE, label="ideal", zorder=1)
        for scaling in scalings:
            _curve(axes, scaling, figure)
        if any(not point.is_measured for scaling in scalings for point in scaling.points):
            axes.plot([], [], "o", color=plots.INK, mfc="none", ls="none", label="predicted")
        axes.set_xscale("log", base=2)
        if figure == "speedup":
            axes.set_yscale("log", base=2)
            axes.set_ylim(bottom=_lowest(scalings) / 1.2)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xticks(counts, list(map(str, counts)))
        axes.minorticks_off()
        axes.set_xlabel("workers")
        axes.set_ylabel("times the baseline" if figure == "speedup" else "speed-up / workers")
        plots.legend(axes)

    return draw


def _lowest(scalings: Sequence[Scaling]) -> float:
    """Return the lowest end of all speed-ups' bands, so that none is cut.

    A band that reaches zero has no end on a logarithmic axis: it is drawn to a sixteenth.
    """
    lowest = []
    for scaling in scalings:
        for point in scaling.points:
            least = point.speedup.value / 16
            low = point.speedup.value if point.speedup.low is None else point.speedup.low
            lowest.append(max(least, low))
    return min(lowest)


def _curve(axes: Axes, scaling: Scaling, figure: str) -> None:
    marker, line = LOOKS[scaling.mode]
    colour = plots.colour_of(scaling.exchange)
    workers = [point.workers for point in scaling.points]
    values = [_value(point, figure) for point in scaling.points]
    label = f"{scaling.mode}, {scaling.exchange}"
    axes.plot(workers, [value.value for value in values], line, color=colour, lw=1.5, label=label)
    # The baseline's own figure is 1 by definition and has no ends.
    low = [value.value if value.low is None else value.low for value in values]
    high = [value.value if value.high is None else value.high for value in values]
    axes.fill_between(workers, low, high, color=colour, alpha=0.18, lw=0)
    for point, value in zip(scaling.points, values, strict=True):
        inside = colour if point.is_measured else "none"
        axes.plot(point.workers, value.value, marker, ms=5, color=colour, mfc=inside, zorder=3)


def _value(point: Point, figure: str) -> Interval:
    return point.speedup if figure == "speedup" else point.efficiency
