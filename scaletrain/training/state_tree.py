"""State of any shape as JSON beside tensors, and back.

Optimizers and modules keep numbers, text, tensors, and lists and dicts of these. JSON alone would
lose tuples, keys that are not text, and tensors.

>>> tensors = {}
>>> flatten({"step": 3, "betas": (0.9, 0.99)}, "adam", tensors)
{'dict': [['step', 3], ['betas', {'tuple': [0.9, 0.99]}]]}
>>> rebuild(flatten({"step": 3, "betas": (0.9, 0.99)}, "adam", tensors), tensors)
{'step': 3, 'betas': (0.9, 0.99)}
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_Plain = bool | int | float | str | None


class Unsaveable(Exception):
    """A value is none of those that can be saved. The text names it."""


def flatten(value: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """Return a value as JSON.

    Args:
        value: the state.
        name: its name in errors, and the beginning of its tensors' names.
        tensors: the value's tensors are added to it.

    Raises:
        Unsaveable: a part of it is of another kind.
    """
    if isinstance(value, Tensor):
        while name in tensors:
            name += "_"  # names with dots in them may meet
        tensors[name] = value
        return {"tensor": name}
    if isinstance(value, _Plain):
        return value
    if type(value) in (list, tuple):
        parts = [flatten(part, f"{name}.{index}", tensors) for index, part in enumerate(value)]
        return {type(value).__name__: parts}
    if isinstance(value, dict):
        pairs = []
        for key, part in value.items():
            if not isinstance(key, _Plain):
                raise Unsaveable(f"{name}, which has a key of type {type(key).__name__}")
            pairs.append([key, flatten(part, f"{name}.{key}", tensors)])
        return {"dict": pairs}
    raise Unsaveable(f"{name}, of type {type(value).__name__}")


def rebuild(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the value that ``flatten`` was given.

    Args:
        plain: its result.
        tensors: that it added, or their copies.
    """
    if not isinstance(plain, dict):
        return plain
    [(kind, content)] = plain.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: rebuild(part, tensors) for key, part in content}
    parts = [rebuild(part, tensors) for part in content]
    return tuple(parts) if kind == "tuple" else parts
