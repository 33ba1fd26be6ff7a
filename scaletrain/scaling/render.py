"""The report as one self-contained HTML page, as Markdown, and as images."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from scaletrain.scaling import plots


def _drawings(report: Mapping[str, Any]) -> dict[str, tuple[str, plots.Drawing]]:
    """Every plot that this report has the figures for: name -> (title, drawing)."""
    rows = report["rows"]
    drawings: dict[str, tuple[str, plots.Drawing]] = {}
    if any(row["speedup"] is not None for row in rows):
        drawings["speedup"] = ("Speed-up", plots.curves(rows, "speedup", True, "times the baseline"))
        drawings["efficiency"] = ("Efficiency", plots.curves(rows, "efficiency", True, "speed-up / workers"))
    if report["losses"]:
        drawings["anatomy"] = ("Anatomy of a step", plots.anatomy(report["losses"]))
    if report.get("predictions"):
        drawings["predicted"] = ("Predicted against measured", plots.predicted(report["predictions"]))
    if any(row["bytes_sent"] is not None for row in rows):
        drawings["traffic"] = ("Traffic", plots.traffic(rows))
    return drawings


def images(report: Mapping[str, Any], form: str) -> dict[str, bytes]:
    """Stand-alone images (svg or png) by name."""
    mark = "EMULATED" if report["header"]["emulated"] else ""
    return {name: plots.image(draw, form, watermark=mark) for name, (_, draw) in _drawings(report).items()}


def html(report: Mapping[str, Any]) -> str:
    """The page: no script, no network, light and dark, phone and print."""
    mark = "EMULATED" if report["header"]["emulated"] else ""
    figures = [
        {"name": name, "title": title, "svg": plots.inline(plots.image(draw, watermark=mark), title)}
        for name, (title, draw) in _drawings(report).items()
    ]
    return _template("report.html").render(report=report, figures=figures, several=_several(report))


def markdown(report: Mapping[str, Any]) -> str:
    return _template("report.md").render(report=report, several=_several(report))


def _several(report: Mapping[str, Any]) -> bool:
    return len({(row["config"], str(row["variant"])) for row in report["rows"]}) > 1


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=name.endswith(".html"), trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    environment.filters |= {"ms": _ms, "number": _number, "plus": _plus}
    return environment.get_template(name)


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1000 * seconds:.2f}"


def _number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else f"{value:{form}}"


def _plus(value: float | None, form: str = ".2f") -> str:
    return "" if value is None else f" ± {value:{form}}"
