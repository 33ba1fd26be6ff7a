"""LeNet-5 for 32 x 32 grey images (60,000 parameters and a linear output): LeCun et al. 1998."""

from typing import Annotated

import torch
from annotated_types import Ge
from torch import Tensor, nn

from scaletrain.training.models.lenet1989 import squash

# Which of the six maps of S2 each of the sixteen maps of C3 sees (table I).
_SEEN = (
    (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5),
    (0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5), (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5),
    (0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5),
)  # fmt: skip


class Subsample(nn.Module):
    """Adds four neighbours, multiplies by a trained number, and adds a trained bias."""

    def __init__(self, maps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.full((maps, 1, 1), 0.25))
        self.bias = nn.Parameter(torch.zeros(maps, 1, 1))

    def forward(self, maps: Tensor) -> Tensor:
        """(n, maps, side, side) -> (n, maps, side / 2, side / 2)."""
        sums = 4 * nn.functional.avg_pool2d(maps, 2)
        return squash(sums * self.weight + self.bias)


class LeNet5(nn.Module):
    """Three layers of convolutions, two that subsample, and two full ones.

    The paper's output layer measures distances to fixed pictures of the digits. Here it is linear,
    and its outputs are logits.

    Source: LeCun et al. 1998, "Gradient-Based Learning Applied to Document Recognition", section
    II.B.
    """

    def __init__(self, classes: int):
        super().__init__()
        self.c1 = nn.Conv2d(1, 6, 5)  # -> (n, 6, 28, 28)
        self.s2 = Subsample(6)
        self.c3 = nn.ModuleList(nn.Conv2d(len(seen), 1, 5) for seen in _SEEN)  # -> (n, 16, 10, 10)
        self.s4 = Subsample(16)
        self.c5 = nn.Conv2d(16, 120, 5)  # -> (n, 120, 1, 1)
        self.f6 = nn.Linear(120, 84)
        self.output = nn.Linear(84, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(n, 1, 32, 32) float32 -> (n, classes) logits."""
        maps = self.s2(squash(self.c1(images)))
        each = [layer(maps[:, seen]) for layer, seen in zip(self.c3, _SEEN, strict=True)]
        maps = self.s4(squash(torch.cat(each, dim=1)))
        features = squash(self.c5(maps)).flatten(1)
        return self.output(squash(self.f6(features)))


def model(*, classes: Annotated[int, Ge(1)] = 10) -> nn.Module:
    """Return the network.

    Args:
        classes: number of logits.
    """
    return LeNet5(classes)
