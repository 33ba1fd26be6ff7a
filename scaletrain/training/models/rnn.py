"""A recurrent network of tanh units without gates, torch's own."""

from typing import Annotated

from annotated_types import Ge
from torch import nn

from scaletrain.training.models.recurrent import Readout


def model(
    *,
    inputs: Annotated[int, Ge(1)] = 1,
    hidden: Annotated[int, Ge(1)] = 64,
    classes: Annotated[int, Ge(1)] = 10,
    every_step: bool = False,
) -> nn.Module:
    """Return the network: (n, t, inputs) -> (n, classes) logits.

    Args:
        inputs: features of each step.
        hidden: units.
        classes: number of logits.
        every_step: logits after every step, (n, classes, t), not after the last alone.
    """
    return Readout(nn.RNN(inputs, hidden, batch_first=True), hidden, classes, every_step)
