"""GoogLeNet with both auxiliary heads (13,378,280 parameters; 6,998,552 without the heads)."""

from typing import Annotated

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn

from scaletrain.training.models import initialise, scaled

# Channels: 1x1; 3x3 reduce, 3x3; 5x5 reduce, 5x5; pool projection (table 1).
_INCEPTIONS = {
    "3a": (64, 96, 128, 16, 32, 32), "3b": (128, 128, 192, 32, 96, 64),
    "4a": (192, 96, 208, 16, 48, 64), "4b": (160, 112, 224, 24, 64, 64), "4c": (128, 128, 256, 24, 64, 64),
    "4d": (112, 144, 288, 32, 64, 64), "4e": (256, 160, 320, 32, 128, 128),
    "5a": (256, 160, 320, 32, 128, 128), "5b": (384, 192, 384, 48, 128, 128),
}  # fmt: skip
_POOLED_BEFORE = ("4a", "5a")
_HEADS_AFTER = ("4a", "4d")
_HEAD_WEIGHT = 0.3


class Inception(nn.Module):
    """Four branches side by side."""

    def __init__(self, inputs: int, widths: tuple[int, ...]):
        super().__init__()
        one, reduce3, three, reduce5, five, pool = widths
        self.one = _convolution(inputs, one, 1)
        self.reduce3 = _convolution(inputs, reduce3, 1)
        self.three = _convolution(reduce3, three, 3)
        self.reduce5 = _convolution(inputs, reduce5, 1)
        self.five = _convolution(reduce5, five, 5)
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.project = _convolution(inputs, pool, 1)
        self.outputs = one + three + five + pool

    def forward(self, maps: Tensor) -> Tensor:
        """(n, inputs, side, side) -> (n, outputs, side, side)."""
        branches = [
            self.one(maps),
            self.three(self.reduce3(maps)),
            self.five(self.reduce5(maps)),
            self.project(self.pool(maps)),
        ]
        return torch.cat(branches, dim=1)


class GoogLeNet(nn.Module):
    """Nine inceptions. In training it also returns the outputs of its heads.

    Source: C. Szegedy et al. 2014, "Going Deeper with Convolutions" (arXiv 1409.4842), section 5.
    """

    def __init__(self, classes: int, width: float, channels: int, small: bool, heads: bool):
        super().__init__()
        first, second = scaled(64, width), scaled(192, width)
        if small:
            self.stem = nn.Sequential(
                _convolution(channels, first, 3), _convolution(first, second, 3), _pool()
            )
        else:
            self.stem = nn.Sequential(
                nn.Conv2d(channels, first, 7, stride=2, padding=3), nn.ReLU(), _pool(),
                nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75),
                _convolution(first, first, 1), _convolution(first, second, 3),
                nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75), _pool(),
            )  # fmt: skip
        self.inceptions = nn.ModuleDict()
        self.heads = nn.ModuleDict()
        self.pool = _pool()
        inputs = second
        for name, published in _INCEPTIONS.items():
            widths = tuple(scaled(channels_, width) for channels_ in published)
            inception = Inception(inputs, widths)
            self.inceptions[name] = inception
            inputs = inception.outputs
            if heads and name in _HEADS_AFTER:
                self.heads[name] = _head(inputs, classes, width, small)
        self.classify = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.4), nn.Linear(inputs, classes)
        )
        # Of each output's loss in training: the trainer adds them up.
        self.loss_weights = (1.0, *[_HEAD_WEIGHT] * len(self.heads))
        initialise(self)

    def forward(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        """(n, channels, side, side) float32 -> (n, classes) logits.

        In training with heads, it is a tuple of them: the network's own come first.
        """
        maps = self.stem(images)
        auxiliary = []
        for name, inception in self.inceptions.items():
            if name in _POOLED_BEFORE:
                maps = self.pool(maps)
            maps = inception(maps)
            if self.training and name in self.heads:
                auxiliary.append(self.heads[name](maps))
        outputs = self.classify(maps)
        return (outputs, *auxiliary) if auxiliary else outputs


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    """Return a convolution that keeps the resolution, and its ReLU."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2), nn.ReLU())


def _pool() -> nn.Module:
    return nn.MaxPool2d(3, 2, ceil_mode=True)


def _head(inputs: int, classes: int, width: float, small: bool) -> nn.Module:
    """Return a head. It sees 4 x 4 pixels: of the 14 x 14 that images of 224 x 224 lead to."""
    channels, hidden = scaled(128, width), scaled(1024, width)
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(4) if small else nn.AvgPool2d(5, 3),
        _convolution(inputs, channels, 1),
        nn.Flatten(),
        nn.Linear(channels * 4 * 4, hidden), nn.ReLU(), nn.Dropout(0.7),
        nn.Linear(hidden, classes),
    )  # fmt: skip


def model(
    *,
    classes: Annotated[int, Ge(1)] = 1000,
    width: Annotated[float, Gt(0)] = 1.0,
    channels: Annotated[int, Ge(1)] = 3,
    small: bool = False,
    heads: bool = True,
) -> nn.Module:
    """Return the network, for images of 224 x 224 unless it is small.

    Args:
        classes: number of logits.
        width: factor of all channels and hidden units.
        channels: of an image.
        small: two convolutions of 3 x 3 in front, which keep the resolution.
        heads: two more classifiers in the middle, whose losses count 0.3 in training.
    """
    return GoogLeNet(classes, width, channels, small, heads)
