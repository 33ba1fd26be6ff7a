"""The report as one self-contained HTML page, as Markdown, and as images."""

from collections.abc import Sequence
from pathlib import Path

import jinja2

from scaletrain.scaling.explain import headline
from scaletrain.scaling.measure import servers
from scaletrain.scaling.measure.intervals import ONE_RUN
from scaletrain.scaling.model import Prediction, Report, Row
from scaletrain.scaling.show import plots


def _drawings(report: Report) -> dict[str, tuple[str, plots.Drawing]]:
    """Every plot that this report has the figures for: name -> (title, drawing)."""
    rows = report.rows
    drawings: dict[str, tuple[str, plots.Drawing]] = {}
    if any(row.speedup is not None for row in rows):
        drawings["speedup"] = (
            "Speed-up",
            plots.curves(rows, "speedup", True, "times the baseline"),
        )
        drawings["efficiency"] = (
            "Efficiency",
            plots.curves(rows, "efficiency", True, "speed-up / workers"),
        )
    if report.losses:
        drawings["anatomy"] = ("Anatomy of a step", plots.anatomy(report.losses))
    if report.predictions:
        drawings["predicted"] = (
            "Predicted against measured",
            plots.predicted(report.predictions),
        )
    if any(row.bytes_sent for row in rows):
        drawings["traffic"] = ("Traffic", plots.traffic(rows))
    return drawings


def images(report: Report, form: str) -> dict[str, bytes]:
    """Stand-alone images (svg or png) by name."""
    mark = watermark(report)
    return {
        name: plots.image(draw, form, watermark=mark)
        for name, (_, draw) in _drawings(report).items()
    }


def html(report: Report) -> str:
    """The page: no script, no network, light and dark, phone and print."""
    mark = watermark(report)
    figures = [
        {
            "name": name,
            "title": title,
            "svg": plots.inline(plots.image(draw, watermark=mark), title),
        }
        for name, (title, draw) in _drawings(report).items()
    ]
    return _template("report.html").render(
        report=report,
        facts=report.header.to_json(),
        figures=figures,
        several=report.has_variants,
        note=note(report),
    )


def markdown(report: Report) -> str:
    timed = any(row.target_s is not None for row in report.rows)
    return _template("report.md").render(
        report=report, several=report.has_variants, timed=timed, note=note(report)
    )


def watermark(report: Report) -> str:
    """What every figure of a report has to say of itself."""
    marks = ["EMULATED"] * bool(report.header.emulated)
    return ", ".join(filter(None, [*marks, headline.oversubscribed(report)]))


def note(report: Report) -> str:
    """What ± means here; without repeats there is none."""
    repeats = report.header.repeats
    if repeats < 2:
        return f"{ONE_RUN.capitalize()}."
    return (
        f"± is the 95 % confidence interval of the mean over {repeats} repeats (Student's t)."
        " A cell of one run has none. Speed-up is the ratio of the mean samples/s; its interval"
        " pairs each repeat with the baseline's."
    )


def to_target(row: Row) -> str:
    """Seconds until the target accuracy, over the repeats that reached it; how many did where not all."""
    if row.target_s is None:
        return "–"
    some = f" ({row.target_runs} of {row.repeats} runs)" if row.target_runs < row.repeats else ""
    return f"{row.target_s:.1f}{_plus(row.target_s_ci95, '.1f')}{some}"


def outcome(row: Row) -> str:
    """What became of a cell without a finished run."""
    return f"failed: {'; '.join(dict.fromkeys(row.failures))}" if row.failures else "not measured"


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=name.endswith(".html"), trim_blocks=True, lstrip_blocks=True,
        keep_trailing_newline=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {
        "oversubscribed": headline.oversubscribed,
        "ms": _ms,
        "number": _number,
        "number4": _number4,
        "plus": _plus,
        "outcome": outcome,
        "to_target": to_target,
        "fitted_note": _fitted_note,
        "of_servers": servers.text,
    }
    return environment.get_template(name)


def _ms(seconds: float | None, ci95: float | None = None) -> str:
    return (
        "–"
        if seconds is None
        else f"{1000 * seconds:.2f}{_plus(None if ci95 is None else 1000 * ci95)}"
    )


def _number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else f"{value:{form}}"


def _number4(seconds: float) -> str:
    return f"{1000 * seconds:.4f}"


def _fitted_note(points: Sequence[Prediction]) -> str:
    """How far the comparison is a prediction: what the model was calibrated on cannot test it."""
    tested = sum(not point.in_fit for point in points)
    told = "Computation is that of the same workers without an exchange; the network is calibrated on this report's own steps."
    if not tested:
        return (
            told
            + " All of these were used to calibrate it: the errors are residuals, not a test of the model."
        )
    return (
        told
        + f" {tested} of {len(points)} were left out of the calibration: those are predictions, the others residuals."
    )


def _plus(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else f" ± {value:{form}}"
