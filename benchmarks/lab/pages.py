"""Results as JSON, and their pages in Markdown, from the templates beside this file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import jinja2

from scaletrain.run.atomic import write_json, write_text
from scaletrain.scaling.show import results

_TEMPLATES = Path(__file__).parent / "templates"


def markdown(template: str, **values: Any) -> str:
    """Return a page.

    In a template, ``{{ value | form(".1f") }}`` formats a number as Python does.

    Args:
        template: the file's name in ``templates``.
        values: the template's variables.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["form"] = lambda value, form: format(value, form)
    environment.filters["verdict"] = lambda met: "met" if met else "MISSED"
    return environment.get_template(template).render(values)


def out_option(name: str) -> Callable[[Any], Any]:
    """Return the option ``--out`` of a command whose results are called ``name``."""
    return click.option(
        "--out",
        type=click.Path(path_type=Path),
        default=Path("benchmarks/results"),
        show_default=True,
        help=f"Where {name}.md and {name}.json go.",
    )


def publish(out: Path, name: str, measured: Mapping[str, Any], **values: Any) -> None:
    """Write results as ``NAME.json``, and the page about them as ``NAME.md``.

    Args:
        out: the folder; made if it is missing.
        name: of the results and of their template.
        measured: the results; ``environment`` is that of the machine, which the template gets as
            ``where``, a line.
        values: further variables of the template.
    """
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / f"{name}.json", measured)
    where = results.measured_on(measured["environment"])
    write_text(out / f"{name}.md", markdown(f"{name}.md", where=where, **values))
