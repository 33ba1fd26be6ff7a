"""The report's plots, as SVG that takes its colours from the page (light or dark) or as stand-alone images."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scaletrain.scaling.model import Loss, Prediction, Row

# Stand-ins for the page's colours: exact values that nothing else in a plot has, replaced by CSS variables in inline SVG.
INK, PALE, PAPER = "#101112", "#b0b1b2", "#fdfcfb"
SERIES = ("#2166ac", "#d6604d", "#1b8a5a", "#8856a7", "#b8860b", "#4d9fb8", "#a6456b", "#6b7a2f")
LOSSES = {
    "ideal": "#7f8c9b", "communication": "#d6604d", "stragglers": "#b8860b", "input": "#1b8a5a",
    "optimizer": "#8856a7", "stolen cores": "#2166ac", "small batch": "#4d9fb8", "unexplained": "#b0b1b3",
}  # fmt: skip
STYLE: Any = {
    "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "axes.edgecolor": PALE, "axes.labelcolor": INK,
    "xtick.color": INK, "ytick.color": INK, "text.color": INK, "axes.grid": True, "grid.color": PALE, "grid.alpha": 0.35,
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False, "figure.facecolor": PAPER, "axes.facecolor": PAPER,
}  # fmt: skip

DODGE = 0.015  # of the axis' length, between the points that several lines have at one place

Drawing = Callable[[Axes], None]


def image(
    draw: Drawing, form: str = "svg", size: tuple[float, float] = (6.0, 3.8), watermark: str = ""
) -> bytes:
    """Draw one plot. ``watermark`` is written above it: emulated figures say so on the figure itself."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        if watermark:
            axes.set_title(watermark, loc="right", fontsize=8.5, style="italic")
        buffer = io.BytesIO()
        metadata: dict[str, Any] = {"Date": None} if form == "svg" else {}
        figure.savefig(buffer, format=form, dpi=160, metadata=metadata)
        return buffer.getvalue()


def inline(svg: bytes, label: str) -> str:
    """SVG for an HTML page: no prologue, scales with the page, colours from CSS variables, identifiers unique by ``label``."""
    text = svg.decode("utf-8")
    text = text[text.index("<svg") :]
    prefix = re.sub(r"\W+", "-", label)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    text = re.sub(r'xlink:href="#', f'xlink:href="#{prefix}-', text)
    text = re.sub(
        r'<svg ([^>]*?)width="[^"]*pt" height="[^"]*pt"',
        rf'<svg role="img" aria-label="{label}" \1',
        text,
        count=1,
    )
    text = re.sub(
        r'<svg ([^>]*?)height="[^"]*pt" ([^>]*?)width="[^"]*pt"',
        rf'<svg role="img" aria-label="{label}" \1\2',
        text,
        count=1,
    )
    for colour, variable in ((INK, "--ink"), (PALE, "--pale"), (PAPER, "--paper")):
        text = text.replace(colour, f"var({variable})")
    return text


