"""The parameters of well-known networks, without their computation: for emulated accelerators."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from scaletrain import plugins


class Preset(NamedTuple):
    """A network of this folder, and the shape of its input."""

    model: str
    options: dict[str, Any]
    sample: tuple[int, ...]


PRESETS = {
    "lenet": Preset("lenet", {}, (1, 28, 28)),
    "squeezenet": Preset("squeezenet", {}, (3, 227, 227)),
    "googlenet": Preset("googlenet", {}, (3, 224, 224)),
    "googlenet_inference": Preset("googlenet", {"heads": False}, (3, 224, 224)),
    "nin": Preset("nin", {}, (3, 224, 224)),
    "alexnet": Preset("alexnet", {}, (3, 224, 224)),
    "vgg16": Preset("vgg", {}, (3, 224, 224)),
    "vgg19": Preset("vgg", {"depth": 19}, (3, 224, 224)),
}


class Layer(NamedTuple):
    """One layer with weights and a bias.

    Convolutions have the shape (out, in / groups, k, k), fully connected layers (out, in).
    """

    name: str
    shape: tuple[int, ...]
    # Output pixels: each weight takes part in this many multiply-adds a sample.
    positions: int = 1

    @property
    def multiply_adds(self) -> int:
        """Multiply-adds of a sample's forward pass, without those of the bias."""
        return math.prod(self.shape) * self.positions


def layers_of(network: nn.Module, sample: tuple[int, ...]) -> list[Layer]:
    """Return the convolutions and full layers of a network in the order in which they compute.

    Args:
        network: on the meta device, where nothing is computed. It is in training mode, in which
            auxiliary heads compute, too.
        sample: the shape of its input.
    """
    layers: list[Layer] = []

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            weight = cast(Tensor, module.weight)
            # (n, out, rows, columns) of a convolution; (n, ..., out) of a full layer.
            positions = output[0].numel() // len(weight)
            layers.append(Layer(name.replace(".", "_"), tuple(weight.shape), positions))

        return hook

    hooks = []
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            hooks.append(module.register_forward_hook(note(name)))
    with torch.no_grad():
        network(torch.zeros(2, *sample, device="meta"))
    for hook in hooks:
        hook.remove()
    return layers


class Shape(nn.Module):
    """The parameters of one layer."""

    def __init__(self, layer: Layer):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(layer.shape))
        self.bias = nn.Parameter(torch.zeros(layer.shape[0]))
        self.multiply_adds = layer.multiply_adds


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
    name, options, sample = PRESETS[preset]
    with torch.device("meta"):
        network = plugins.load("model", name)(**options)
    layers = layers_of(network, sample)
    return Shapes(layers, layers[-1].shape[0])
