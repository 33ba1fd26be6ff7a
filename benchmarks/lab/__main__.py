"""The command of the lab, run from the repository's root: ``python -m benchmarks.lab --help``."""

import sys

import click

from benchmarks.lab import (
    binding,
    cases,
    diagnosis,
    faults,
    firecaffe,
    fsdp,
    overhead,
    prediction,
    recipe_workers,
    start,
    statistics,
)
from scaletrain.errors import UserError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def lab() -> None:
    """Measure this repository's own pages in benchmarks/results.

    \b
    Example:
      python -m benchmarks.lab firecaffe --hosts 2,4
    """


lab.add_command(binding.command)
lab.add_command(faults.command)
lab.add_command(diagnosis.command)
lab.add_command(cases.command)
lab.add_command(firecaffe.command)
lab.add_command(fsdp.command)
lab.add_command(overhead.command)
lab.add_command(prediction.command)
lab.add_command(recipe_workers.command)
lab.add_command(start.command)
lab.add_command(statistics.command)


def main() -> None:
    """Run a command. A person's mistake ends in one line and status 2."""
    try:
        lab(prog_name="python -m benchmarks.lab")
    except UserError as error:
        click.echo(f"benchmarks.lab: error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
