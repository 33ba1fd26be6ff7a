"""ResNet with 18 or 50 layers of weights (11,689,512 or 25,557,032 parameters)."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt
from torch import Tensor, nn

from scaletrain.training.models import initialise, scaled

_DEPTHS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}  # residual blocks a stage
_WIDTHS = (64, 128, 256, 512)
_WIDENED = 4  # the last convolution of a block of ResNet-50, over its others


class Residual(nn.Module):
    """Adds to its input what its layers make of it.

    Args:
        layers: convolutions and their normalisations.
        shortcut: brings the input into the shape of the output; None: they have the same.
    """

    def __init__(self, layers: nn.Sequential, shortcut: nn.Module | None):
        super().__init__()
        self.layers = layers
        self.shortcut = shortcut

    def forward(self, maps: Tensor) -> Tensor:
        """(n, inputs, side, side) -> (n, outputs, side / stride, side / stride)."""
        kept = maps if self.shortcut is None else self.shortcut(maps)
        return (self.layers(maps) + kept).relu()


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    """Return a convolution and its normalisation."""
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(outputs)]


def _block(depth: int, inputs: int, width: int, stride: int) -> tuple[Residual, int]:
    """Return a residual block and the number of its output channels."""
    if depth == 18:
        outputs = width
        layers = [
            *_convolution(inputs, width, 3, stride), nn.ReLU(),
            *_convolution(width, width, 3),
        ]  # fmt: skip
    else:
        outputs = _WIDENED * width
        # The 3 x 3 convolution has the stride, as in Goyal et al. 2017 (arXiv 1706.02677).
        layers = [
            *_convolution(inputs, width, 1), nn.ReLU(),
            *_convolution(width, width, 3, stride), nn.ReLU(),
            *_convolution(width, outputs, 1),
        ]  # fmt: skip
    shortcut = None
    if stride != 1 or inputs != outputs:
        shortcut = nn.Sequential(*_convolution(inputs, outputs, 1, stride))
    return Residual(nn.Sequential(*layers), shortcut), outputs


def model(
    *,
    depth: Literal[18, 50] = 18,
    classes: Annotated[int, Ge(1)] = 1000,
    width: Annotated[float, Gt(0)] = 1.0,
    channels: Annotated[int, Ge(1)] = 3,
    small: bool = False,
) -> nn.Module:
    """Return the network, (n, channels, side, side) float32 -> (n, classes) logits.

    Batch normalisation makes a sample's output depend on its neighbours in training:
    ``sync_batchnorm`` normalises over all workers.

    Source: K. He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385),
    table 1.

    Args:
        depth: layers with weights.
        classes: number of logits.
        width: factor of all channels.
        channels: of an image.
        small: the first convolution is 3 x 3, and it and its pooling keep the resolution.
    """
    inputs = scaled(64, width)
    if small:
        layers: list[nn.Module] = [*_convolution(channels, inputs, 3), nn.ReLU()]
    else:
        layers = [*_convolution(channels, inputs, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
    for stage, (blocks, published) in enumerate(zip(_DEPTHS[depth], _WIDTHS, strict=True)):
        for index in range(blocks):
            stride = 2 if stage > 0 and index == 0 else 1
            block, inputs = _block(depth, inputs, scaled(published, width), stride)
            layers.append(block)
    network = nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes)
    )
    initialise(network)
    return network
