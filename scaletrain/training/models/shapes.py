"""The parameters of well-known networks, without their computation: for emulated accelerators."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn


class Layer(NamedTuple):
    """One layer with weights and a bias.

    Convolutions have the shape (out, in / groups, k, k), fully connected layers (out, in).
    """

    name: str
    shape: tuple[int, ...]
    # Output pixels: each weight takes part in this many multiply-adds a sample.
    positions: int = 1


class Shape(nn.Module):
    """The parameters of one layer."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layer.shape))
        self.bias = nn.Parameter(torch.zeros(layer.shape[0]))
        self.multiply_adds = self.weight.numel() * layer.positions  # a sample, forward


class Shapes(nn.Module):
    """Has the network's parameters, and computes nothing of it.

    Its first logit is the sum over the layers of their mean weight, so every weight has a gradient.
    """

    def __init__(self, layers: list[Layer], classes: int):
        super().__init__()
        self.classes = classes
        # ``forward`` uses the list; the ModuleDict makes the parameters known to torch.
        self.shapes = [Shape(layer) for layer in layers]
        names = [layer.name for layer in layers]
        self.layers = nn.ModuleDict(dict(zip(names, self.shapes, strict=True)))

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, ...) -> (n, classes)."""
        means = [layer.weight.mean() + layer.bias.mean() for layer in self.shapes]
        total = torch.stack(means).sum()
        # All logits but the first are 0, whatever the weights are.
        zero = torch.tensor(0, device=total.device)
        first = nn.functional.one_hot(zero, self.classes).to(total.dtype)
        return (total * first).expand(len(inputs), self.classes)


def model(
    *,
    preset: Literal[
        "lenet",
        "squeezenet",
        "googlenet",
        "googlenet_inference",
        "nin",
        "alexnet",
        "vgg16",
        "vgg19",
    ] = "nin",
) -> nn.Module:
    """Return the parameters of a known network.

    Args:
        preset: the network. ``googlenet`` has both auxiliary heads, as in training;
            ``googlenet_inference`` is without them.
    """
    layers = PRESETS[preset]()
    return Shapes(layers, layers[-1].shape[0])


def _lenet() -> list[Layer]:
    """LeNet as in Caffe's MNIST example."""
    # ip1 sees conv2's output after pooling: 50 channels of 4 x 4 pixels.
    return [
        Layer("conv1", (20, 1, 5, 5), 24**2), Layer("conv2", (50, 20, 5, 5), 8**2),
        Layer("ip1", (500, 800)), Layer("ip2", (10, 500)),
    ]  # fmt: skip


def _nin() -> list[Layer]:
    """Network in Network for ImageNet (Caffe model zoo), input 224 x 224."""
    layers = []
    previous = 3
    for block, (width, last, kernel, pixels) in enumerate(
        [(96, 96, 11, 54), (256, 256, 5, 27), (384, 384, 3, 13), (1024, 1000, 3, 6)], 1
    ):
        # The cccp layers are 1 x 1 convolutions: the small network in the network.
        layers += [
            Layer(f"conv{block}", (width, previous, kernel, kernel), pixels**2),
            Layer(f"cccp{2 * block - 1}", (width, width, 1, 1), pixels**2),
            Layer(f"cccp{2 * block}", (last, width, 1, 1), pixels**2),
        ]
        previous = last
    return layers


def _alexnet() -> list[Layer]:
    """AlexNet (CaffeNet) with its two groups."""
    # conv2, 4 and 5 see half of the channels before them. fc6 sees 256 channels of 6 x 6 pixels.
    return [
        Layer("conv1", (96, 3, 11, 11), 55**2), Layer("conv2", (256, 48, 5, 5), 27**2),
        Layer("conv3", (384, 256, 3, 3), 13**2), Layer("conv4", (384, 192, 3, 3), 13**2),
        Layer("conv5", (256, 192, 3, 3), 13**2),
        Layer("fc6", (4096, 9216)), Layer("fc7", (4096, 4096)), Layer("fc8", (1000, 4096)),
    ]  # fmt: skip


