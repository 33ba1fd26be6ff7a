"""What recurrent models have in common: options, and logits from the outputs of their steps."""

import dataclasses
from typing import Annotated

from annotated_types import Ge
from torch import Tensor, nn


@dataclasses.dataclass(frozen=True)
class RecurrentOptions:
    """The options of a recurrent network: (n, t, inputs) -> (n, classes) logits.

    Attributes:
        inputs: features of each step.
        hidden: units.
        classes: number of logits.
        every_step: logits after every step, (n, classes, t), not after the last alone.
    """

    inputs: Annotated[int, Ge(1)] = 1
    hidden: Annotated[int, Ge(1)] = 64
    classes: Annotated[int, Ge(1)] = 10
    every_step: bool = False


class Readout(nn.Module):
    """Logits after the last step of a recurrent layer, or after each.

    Args:
        layer: (n, t, inputs) -> (n, t, hidden), or a pair that begins with it.
        hidden: outputs of a step.
        classes: number of logits.
        every_step: after each step.
    """

    def __init__(self, layer: nn.Module, hidden: int, classes: int, every_step: bool):
        super().__init__()
        self.layer = layer
        self.logits = nn.Linear(hidden, classes)
        self._every_step = every_step

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, t, inputs) -> (n, classes), or (n, classes, t) with ``every_step``."""
        outputs = self.layer(inputs)
        if isinstance(outputs, tuple):  # torch's layers add their last state
            outputs = outputs[0]
        if self._every_step:
            return self.logits(outputs).transpose(1, 2)
        return self.logits(outputs[:, -1])
