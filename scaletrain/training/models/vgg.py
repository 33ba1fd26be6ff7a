"""VGG with 16 or 19 layers of weights (138,357,544 or 143,667,240 parameters)."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt
from torch import nn

from scaletrain.training.models import initialise, scaled

_DEPTHS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # convolutions a block
_WIDTHS = (64, 128, 256, 512, 512)


def model(
    *,
    depth: Literal[16, 19] = 16,
    classes: Annotated[int, Ge(1)] = 1000,
    width: Annotated[float, Gt(0)] = 1.0,
    channels: Annotated[int, Ge(1)] = 3,
    size: Annotated[int, Ge(32)] = 224,
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.5,
) -> nn.Module:
    """Return the network, (n, channels, size, size) float32 -> (n, classes) logits.

    Source: K. Simonyan, A. Zisserman 2014, "Very Deep Convolutional Networks for Large-Scale Image
    Recognition" (arXiv 1409.1556), table 1: configurations D and E.

    Args:
        depth: layers with weights.
        classes: number of logits.
        width: factor of all channels and hidden units.
        channels: of an image.
        size: pixels of an image's side. Five poolings halve it.
        dropout: the part of the full layers' inputs that is left out in training.
    """
    layers: list[nn.Module] = []
    inputs = channels
    for convolutions, published in zip(_DEPTHS[depth], _WIDTHS, strict=True):
        outputs = scaled(published, width)
        for _ in range(convolutions):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
            inputs = outputs
        layers.append(nn.MaxPool2d(2))
    hidden = scaled(4096, width)
    network = nn.Sequential(
        *layers,
        nn.Flatten(),
        nn.Linear(inputs * (size // 32) ** 2, hidden), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(hidden, hidden), nn.ReLU(), nn.Dropout(dropout),
        nn.Linear(hidden, classes),
    )  # fmt: skip
    initialise(network)
    return network
