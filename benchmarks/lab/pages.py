"""Pages in Markdown, from the templates beside this file."""

from pathlib import Path
from typing import Any

import jinja2

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
