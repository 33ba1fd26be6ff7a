"""A small convolutional network for 8 x 8 grey images (72 thousand parameters at width 16)."""

from typing import Annotated

from annotated_types import Ge
from torch import Tensor, nn


class DigitsCNN(nn.Module):
    """Convolutions and two linear layers.

    Without batch normalisation and dropout, a sample's output does not depend on how the batch was
    split over workers.
    """

    def __init__(self, width: int, classes: int):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, width, 3, padding=1),  # (n, 1, 8, 8) -> (n, width, 8, 8)
            nn.ReLU(),
            nn.Conv2d(width, 2 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),  # -> (n, 2 width, 4, 4)
            nn.Conv2d(2 * width, 4 * width, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),  # -> (n, 4 width, 2, 2)
        )
        self.classify = nn.Sequential(
            nn.Flatten(), nn.Linear(16 * width, 8 * width), nn.ReLU(), nn.Linear(8 * width, classes)
        )

    def forward(self, images: Tensor) -> Tensor:
        """(n, 1, 8, 8) float32 -> (n, classes) logits."""
        return self.classify(self.features(images))


def model(*, width: Annotated[int, Ge(1)] = 16, classes: Annotated[int, Ge(1)] = 10) -> nn.Module:
    """Return the network.

    Args:
        width: channels of the first convolution; the others have multiples of it.
        classes: number of logits.
    """
    return DigitsCNN(width, classes)
