"""A multilayer perceptron: flattens its input; ReLU between layers, and dropout on request."""

from itertools import pairwise
from typing import Annotated

from annotated_types import Ge, Lt, MinLen
from torch import nn


def model(
    *,
    sizes: Annotated[list[Annotated[int, Ge(1)]], MinLen(2)] = [64, 128, 10],  # noqa: B006 (never changed)
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
    input_dropout: Annotated[float, Ge(0), Lt(1)] = 0.0,
) -> nn.Module:
    """Return the network.

    Args:
        sizes: features of the input, of each hidden layer, and of the output.
        dropout: the part of the hidden units that is left out in training.
        input_dropout: likewise of the inputs.
    """
    layers: list[nn.Module] = [nn.Flatten()]
    if input_dropout:
        layers.append(nn.Dropout(input_dropout))
    for index, (inputs, outputs) in enumerate(pairwise(sizes), 1):
        layers.append(nn.Linear(inputs, outputs))
        # Logits may be negative: no ReLU after the last layer.
        if index < len(sizes) - 1:
            layers.append(nn.ReLU())
            if dropout:
                layers.append(nn.Dropout(dropout))
    return nn.Sequential(*layers)
