"""The one kind of error that the reader can mend: shown as a single line, never as a traceback."""

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """A person's mistake: a key, a value, a missing file.

    Its text is one line: the mistake, and its correction. Commands print it as
    ``scaletrain: error: ...`` and exit with its status.
    """

    exit_code = 2


class TrainingError(UserError):
    """Training that cannot go on, though nobody made a mistake: a loss that is not finite."""

    exit_code = 1


class Diverged(TrainingError):
    """The loss, the gradients or the weights of a training are not finite any more.

    It is a result of the training, too: recipes judge it.
    """


def unknown(what: str, value: str, allowed: Iterable[str], meant: str | None = None) -> UserError:
    """Return the error for a name that is not on a list; it shows the list and the nearest match.

    Args:
        what: the beginning of the line.
        value: the name.
        allowed: the list.
        meant: what the person probably means; None: the nearest on the list.

    >>> print(unknown("exchange", "rong", ["ring", "tree"]))
    exchange: 'rong' is not known; did you mean 'ring'? (allowed: ring, tree)
    """
    choices = sorted(allowed)
    hint = f"; did you mean {meant!r}?" if meant else did_you_mean(value, choices)
    listed = ", ".join(choices) or "nothing"
    return UserError(f"{what}: {value!r} is not known{hint} (allowed: {listed})")


def did_you_mean(value: str, choices: Sequence[str]) -> str:
    """Return the nearest match as part of a sentence; empty if none is near."""
    # 0.5 forgives two wrong letters in a name of four; difflib's own 0.6 forgives one.
    near = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""