def _legend(axes: Axes) -> None:
    """Below the axes, where it covers nothing; the figure grows for more than two lines of it."""
    handles, labels = axes.get_legend_handles_labels()
    figure = axes.figure
    assert isinstance(figure, Figure)
    columns = max(1, min(4, 88 // (max(map(len, labels)) + 7)))
    figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=8.5)
    figure.set_figheight(figure.get_figheight() + 0.18 * max(0, -(-len(labels) // columns) - 2))


def curves(rows: Sequence[Row], value: str, ideal: bool, label: str) -> Drawing:
    """``value`` (speedup or efficiency) against workers, a line an exchange, the ideal dashed, intervals as bars."""

    def draw(axes: Axes) -> None:
        done = [row for row in rows if getattr(row, value) is not None]
        workers = sorted({row.workers for row in done})
        if ideal and workers:
            ends = [1, max(workers)] if len(workers) > 1 else [1, max(2, workers[0])]
            axes.plot(
                ends,
                ends if value == "speedup" else [1, 1],
                "--",
                color=PALE,
                label="ideal",
                zorder=1,
            )
        names = list(dict.fromkeys(_name(row, rows) for row in done))
        length = max(workers[-1] - workers[0], 1) if workers else 1
        for index, name in enumerate(names):
            aside = DODGE * length * (index - (len(names) - 1) / 2)
            own = sorted(
                (row for row in done if _name(row, rows) == name), key=lambda row: row.workers
            )
            scale = [1.0 if value == "speedup" else 1 / row.workers for row in own]
            errors = [(row.speedup_ci95 or 0.0) * s for row, s in zip(own, scale, strict=True)]
            colour = SERIES[index % len(SERIES)]
            axes.errorbar(
                [row.workers + aside for row in own], [getattr(row, value) for row in own], yerr=errors, marker="o", ms=4.5, lw=1.7,
                capsize=3, color=colour, label=name, zorder=3,
            )  # fmt: skip
            over = [row for row in own if row.oversubscribed]
            if over:
                axes.plot(
                    [r.workers + aside for r in over],
                    [getattr(r, value) for r in over],
                    "o",
                    ms=9,
                    mfc="none",
                    mec=colour,
                    ls="none",
                )
        if any(row.oversubscribed for row in done):
            axes.plot([], [], "o", ms=9, mfc="none", mec=INK, ls="none", label="oversubscribed")
        axes.set_xlabel("workers")
        axes.set_ylabel(label)
        axes.set_xticks(workers, [str(w) for w in workers])
        top = (
            1.0 if value == "efficiency" else max(workers, default=1)
        )  # a wide interval must not flatten the curves
        axes.set_ylim(0, 1.12 * max([top, *(getattr(row, value) for row in done)]))
        _legend(axes)

    return draw


def _name(row: Row, rows: Sequence[Row]) -> str:
    several = len({r.config for r in rows}) > 1
    varied = " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in row.variant.items())
    return " ".join(
        word for word in ([row.config] if several else []) + [row.exchange, varied] if word
    )


def anatomy(losses: Sequence[Loss]) -> Drawing:
    """The step of each cell as a stacked bar: the ideal, then each cause of loss. Causes that gain time hang below zero."""

    def draw(axes: Axes) -> None:
        labels = [
            f"{loss.exchange}\n{loss.workers} w" + "".join(f"\n{v}" for v in loss.variant.values())
            for loss in losses
        ]
        top, below = [0.0] * len(losses), [0.0] * len(losses)
        layers = {"ideal": [1000 * loss.ideal_s for loss in losses]}
        layers |= {name: [1000 * loss.causes[name] for loss in losses] for name in losses[0].causes}
        for name, heights in layers.items():
            if max(map(abs, heights)) < 0.005 * max(layers["ideal"]):
                continue  # too thin to be seen
            starts = [
                high if height >= 0 else low
                for height, high, low in zip(heights, top, below, strict=True)
            ]
            axes.bar(
                range(len(losses)),
                heights,
                bottom=starts,
                width=0.62,
                label=name,
                color=LOSSES[name],
            )
            top = [high + max(0.0, height) for high, height in zip(top, heights, strict=True)]
            below = [low + min(0.0, height) for low, height in zip(below, heights, strict=True)]
        axes.axhline(0, color=PALE, linewidth=0.8)
        axes.set_ylim(1.1 * min(below), 1.06 * max(top))
        axes.set_xticks(range(len(losses)), labels, fontsize=8.5)
        axes.set_ylabel("ms a step")
        axes.grid(axis="x", visible=False)
        _legend(axes)

    return draw


def predicted(points: Sequence[Prediction]) -> Drawing:
    """Predicted against measured step time, both logarithmic, with the line on which they agree."""

    def draw(axes: Axes) -> None:
        values = [
            getattr(point, key) * 1000 for point in points for key in ("measured_s", "predicted_s")
        ]
        ends = [min(values) * 0.8, max(values) * 1.25]
        axes.plot(ends, ends, "--", color=PALE, label="predicted = measured")
        for index, name in enumerate(dict.fromkeys(point.exchange for point in points)):
            own = [point for point in points if point.exchange == name]
            colour = SERIES[index % len(SERIES)]
            axes.plot([], [], "o", color=colour, label=name)
            for fitted in (False, True):
                some = [point for point in own if point.in_fit is fitted]
                x, y = (
                    [1000 * getattr(point, key) for point in some]
                    for key in ("measured_s", "predicted_s")
                )
                axes.plot(x, y, "o", color=colour, mfc="none" if fitted else colour)
        if any(point.in_fit for point in points):
            axes.plot([], [], "o", color=INK, mfc="none", label="hollow: residual of the fit")
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_minor_formatter(
                lambda value, _: (
                    f"{value:g}" if value / 10 ** math.floor(math.log10(value)) in (2, 5) else ""
                )
            )
        axes.set_xlabel("measured, ms a step")
        axes.set_ylabel("predicted, ms a step")
        _legend(axes)

    return draw


def traffic(rows: Sequence[Row]) -> Drawing:
    """Megabytes that one worker sends in a step: counted, or those of the collective's schedule (of a ring for ``native`` and ``horovod``)."""

    def draw(axes: Axes) -> None:
        own = [row for row in rows if row.bytes_sent][::-1]
        places = range(len(own))
        for kind, look in (("counted", {}), ("the schedule's", {"hatch": "//", "alpha": 0.6})):
            some = [
                (place, (row.bytes_sent or 0.0) / 1e6)
                for place, row in zip(places, own, strict=True)
                if row.bytes_sent_is == kind
            ]
            if some:
                axes.barh(*zip(*some, strict=True), color=SERIES[0], label=kind, **look)  # type: ignore[arg-type]
        axes.set_yticks(places, [f"{_name(row, rows)}, {row.workers} w" for row in own])
        _legend(axes)
        axes.set_xlabel("MB sent by a worker in a step")
        axes.grid(axis="y", visible=False)

    return draw


def _beside(own: Sequence[Mapping[str, Any]]) -> str:
    """How many machines a strategy takes beside its workers."""
    extra = max(row["machines"] - row["workers"] for row in own)
    return f" (+{extra})" if extra else ""


def simulation(rows: Sequence[Mapping[str, Any]], reach: int | None) -> Drawing:
    """Predicted speed-up against workers, both logarithmic; beyond ``reach`` workers dashed."""

    def draw(axes: Axes) -> None:
        counts = sorted({row["workers"] for row in rows})
        axes.plot(counts, counts, ":", color=PALE, label="ideal")
        for index, name in enumerate(dict.fromkeys(row["strategy"] for row in rows)):
            own = [row for row in rows if row["strategy"] == name]
            style: Any = {
                "color": SERIES[index % len(SERIES)],
                "lw": 1.6,
                "marker": "os^vDPX*"[index // len(SERIES) % 8],
                "ms": 3.5,
            }
            near = [row for row in own if reach is None or row["workers"] <= reach]
            far = [row for row in own if reach is not None and row["workers"] > reach]
            axes.plot(
                [r["workers"] for r in near],
                [r["speedup"] for r in near],
                "-",
                label=name + _beside(own),
                **style,
            )
            joined = near[-1:] + far
            if far:
                axes.plot(
                    [r["workers"] for r in joined], [r["speedup"] for r in joined], "--", **style
                )
        if reach is not None and counts[-1] > reach:
            axes.plot([], [], "--", color=INK, lw=1.6, label=f"far: beyond {reach}")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(counts, [str(count) for count in counts], fontsize=8)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        beside = any(row["machines"] > row["workers"] for row in rows)
        axes.set_xlabel("workers; (+N): N machines beside them" if beside else "workers")
        axes.set_ylabel("speed-up")
        _legend(axes)

    return draw
