"""Values that options of several commands take: lists with commas."""

import click


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
