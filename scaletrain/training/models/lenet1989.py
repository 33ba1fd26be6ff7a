"""The first LeNet, for zip codes of 16 x 16 pixels (9,760 parameters): LeCun et al. 1989."""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

_BACKGROUND = -1.0  # beyond the border, where the pixels would have been
_SEEN = 8  # maps of the first layer that a map of the second one looks at


class LeNet1989(nn.Module):
    """Two layers of shared weights with a bias for each unit, and two full layers.

    The paper does not say which 8 of the 12 maps a map of the second layer sees: here, the maps of
    a third see 8 that follow each other. The outputs are logits, for a cross entropy in place of
    squared errors.

    Source: LeCun et al. 1989, "Backpropagation Applied to Handwritten Zip Code Recognition",
    section 3.
    """

    def __init__(self, classes: int):
        super().__init__()
        self.h1 = nn.Conv2d(1, 12, 5, stride=2, bias=False)  # -> (n, 12, 8, 8)
        self.h1_bias = nn.Parameter(torch.zeros(12, 8, 8))
        thirds = [nn.Conv2d(_SEEN, 4, 5, stride=2, bias=False) for _ in range(3)]
        self.h2 = nn.ModuleList(thirds)  # -> (n, 12, 4, 4)
        self.h2_bias = nn.Parameter(torch.zeros(12, 4, 4))
        self.h3 = nn.Linear(12 * 4 * 4, 30)
        self.output = nn.Linear(30, classes)
        self._initialise()

    def _initialise(self) -> None:
        """Draw weights from -2.4 to 2.4, divided by the inputs of a unit."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                inputs = module.weight[0].numel()
                nn.init.uniform_(module.weight, -2.4 / inputs, 2.4 / inputs)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 1, 16, 16) float32 -> (n, classes) logits."""
        maps = squash(self.h1(_padded(images)) + self.h1_bias)
        # The maps that follow the last one are the first ones.
        ring = _padded(torch.cat([maps, maps], dim=1))
        thirds = [
            layer(ring[:, 4 * third : 4 * third + _SEEN]) for third, layer in enumerate(self.h2)
        ]
        maps = squash(torch.cat(thirds, dim=1) + self.h2_bias)
        hidden = squash(self.h3(maps.flatten(1)))
        return self.output(hidden)


def _padded(images: Tensor) -> Tensor:
    """Return images with two pixels of background at each side."""
    return nn.functional.pad(images, (2, 2, 2, 2), value=_BACKGROUND)


def squash(sums: Tensor) -> Tensor:
    """Return 1.7159 tanh(2/3 x), which is 1 at 1 and -1 at -1."""
    return 1.7159 * torch.tanh(2 / 3 * sums)


def model(*, classes: Annotated[int, Ge(1)] = 10) -> nn.Module:
    """Return the network.

    Args:
        classes: number of logits.
    """
    return LeNet1989(classes)
