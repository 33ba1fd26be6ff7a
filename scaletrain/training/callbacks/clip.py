"""Clips the gradient of an update: by its global norm, or each value."""

from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt
from torch import nn

from scaletrain.errors import UserError
from scaletrain.needs import Needs
from scaletrain.training.callbacks import Callback

if TYPE_CHECKING:
    from scaletrain.training.trainer import Trainer

NEEDS = Needs(one_of=("norm", "value"))


class Clip(Callback):
    """Clips the gradients that the optimizer gets.

    They are averaged, so every rank clips alike and none communicates. Where each worker's gradient
    is an update of its own (parameter server, asynchronous and local modes), each is clipped. Where
    only servers have the mean (mode sync), they clip it.
    """

    changes_gradients = True

    def __init__(self, module: nn.Module, norm: float | None, value: float | None):
        self._parameters = [*module.parameters()]
        self._norm = norm
        self._value = value

    def after_backward(self) -> None:
        """Scale all gradients to the norm at most, then cut each value."""
        if self._norm is not None:
            nn.utils.clip_grad_norm_(self._parameters, self._norm)
        if self._value is not None:
            nn.utils.clip_grad_value_(self._parameters, self._value)


def callback(
    trainer: "Trainer",
    *,
    norm: Annotated[float, Gt(0)] | None = None,
    value: Annotated[float, Gt(0)] | None = None,
) -> Callback:
    """Return the callback.

    Args:
        norm: the largest Euclidean norm of all gradients together.
        value: the largest absolute value of a gradient's element.

    Raises:
        UserError: servers clip, and a clip before this one has told them to.
    """
    try:
        if trainer.exchange.clip(norm, value):
            return Callback()  # there is nothing left to do
    except UserError as mistake:
        raise UserError(f"callbacks: clip: {mistake}") from None
    return Clip(trainer.module, norm, value)
