"""One file a model: ``model(*, <options>) -> torch.nn.Module``.

Networks of papers have a ``width`` that scales their channels, and ``small`` for images of less
than 100 pixels: their first layers then keep the resolution.
"""

from torch import nn


def scaled(channels: int, width: float) -> int:
    """Return a number of channels times the width, a multiple of 4 and at least 4.

    >>> scaled(96, 1.0), scaled(96, 0.1)
    (96, 8)
    """
    if width == 1:
        return channels
    return max(4, 4 * round(channels * width / 4))


def initialise(network: nn.Module) -> None:
    """Draw weights for layers with ReLU: normal, with the variance 2 / inputs; biases are 0.

    Deep networks without batch normalisation do not train from torch's own, smaller weights.

    Source: K. He et al. 2015, "Delving Deep into Rectifiers" (arXiv 1502.01852), section 2.2.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
