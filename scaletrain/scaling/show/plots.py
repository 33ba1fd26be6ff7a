"""The report's plots, as stand-alone images or as SVG with the colours of its page."""

import dataclasses
import io
import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from scaletrain.config.grammar import split_spec, without_transport
from scaletrain.scaling.explain import headline
from scaletrain.scaling.model import Loss, Prediction, Report, Row
from scaletrain.scaling.predict.simulate import Point

# Stand-ins for the page's colours: no plot has these exact values otherwise. In inline SVG, CSS
# variables replace them, so that the page is light or dark.
INK, PALE, PAPER = "#101112", "#b0b1b2", "#fdfcfb"
SERIES = ("#2b74bd", "#d6604d", "#1b8a5a", "#8856a7", "#b8860b", "#4795ad", "#a6456b", "#6b7a2f")
LOSSES = {
    "ideal": "#7f8c9b", "communication": "#d6604d", "stragglers": "#b8860b", "input": "#1b8a5a",
    "optimizer": "#8856a7", "stolen cores": "#2b74bd", "small batch": "#4795ad", "unexplained": "#b0b1b3",
}  # fmt: skip
STYLE: Any = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "axes.edgecolor": PALE, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "text.color": INK, "axes.grid": True, "grid.color": PALE, "grid.alpha": 0.35,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "figure.facecolor": PAPER, "axes.facecolor": PAPER,
}  # fmt: skip

MARKERS = "os^vDPX*"  # of lines that share a colour
DODGE = 0.015  # of the axis' length, between the points that several lines have at one place
THIN = 0.005  # of the largest ideal step: a thinner layer of a bar cannot be seen

# Exchanges and collectives have the same colour in every report, each its own. A person's own
# exchange gets one of SERIES by its name.
_COLOURS = {
    "native": SERIES[0], "ring": SERIES[1], "tree": SERIES[2], "parameter_server": SERIES[3],
    "none": SERIES[4], "scheduled": SERIES[5], "horovod": SERIES[6], "halving_doubling": SERIES[7],
    "direct": "#cf750e", "double_tree": "#5c971b", "pipelined_tree": "#0e8c8c",
    "recursive_doubling": "#9c6b30", "star": "#6f78c4", "two_level": "#d6459b", "one_hop": "#7b8794",
}  # fmt: skip
_COLOURS["server"] = _COLOURS["parameter_server"]  # as ``simulate`` calls it

Drawing = Callable[[Axes], None]


@dataclasses.dataclass(frozen=True)
class Plot:
    """One plot of a report."""

    name: str  # of its file
    title: str
    draw: Drawing


def colour_of(exchange: str) -> str:
    """Return the colour of an exchange, which is the same in every report."""
    name = without_transport(exchange)
    # Without options, and without the backup workers of a server.
    known = split_spec(name.partition("+")[0]).name
    if known in _COLOURS:
        return _COLOURS[known]
    # A sum over the name, since Python's own hash differs from process to process.
    return SERIES[zlib.crc32(name.encode()) % len(SERIES)]


