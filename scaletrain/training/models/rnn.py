"""A recurrent network of tanh units without gates, torch's own."""

from typing import Any

from torch import nn

from scaletrain.training.models.recurrent import Readout, RecurrentOptions

OPTIONS = RecurrentOptions


def model(**options: Any) -> nn.Module:
    """Return the network: (n, t, inputs) -> (n, classes) logits.

    Args:
        options: those of ``RecurrentOptions``.
    """
    chosen = RecurrentOptions(**options)
    layer = nn.RNN(chosen.inputs, chosen.hidden, batch_first=True)
    return Readout(layer, chosen.hidden, chosen.classes, chosen.every_step)