def _squeezenet() -> list[Layer]:
    """SqueezeNet v1.0 (arXiv 1602.07360, table 1)."""
    layers = [Layer("conv1", (96, 3, 7, 7), 111**2)]
    previous = 96
    for fire, (squeeze, expand, pixels) in enumerate(
        [
            (16, 64, 55),
            (16, 64, 55),
            (32, 128, 55),
            (32, 128, 27),
            (48, 192, 27),
            (48, 192, 27),
            (64, 256, 27),
            (64, 256, 13),
        ],
        2,
    ):
        layers += [
            Layer(f"fire{fire}_squeeze", (squeeze, previous, 1, 1), pixels**2),
            Layer(f"fire{fire}_expand1", (expand, squeeze, 1, 1), pixels**2),
            Layer(f"fire{fire}_expand3", (expand, squeeze, 3, 3), pixels**2),
        ]
        # The outputs of the 1 x 1 and 3 x 3 convolutions lie side by side.
        previous = 2 * expand
    return [*layers, Layer("conv10", (1000, previous, 1, 1), 13**2)]


# 1x1, 3x3 reduce, 3x3, 5x5 reduce, 5x5, pool projection; output pixels a side
# (arXiv 1409.4842, table 1).
_INCEPTIONS = {
    "3a": (64, 96, 128, 16, 32, 32, 28), "3b": (128, 128, 192, 32, 96, 64, 28),
    "4a": (192, 96, 208, 16, 48, 64, 14), "4b": (160, 112, 224, 24, 64, 64, 14), "4c": (128, 128, 256, 24, 64, 64, 14),
    "4d": (112, 144, 288, 32, 64, 64, 14), "4e": (256, 160, 320, 32, 128, 128, 14),
    "5a": (256, 160, 320, 32, 128, 128, 7), "5b": (384, 192, 384, 48, 128, 128, 7),
}  # fmt: skip


def _googlenet(heads: bool = True) -> list[Layer]:
    layers = [
        Layer("conv1", (64, 3, 7, 7), 112**2),
        Layer("conv2_reduce", (64, 64, 1, 1), 56**2),
        Layer("conv2", (192, 64, 3, 3), 56**2),
    ]
    previous = 192
    for name, (one, reduce3, three, reduce5, five, pool, pixels) in _INCEPTIONS.items():
        layers += [
            Layer(f"{name}_1x1", (one, previous, 1, 1), pixels**2),
            Layer(f"{name}_3x3_reduce", (reduce3, previous, 1, 1), pixels**2),
            Layer(f"{name}_3x3", (three, reduce3, 3, 3), pixels**2),
            Layer(f"{name}_5x5_reduce", (reduce5, previous, 1, 1), pixels**2),
            Layer(f"{name}_5x5", (five, reduce5, 5, 5), pixels**2),
            Layer(f"{name}_pool", (pool, previous, 1, 1), pixels**2),
        ]
        # The outputs of the four branches lie side by side.
        previous = one + three + five + pool
        if heads and name in ("4a", "4d"):
            # A head sees 4 x 4 pixels, after average pooling: 128 * 4 * 4 = 2048 features.
            layers += [
                Layer(f"head_{name}_conv", (128, previous, 1, 1), 4**2),
                Layer(f"head_{name}_fc", (1024, 2048)),
                Layer(f"head_{name}_classifier", (1000, 1024)),
            ]
    return [*layers, Layer("classifier", (1000, previous))]


def _vgg(depths: tuple[int, ...]) -> list[Layer]:
    """VGG (arXiv 1409.1556): ``depths`` convolutions a block."""
    layers = []
    previous = 3
    for block, (depth, width) in enumerate(zip(depths, (64, 128, 256, 512, 512), strict=True)):
        for index in range(depth):
            # Each block ends with a pooling that halves the side of its images.
            layers.append(
                Layer(f"conv{block + 1}_{index + 1}", (width, previous, 3, 3), (224 >> block) ** 2)
            )
            previous = width
    # After five poolings, 512 channels of 7 x 7 pixels are left: 25088 features.
    return [
        *layers,
        Layer("fc6", (4096, 25088)),
        Layer("fc7", (4096, 4096)),
        Layer("fc8", (1000, 4096)),
    ]


PRESETS = {
    "lenet": _lenet,
    "squeezenet": _squeezenet,
    "googlenet": _googlenet,
    "googlenet_inference": lambda: _googlenet(heads=False),
    "nin": _nin,
    "alexnet": _alexnet,
    "vgg16": lambda: _vgg((2, 2, 3, 3, 3)),
    "vgg19": lambda: _vgg((2, 2, 4, 4, 4)),
}
