"""SqueezeNet 1.0: AlexNet's accuracy with 50 times fewer parameters (1,248,424)."""

from typing import Annotated

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from scaletrain.training.models import initialise, scaled

# Channels: squeeze, and each of the two kinds that expand (table 1).
_FIRES = ((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192), (64, 256), (64, 256))
_POOLED_AFTER = (2, 6)  # counted from 0


class Fire(nn.Module):
    """A 1 x 1 convolution to few channels, and 1 x 1 and 3 x 3 ones from them, side by side."""

    def __init__(self, inputs: int, squeeze: int, expand: int):
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, maps: Tensor) -> Tensor:
        """(n, inputs, side, side) -> (n, 2 expand, side, side)."""
        few = self.squeeze(maps).relu()
        return torch.cat([self.expand1(few), self.expand3(few)], dim=1).relu()


def model(
    *,
    classes: Annotated[int, Ge(1)] = 1000,
    width: Annotated[float, Gt(0)] = 1.0,
    channels: Annotated[int, Ge(1)] = 3,
    small: bool = False,
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.5,
) -> nn.Module:
    """Return the network, (n, channels, side, side) float32 -> (n, classes) logits.

    Source: F. Iandola et al. 2016, "SqueezeNet" (arXiv 1602.07360), table 1, for images of
    227 x 227.

    Args:
        classes: number of logits; each has a map of its own, whose mean it is.
        width: factor of all channels.
        channels: of an image.
        small: the first convolution is 3 x 3 and keeps the resolution, and no ReLU follows the last
            layer: few and narrow maps would soon all end at 0, where they learn nothing.
        dropout: the part of the last layer's inputs that is left out in training.
    """
    inputs = scaled(96, width)
    first = nn.Conv2d(channels, inputs, 7, stride=2)
    if small:
        first = nn.Conv2d(channels, inputs, 3, padding=1)
    layers: list[nn.Module] = [first, nn.ReLU(), nn.MaxPool2d(3, 2, ceil_mode=True)]
    for index, (squeeze, expand) in enumerate(_FIRES):
        layers.append(Fire(inputs, scaled(squeeze, width), scaled(expand, width)))
        inputs = 2 * scaled(expand, width)
        if index in _POOLED_AFTER:
            layers.append(nn.MaxPool2d(3, 2, ceil_mode=True))
    last = nn.Conv2d(inputs, classes, 1)
    layers += [nn.Dropout(dropout), last]
    if not small:
        layers.append(nn.ReLU())
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    initialise(network)
    # As in the authors' own: large logits at the start would end most of the maps at 0.
    nn.init.normal_(last.weight, std=0.01)
    return network
