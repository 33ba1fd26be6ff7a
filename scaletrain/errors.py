"""The one kind of error that is the reader's to mend: shown as a single line, never as a traceback."""

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """A person's mistake (a key, a value, a missing file): one line that says what is wrong and what would be right.

    Commands print it as ``scaletrain: error: ...`` and exit with status 2.
    """


def unknown(what: str, value: str, allowed: Iterable[str]) -> UserError:
    """A ``UserError`` for a name that is not on the list: it shows the list and the nearest match."""
    choices = sorted(allowed)
    near = did_you_mean(value, choices)
    return UserError(
        f"{what}: {value!r} is not known{near} (allowed: {', '.join(choices) or 'nothing'})"
    )


def did_you_mean(value: str, choices: Sequence[str]) -> str:
    """The nearest match as part of a sentence; empty where none is near."""
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
