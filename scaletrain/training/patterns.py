"""Patterns for the names of parameters and modules, as configurations have them."""

import fnmatch
from collections.abc import Iterable, Sequence

from scaletrain.errors import UserError

_MOST_NAMES = 6  # in a line


def matches(pattern: str, name: str) -> bool:
    """Return True if a pattern matches a parameter's name, or a part of it between dots.

    >>> [matches(pattern, "layers.0.norm1.bias") for pattern in ("bias", "norm*", "layers.0.*")]
    [True, True, True]
    >>> matches("nor", "layers.0.norm1.bias")
    False
    """
    return any(fnmatch.fnmatchcase(part, pattern) for part in (name, *name.split(".")))


def check(patterns: Iterable[str], names: Sequence[str], key: str, kind: str = "parameter") -> None:
    """Raise ``UserError`` if a pattern matches none of the names.

    Args:
        patterns: of a configuration.
        names: of the model's parameters.
        key: of the configuration.
        kind: of things that have the names, such as parameters.
    """
    for pattern in patterns:
        if not any(matches(pattern, name) for name in names):
            raise UserError(
                f"{key}: {pattern!r} matches no {kind} of the model (there are {listed(names)})"
            )


def listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are.

    >>> listed(["weight", "bias"])
    'weight, bias'
    """
    if len(names) <= _MOST_NAMES:
        return ", ".join(names)
    return f"{', '.join(names[:_MOST_NAMES])} and {len(names) - _MOST_NAMES} more"
