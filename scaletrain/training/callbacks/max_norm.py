"""Keeps the weights of every unit within a norm, as the paper on dropout does."""

from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Gt
from torch import Tensor, nn

from scaletrain.needs import Needs
from scaletrain.run.records import StepRecord
from scaletrain.training.callbacks import Callback

if TYPE_CHECKING:
    from scaletrain.training.trainer import Trainer

NEEDS = Needs(own_weights=True)


class MaxNorm(Callback):
    """Scales down the incoming weights of units after each step.

    Weights are equal on all ranks, so every rank scales alike and none communicates.

    Source: N. Srivastava et al. 2014, "Dropout", JMLR 15, section 5.1.
    """

    def __init__(self, weights: list[Tensor], limit: float):
        self._weights = weights
        self._limit = limit

    def after_step(self, record: StepRecord) -> None:
        """Scale the rows that are longer than the limit to the limit."""
        with torch.no_grad():
            for weight in self._weights:
                norms = weight.flatten(1).norm(dim=1).clamp(min=1e-12)
                factors = (self._limit / norms).clamp(max=1.0)
                weight.mul_(factors.view(-1, *[1] * (weight.dim() - 1)))


def callback(trainer: "Trainer", *, limit: Annotated[float, Gt(0)] = 3.0) -> Callback:
    """Return the callback.

    Args:
        limit: the largest Euclidean norm of the weights into a unit of a convolution or full layer.
    """
    weights: list[Tensor] = []
    for module in trainer.module.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            weights.append(module.weight)
    return MaxNorm(weights, limit)
