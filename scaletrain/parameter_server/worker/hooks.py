"""Hooks of a person's model that stay with it when it is copied or pickled."""

from collections.abc import Callable
from typing import Any


class ModelHook:
    """Calls a function for the model that it was registered with, and does nothing for its copies.

    Copies of a model, such as averages of its weights, have copies of its hooks. They have nothing
    to do with the servers, whose connections cannot be copied either.

    >>> import copy
    >>> hook = ModelHook(print)
    >>> hook("called")
    called
    >>> copy.deepcopy(hook)("called")
    """

    def __init__(self, call: Callable[..., object] | None = None):
        self._call = call

    def __call__(self, *arguments: object) -> None:
        """Call the function."""
        if self._call is not None:
            self._call(*arguments)

    def __reduce__(self) -> Any:
        """Return what makes a copy: a hook that does nothing."""
        return ModelHook, ()
