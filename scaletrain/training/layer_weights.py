"""The weights of a model's layers by name, and settings for each of them."""

from collections.abc import Mapping
from typing import TypeVar

from torch import nn

from scaletrain.training import patterns
from scaletrain.training.checkpoint import plain_name

Setting = TypeVar("Setting", int, float)


def layer_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters of two or more dimensions: no biases, no scales of norms."""
    weights = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.ndim >= 2:
            weights[plain_name(name)] = parameter
    return weights


def by_layer(
    weights: Mapping[str, nn.Parameter], setting: Setting, layers: Mapping[str, Setting], key: str
) -> dict[str, Setting]:
    """Return the setting of each weight: that of the first pattern which matches its name.

    Args:
        weights: by name.
        setting: of weights that no pattern matches.
        layers: settings by patterns of names.
        key: of the configuration.

    Raises:
        UserError: a pattern matches no weight.
    """
    patterns.check(layers, [*weights], key, kind="weight")
    chosen = {}
    for name in weights:
        matching = [value for pattern, value in layers.items() if patterns.matches(pattern, name)]
        chosen[name] = matching[0] if matching else setting
    return chosen
