"""The report as one self-contained HTML page, as Markdown, and as images."""

import dataclasses
from pathlib import Path

import jinja2

from scaletrain.scaling.explain import headline
from scaletrain.scaling.model import Report
from scaletrain.scaling.show import page_tables, plots, text


@dataclasses.dataclass(frozen=True)
class Figure:
    """A plot in the page."""

    name: str
    title: str
    svg: str


def images(report: Report, form: str) -> dict[str, bytes]:
    """Return the report's plots as stand-alone images by name. ``form``: svg or png."""
    mark = text.watermark(report)
    return {
        plot.name: plots.image(plot.draw, form, watermark=mark) for plot in plots.of_report(report)
    }


def html(report: Report) -> str:
    """Return the page: no script, no network, light and dark, phone and print."""
    mark = text.watermark(report)
    figures = []
    for plot in plots.of_report(report):
        svg = plots.inline(plots.image(plot.draw, watermark=mark), plot.title)
        figures.append(Figure(plot.name, plot.title, svg))
    return template("report.html").render(
        report=report,
        environment=text.environment(report.header),
        tables=page_tables,
        figures=figures,
    )


def markdown(report: Report) -> str:
    """Return the report as Markdown."""
    return template("report.md").render(report=report, tables=page_tables)


def template(name: str) -> jinja2.Template:
    """Return a page's template, with the filters for a report."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        # Markdown would show the escapes.
        autoescape=name.endswith(".html"),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        # A misspelt field is an error, not an empty cell.
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {
        "calibration": text.calibration,
        "note": text.note,
        "number": text.number,
        "outlying": text.outlying,
        "oversubscribed": headline.oversubscribed,
    }
    return environment.get_template(name)