def looks(exchanges: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return the colour and the marker of each line, by its name.

    Lines of one exchange, and those of exchanges that share a colour, differ in their markers.

    Args:
        exchanges: of each line, by its name.
    """
    same: Counter[str] = Counter()  # lines of each colour so far
    found = {}
    for name, exchange in exchanges.items():
        colour = colour_of(exchange)
        found[name] = (colour, MARKERS[same[colour] % len(MARKERS)])
        same[colour] += 1
    return found


def of_report(report: Report) -> list[Plot]:
    """Return the plots that a report has the figures for."""
    rows = report.rows
    plots = []
    if any(row.speedup is not None for row in rows):
        plots.append(Plot("speedup", "Speed-up", curves(rows, "speedup")))
        plots.append(Plot("efficiency", "Efficiency", curves(rows, "efficiency")))
    if report.losses:
        plots.append(Plot("anatomy", "Anatomy of a step", anatomy(report.losses)))
    with_ranks = [row for row in rows if len(row.ranks) > 1]
    if with_ranks:
        best = headline.fastest(report)
        row = max(with_ranks, key=lambda row: _interest_of_ranks(row, row is best))
        plots.append(Plot("ranks", "Each rank", each_rank(row)))
    if report.predictions:
        plots.append(Plot("predicted", "Predicted against measured", predicted(report.predictions)))
    if any(row.bytes_sent for row in rows):
        plots.append(Plot("traffic", "Traffic", traffic(rows)))
    return plots


def _interest_of_ranks(row: Row, is_best: bool) -> tuple[bool, bool, bool, int]:
    """Return what decides whose ranks are shown.

    A culprit comes first, then the row that the lead is about, then one whose ranks wait.
    """
    return row.culprit is not None, is_best, row.exchange != "none", row.workers


def image(
    draw: Drawing,
    form: str = "svg",
    size: tuple[float, float] = (6.0, 3.8),
    watermark: str = "",
    dots_per_inch: int = 160,
) -> bytes:
    """Return one plot as an image.

    Args:
        draw: draws into the axes.
        form: svg or png.
        size: width and height in inches.
        watermark: is written above the plot: emulated figures say so on the figure itself.
        dots_per_inch: of a PNG.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        if watermark:
            axes.set_title(watermark, loc="right", fontsize=8.5, style="italic")
        buffer = io.BytesIO()
        # Without a date, equal figures make equal files.
        metadata: dict[str, Any] = {"Date": None} if form == "svg" else {}
        figure.savefig(buffer, format=form, dpi=dots_per_inch, metadata=metadata)
        return buffer.getvalue()


def inline(svg: bytes, label: str) -> str:
    """Return SVG for an HTML page.

    It has no prologue, scales with the page, takes its colours from CSS variables, and its
    identifiers begin with ``label``, since a page holds several.
    """
    text = svg.decode("utf-8")
    text = text[text.index("<svg") :]
    prefix = re.sub(r"\W+", "-", label)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # Definitions and all references to them change together.
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'xlink:href="#', f'xlink:href="#{prefix}-', text)
    tag, end, rest = text.partition(">")
    tag = re.sub(r' (?:width|height)="[^"]*pt"', "", tag)  # else it would not scale
    tag = tag.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    text = tag + end + rest
    for colour, variable in ((INK, "--ink"), (PALE, "--pale"), (PAPER, "--paper")):
        text = text.replace(colour, f"var({variable})")
    return text


