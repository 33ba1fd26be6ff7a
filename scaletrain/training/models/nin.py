"""Network in Network: 1 x 1 convolutions between the others, 7,595,176 parameters."""

from typing import Annotated

from annotated_types import Ge, Gt, Lt
from torch import nn

from scaletrain.training.models import initialise, scaled


def model(
    *,
    classes: Annotated[int, Ge(1)] = 1000,
    width: Annotated[float, Gt(0)] = 1.0,
    channels: Annotated[int, Ge(1)] = 3,
    small: bool = False,
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.5,
) -> nn.Module:
    """Return the network, (n, channels, side, side) float32 -> (n, classes) logits.

    It is the network for ImageNet of Caffe's model zoo, for images of 224 x 224.

    Source: M. Lin, Q. Chen, S. Yan 2013, "Network in Network" (arXiv 1312.4400).

    Args:
        classes: number of logits; each has a map of its own, whose mean it is.
        width: factor of all channels.
        channels: of an image.
        small: the first convolution is 5 x 5 and keeps the resolution, and no ReLU follows the last
            layer: few and narrow maps would soon all end at 0, where they learn nothing.
        dropout: the part of the last block's inputs that is left out in training.
    """
    first = nn.Conv2d(channels, scaled(96, width), 11, stride=4)
    if small:
        first = nn.Conv2d(channels, scaled(96, width), 5, padding=2)
    network = nn.Sequential(
        *_block(first, scaled(96, width)),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        *_block(nn.Conv2d(scaled(96, width), scaled(256, width), 5, padding=2), scaled(256, width)),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        *_block(
            nn.Conv2d(scaled(256, width), scaled(384, width), 3, padding=1), scaled(384, width)
        ),
        nn.MaxPool2d(3, 2, ceil_mode=True),
        nn.Dropout(dropout),
    )
    last_block = _block(nn.Conv2d(scaled(384, width), scaled(1024, width), 3, padding=1), classes)
    if small:
        del last_block[-1]
    network.extend([*last_block, nn.AdaptiveAvgPool2d(1), nn.Flatten()])
    initialise(network)
    # As in Caffe's: from large logits, ReLU would leave most maps at 0 for good.
    last = [module for module in network if isinstance(module, nn.Conv2d)][-1]
    nn.init.normal_(last.weight, std=0.01)
    return network


def _block(first: nn.Conv2d, outputs: int) -> list[nn.Module]:
    """Return a convolution and the small network of two layers that runs over its pixels."""
    between = first.out_channels
    return [
        first, nn.ReLU(),
        nn.Conv2d(between, between, 1), nn.ReLU(),
        nn.Conv2d(between, outputs, 1), nn.ReLU(),
    ]  # fmt: skip
