"""AlexNet with two towers, local response normalisation and dropout (60,965,224 parameters)."""

from typing import Annotated

from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from scaletrain.training.models import initialise, scaled


class AlexNet(nn.Module):
    """Five convolutions, of which three see one tower alone, and three full layers.

    Source: A. Krizhevsky, I. Sutskever, G. Hinton 2012, "ImageNet Classification with Deep
    Convolutional Neural Networks", section 3.5.
    """

    def __init__(
        self, classes: int, width: float, channels: int, size: int, small: bool, dropout: float
    ):
        super().__init__()
        one, two, three = scaled(96, width), scaled(256, width), scaled(384, width)
        hidden = scaled(4096, width)
        # For 224 pixels, an output of 55: the margin of 2 is what the paper's figures need.
        first = nn.Conv2d(channels, one, 11, stride=4, padding=2)
        if small:
            first = nn.Conv2d(channels, one, 5, padding=2)
        self.features = nn.Sequential(
            first, nn.ReLU(), _normalise(), nn.MaxPool2d(3, 2),
            nn.Conv2d(one, two, 5, padding=2, groups=2), nn.ReLU(), _normalise(), nn.MaxPool2d(3, 2),
            nn.Conv2d(two, three, 3, padding=1), nn.ReLU(),
            nn.Conv2d(three, three, 3, padding=1, groups=2), nn.ReLU(),
            nn.Conv2d(three, two, 3, padding=1, groups=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        )  # fmt: skip
        side = size if small else (size + 4 - 11) // 4 + 1
        for _ in range(3):
            side = (side - 3) // 2 + 1
        self.classify = nn.Sequential(
            nn.Flatten(),
            nn.Dropout(dropout), nn.Linear(two * side * side, hidden), nn.ReLU(),
            nn.Dropout(dropout), nn.Linear(hidden, hidden), nn.ReLU(),
            nn.Linear(hidden, classes),
        )  # fmt: skip
        initialise(self)

    def forward(self, images: Tensor) -> Tensor:
        """(n, channels, size, size) float32 -> (n, classes) logits."""
        return self.classify(self.features(images))


def _normalise() -> nn.Module:
    # torch divides alpha by the 5 channels of the sum: this is the paper's 1e-4.
    return nn.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2)


def model(
    *,
    classes: Annotated[int, Ge(1)] = 1000,
    width: Annotated[float, Gt(0)] = 1.0,
    channels: Annotated[int, Ge(1)] = 3,
    size: Annotated[int, Ge(16)] = 224,
    small: bool = False,
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.5,
) -> nn.Module:
    """Return the network.

    Args:
        classes: number of logits.
        width: factor of all channels and hidden units.
        channels: of an image.
        size: pixels of an image's side.
        small: the first convolution is 5 x 5 and keeps the resolution.
        dropout: the part of the full layers' inputs that is left out in training.
    """
    return AlexNet(classes, width, channels, size, small, dropout)
