"""Values that options of several commands take: lists with commas, and run directories."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from scaletrain.errors import UserError

Plan = TypeVar("Plan")
Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def output_options(command: Decorated) -> Decorated:
    """Add the options of a job's output, which ``screen.Display`` takes."""
    show = click.option(
        "--show",
        type=click.Choice(("all", "0", "errors")),
        default="all",
        show_default=True,
        help="Output to show: of all ranks, of rank 0, or standard error of all.",
    )
    log_format = click.option(
        "--log-format",
        type=click.Choice(("text", "json")),
        default="text",
        show_default=True,
        help="Form of the output: as it is, or one JSON object a line.",
    )
    return show(log_format(command))


def names(context: click.Context, parameter: click.Parameter, text: str) -> tuple[str, ...]:
    """Return the names of a list such as ``ring,tree``, each once, in the order they were typed."""
    # A dict keeps the order; a name that is given twice would be measured twice.
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def numbers(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as ``1,2,4``, each once, in the order they were typed.

    Raises:
        click.BadParameter: one of them is no number, or less than 1.
    """
    try:
        values = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        raise click.BadParameter(f"{text!r}: expected numbers with commas, such as 1,2,4") from None
    if min(values) < 1:
        raise click.BadParameter(f"{text!r}: numbers start at 1")
    return values


def check_shared(run_dir: Path | None, is_part: bool) -> None:
    """Raise UserError if the hosts of a job have no run directory in common.

    Args:
        run_dir: that a person gave; None: each host would make up a name of its own.
        is_part: other hosts start their parts of the job, with the same command.
    """
    if is_part and run_dir is None:
        raise UserError(
            "--run-dir: is missing; the hosts of a job have one in common (allowed: a directory"
            " that all of them see)"
        )


def directory_name(stem: str) -> Path:
    """Return the name of the run directory of a command that begins now and was given none."""
    return Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def new_directory(name: Path, plan: Plan, planned: Callable[[Path], Plan]) -> tuple[Path, Plan]:
    """Make a run directory that no other command has; return it and the plan for it.

    Args:
        name: the directory, unless another command has taken it.
        plan: for that name.
        planned: makes the plan for another one. Planning may start programs, such as mpirun.
    """
    from scaletrain.run import claim

    directory = claim.new_directory(name)
    return directory, plan if directory == name else planned(directory)
