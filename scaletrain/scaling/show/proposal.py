"""A proposal as one page: HTML that prints on one sheet, or Markdown with two plots."""

import math
from collections.abc import Callable, Sequence
from typing import Literal

from matplotlib.axes import Axes

from scaletrain.scaling.explain import headline
from scaletrain.scaling.explain.proposal import Interval, Point, Proposal, Scaling
from scaletrain.scaling.measure.intervals import ONE_RUN
from scaletrain.scaling.show import page_tables, plots, text
from scaletrain.scaling.show.page_tables import Line, Table, Title
from scaletrain.scaling.show.plots import Drawing, Plot
from scaletrain.scaling.show.render import Figure, template
from scaletrain.units import duration, plural

SIZE = (4.6, 3.1)  # inches of each plot: two stand side by side on a sheet
TITLES = (
    "workers", "nodes", "batch", "samples/s", "speed-up", "efficiency (95 %)", "one run takes",
    "node hours a run", "all runs",
)  # fmt: skip
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


def images(proposal: Proposal) -> dict[str, bytes]:
    """Return the plots as SVG, by the names of their files."""
    mark = _watermark(proposal)
    return {
        f"{plot.name}.svg": plots.image(plot.draw, size=SIZE, watermark=mark)
        for plot in figures_of(proposal)
    }


def _page(name: str, proposal: Proposal, command: str, **facts: object) -> str:
    reports = [scaling.report for scaling in proposal.scalings]
    return template(name).render(
        proposal=proposal,
        request=request(proposal),
        scalings=proposal.scalings,
        heading=heading,
        note=note,
        table=table,
        tables=page_tables,
        emulated=any(report.header.emulated for report in reports),
        doubts=doubts(proposal),
        environments=list(dict.fromkeys(environment(scaling) for scaling in proposal.scalings)),
        commands=[*(report.header.argv for report in reports if report.header.argv), command],
        **facts,
    )


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
            # A band may reach zero, which has no place on this axis.
            lowest = min(point.speedup.value for scaling in scalings for point in scaling.points)
            axes.set_ylim(bottom=lowest / 2)
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axes.set_ylim(bottom=0)
        axes.set_xticks(counts, list(map(str, counts)))
        axes.minorticks_off()
        axes.set_xlabel("workers")
        axes.set_ylabel("times the baseline" if figure == "speedup" else "speed-up / workers")
        plots.legend(axes)

    return draw


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
