"""What recurrent models have in common: logits from the outputs of their steps."""

from torch import Tensor, nn


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