def legend(axes: Axes) -> None:
    """Put the legend below the axes, where it covers nothing.

    The figure grows for more than two lines of it.
    """
    handles, labels = axes.get_legend_handles_labels()
    figure = axes.figure
    assert isinstance(figure, Figure)
    longest = max(len(label) for label in labels)
    # About 88 characters fit in a line; an entry's handle is as wide as 7.
    columns = max(1, min(4, 88 // (longest + 7)))
    lines = math.ceil(len(labels) / columns)
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8.5)
    figure.set_figheight(figure.get_figheight() + 0.18 * max(0, lines - 2))


def curves(rows: Sequence[Row], figure: Literal["speedup", "efficiency"]) -> Drawing:
    """Draw speed-up or efficiency against workers.

    Each exchange has a line, with intervals as bars. The ideal is dashed.
    """

    def value(row: Row) -> float:
        number = getattr(row, figure)
        assert number is not None
        return number

    def error(row: Row) -> float:
        return getattr(row, f"{figure}_ci95") or 0.0

    def draw(axes: Axes) -> None:
        measured = [row for row in rows if getattr(row, figure) is not None]
        workers = sorted({row.workers for row in measured})
        most = max(workers, default=1)
        if workers:
            # A single worker count would make the ideal a mere point.
            ends = [1, max(2, most) if len(workers) == 1 else most]
            ideal = ends if figure == "speedup" else [1, 1]
            axes.plot(ends, ideal, "--", color=PALE, label="ideal", zorder=1)
        lines: dict[str, list[Row]] = {}
        for row in measured:
            lines.setdefault(_line_name(row, rows), []).append(row)
        length = max(workers[-1] - workers[0], 1) if workers else 1
        looks_of = looks({name: line[0].exchange for name, line in lines.items()})
        for index, (name, line) in enumerate(lines.items()):
            aside = DODGE * length * (index - (len(lines) - 1) / 2)
            line.sort(key=lambda row: row.workers)
            colour, marker = looks_of[name]
            _curve(axes, line, value, aside=aside, colour=colour, marker=marker)
        if any(row.oversubscribed for row in measured):
            # No points, only an entry of the legend.
            _ring(axes, [], [], INK, label="oversubscribed")
        if any(row.outliers for row in measured):
            axes.plot([], [], "x", ms=6, color=INK, ls="none", label="outlying repeat")
        axes.set_xlabel("workers")
        axes.set_ylabel("times the baseline" if figure == "speedup" else "speed-up / workers")
        axes.set_xticks(workers, list(map(str, workers)))
        # Whole intervals: a reader must see how wide they are.
        least_top = most if figure == "speedup" else 1.0
        top = max([least_top, *(value(row) + error(row) for row in measured)])
        bottom = min([0.0, *(value(row) - error(row) for row in measured)])
        axes.set_ylim(1.06 * bottom, 1.06 * top)
        legend(axes)

    def _curve(
        axes: Axes,
        line: Sequence[Row],
        value: Callable[[Row], float],
        *,
        aside: float,
        colour: str,
        marker: str,
    ) -> None:
        """Draw the line of one exchange, ``aside`` of those of the others."""
        errors = [error(row) for row in line]
        axes.errorbar(
            [row.workers + aside for row in line],
            [value(row) for row in line],
            yerr=errors,
            marker=marker,
            ms=4.5,
            lw=1.7,
            capsize=3,
            color=colour,
            label=_line_name(line[0], rows),
            zorder=3,
        )
        for row in line:
            _crosses(axes, row, value(row), aside=aside, colour=colour)
        marked = [row for row in line if row.oversubscribed]
        if marked:
            x = [row.workers + aside for row in marked]
            _ring(axes, x, [value(row) for row in marked], colour)

    return draw


def _crosses(axes: Axes, row: Row, value: float, *, aside: float, colour: str) -> None:
    """Draw the outlying repeats of a row, where they would be by their samples/s."""
    for number in row.outliers:
        assert row.samples_per_s is not None
        own = value * row.rates[number - 1] / row.samples_per_s
        axes.plot([row.workers + aside], [own], "x", ms=6, color=colour, ls="none", zorder=3)


def _ring(
    axes: Axes, x: Sequence[float], y: Sequence[float], colour: str, label: str | None = None
) -> None:
    """Draw rings around points."""
    axes.plot(x, y, "o", ms=9, mfc="none", mec=colour, ls="none", label=label)


def _line_name(row: Row, rows: Sequence[Row]) -> str:
    """Return the name of a row's line, with its config if there are several."""
    words = []
    if len({other.config for other in rows}) > 1:
        words.append(row.config)
    words.append(row.exchange)
    words += [f"{key.rpartition('.')[2]}={value}" for key, value in row.variant.items()]
    return " ".join(words)


def anatomy(losses: Sequence[Loss]) -> Drawing:
    """Draw the step of each cell as a stacked bar: the ideal, then each cause of loss.

    Causes that gain time hang below zero.
    """

    def draw(axes: Axes) -> None:
        places = range(len(losses))
        top = [0.0] * len(losses)
        bottom = [0.0] * len(losses)
        ideals = [1000 * loss.ideal_s for loss in losses]
        for name, heights in _layers(losses).items():
            if max(abs(height) for height in heights) < THIN * max(ideals):
                continue
            # A layer begins where the last one of its sign ended; gains grow downwards.
            starts = list(top)
            for place, height in enumerate(heights):
                if height < 0:
                    starts[place] = bottom[place]
                    bottom[place] += height
                else:
                    top[place] += height
            colour = LOSSES[name]
            axes.bar(places, heights, bottom=starts, width=0.62, label=name, color=colour)
        axes.axhline(0, color=PALE, linewidth=0.8)
        axes.set_ylim(1.1 * min(bottom), 1.06 * max(top))
        axes.set_xticks(places, [_bar_name(loss) for loss in losses], fontsize=8.5)
        axes.set_ylabel("ms a step")
        axes.grid(axis="x", visible=False)
        legend(axes)

    return draw


def _layers(losses: Sequence[Loss]) -> dict[str, list[float]]:
    """Return the heights of each layer of the bars, in milliseconds."""
    layers = {"ideal": [1000 * loss.ideal_s for loss in losses]}
    for cause in losses[0].causes:
        layers[cause] = [1000 * loss.causes[cause] for loss in losses]
    return layers


def _bar_name(loss: Loss) -> str:
    lines = [loss.exchange, f"{loss.workers} w", *map(str, loss.variant.values())]
    return "\n".join(lines)


def predicted(points: Sequence[Prediction]) -> Drawing:
    """Draw predicted against measured step time, with the line on which they agree."""

    def draw(axes: Axes) -> None:
        times: list[float] = []
        for point in points:
            # An interval of decades would hide all other points.
            times += [point.measured_s, point.predicted_s, *(point.interval_s or ())]
        ends = [1000 * min(times) * 0.9, 1000 * max(times) * 1.1]
        axes.plot(ends, ends, "--", color=PALE, label="predicted = measured")
        exchanges = list(dict.fromkeys(point.exchange for point in points))
        for exchange, (colour, marker) in looks({each: each for each in exchanges}).items():
            # The legend shows each colour once, whether its points are hollow or not.
            axes.plot([], [], marker, color=colour, label=exchange)
            for in_fit in (False, True):
                some = [p for p in points if p.exchange == exchange and p.in_fit is in_fit]
                x = [1000 * point.measured_s for point in some]
                y = [1000 * point.predicted_s for point in some]
                for point in some:
                    interval = [1000 * end for end in point.interval_s or ()]
                    axes.plot(
                        [1000 * point.measured_s] * len(interval), interval, lw=1, color=colour
                    )
                axes.plot(x, y, marker, color=colour, mfc="none" if in_fit else colour)
        if any(point.in_fit for point in points):
            axes.plot([], [], "o", color=INK, mfc="none", label="hollow: residual of the fit")
        # Below a decade, linear axes have the better ticks.
        if ends[1] > 10 * ends[0]:
            axes.set_xscale("log")
            axes.set_yscale("log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axis.set_major_formatter(lambda value, _: f"{value:g}")
                axis.set_minor_formatter(NullFormatter())
        axes.set_xlim(ends[0], ends[1])
        axes.set_ylim(ends[0], ends[1])
        axes.set_xlabel("measured, ms a step")
        axes.set_ylabel("predicted, ms a step")
        legend(axes)

    return draw


def each_rank(row: Row) -> Drawing:
    """Draw what each rank of a row took itself in a step, and how long it waited for others."""

    def draw(axes: Axes) -> None:
        places = [rank.rank for rank in row.ranks]
        bottom = [0.0] * len(places)
        parts = {
            "input": [rank.input_s for rank in row.ranks],
            "forward": [rank.forward_s for rank in row.ranks],
            "backward": [rank.backward_s for rank in row.ranks],
            "optimizer": [rank.optimizer_s for rank in row.ranks],
            "waits for others": [rank.wait_s for rank in row.ranks],
        }
        colours = {**LOSSES, "forward": SERIES[0], "backward": SERIES[5], "waits for others": PALE}
        for name, seconds in parts.items():
            heights = [1000 * value for value in seconds]
            axes.bar(places, heights, bottom=bottom, label=name, color=colours[name], width=0.7)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        # Names of a dozen ranks fit; of more, some.
        step = math.ceil(len(places) / 12)
        axes.set_xticks(places[::step])
        axes.set_xlabel(f"rank ({row.label})")
        axes.set_ylabel("ms a step")
        axes.grid(axis="x", visible=False)
        legend(axes)

    return draw


def traffic(rows: Sequence[Row]) -> Drawing:
    """Draw the megabytes that one worker sends in a step.

    They are counted, or those of the collective's schedule (a ring's for ``native`` and
    ``horovod``).
    """

    def draw(axes: Axes) -> None:
        bars = [row for row in rows if row.bytes_sent]
        bars.reverse()  # the first row on top
        # Hatched bars are computed from the schedule, not counted.
        looks: dict[str, Any] = {"counted": {}, "the schedule's": {"hatch": "//", "alpha": 0.6}}
        for kind, look in looks.items():
            places = [place for place, row in enumerate(bars) if row.bytes_sent_is == kind]
            widths = [(bars[place].bytes_sent or 0.0) / 1e6 for place in places]
            if places:
                axes.barh(places, widths, color=SERIES[0], label=kind, **look)
        labels = [f"{_line_name(row, rows)}, {row.workers} w" for row in bars]
        axes.set_yticks(range(len(bars)), labels)
        legend(axes)
        axes.set_xlabel("MB sent by a worker in a step")
        axes.grid(axis="y", visible=False)

    return draw


def simulation(points: Sequence[Point], reach: int | None) -> Drawing:
    """Draw predicted speed-up against workers, both logarithmic.

    A line is the first figure of a strategy's range, and the shade above it reaches to the second.

    Args:
        points: of all strategies and worker counts.
        reach: beyond so many workers lines are dashed. None: nowhere.
    """

    def draw(axes: Axes) -> None:
        counts = sorted({point.workers for point in points})
        axes.plot(counts, counts, ":", color=PALE, label="ideal")
        lines: dict[str, list[Point]] = {}
        for point in points:
            lines.setdefault(point.strategy, []).append(point)
        looks_of = looks({strategy: strategy for strategy in lines})
        for strategy, line in lines.items():
            colour, marker = looks_of[strategy]
            style: Any = {"color": colour, "lw": 1.6, "marker": marker, "ms": 3.5}
            # Points come in the order of their workers, so the near ones are the first.
            near = [point for point in line if reach is None or point.workers <= reach]
            axes.fill_between(
                [point.workers for point in line],
                [point.speedup for point in line],
                [point.fast_speedup for point in line],
                color=style["color"],
                alpha=0.12,
                lw=0,
            )
            far = line[len(near) :]
            _stroke(axes, near, "-", label=strategy + _extra_machines(line), **style)
            if far:
                # From the last near point on, so that the two strokes meet.
                _stroke(axes, near[-1:] + far, "--", **style)
        if reach is not None and counts[-1] > reach:
            axes.plot([], [], "--", color=INK, lw=1.6, label=f"far: beyond {reach}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(counts, list(map(str, counts)), fontsize=8)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        has_extra = any(point.machines > point.workers for point in points)
        axes.set_xlabel("workers; (+N): N machines beside them" if has_extra else "workers")
        axes.set_ylabel("speed-up")
        legend(axes)

    return draw


def _stroke(axes: Axes, line: Sequence[Point], look: str, **style: Any) -> None:
    workers = [point.workers for point in line]
    axes.plot(workers, [point.speedup for point in line], look, **style)


def _extra_machines(line: Sequence[Point]) -> str:
    """Return how many machines a strategy takes beside its workers, in brackets."""
    extra = max(point.machines - point.workers for point in line)
    return f" (+{extra})" if extra else ""
