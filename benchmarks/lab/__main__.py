"""The command of the lab, run from the repository's root: ``python -m benchmarks.lab --help``.

Each file here with a ``command`` is one of its commands.
"""

import importlib
import pkgutil
import sys

import click

from benchmarks import lab as folder
from scaletrain.errors import UserError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def lab() -> None:
    """Measure this repository's own pages in benchmarks/results.

    \b
    Example:
      python -m benchmarks.lab firecaffe --hosts 2,4
    """


def main() -> None:
    """Run a command. A person's mistake ends in one line and status 2."""
    for found in pkgutil.iter_modules(folder.__path__, "benchmarks.lab."):
        command = getattr(importlib.import_module(found.name), "command", None)
        if command is not None:
            lab.add_command(command)
    try:
        lab(prog_name="python -m benchmarks.lab")
    except UserError as error:
        click.echo(f"benchmarks.lab: error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
