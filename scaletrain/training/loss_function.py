"""The loss that a configuration names, with its options: torch's or a person's own."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from scaletrain import plugins
from scaletrain.config import RunConfig
from scaletrain.config.grammar import is_users_own
from scaletrain.errors import UserError, unknown


def mean_loss(config: RunConfig) -> Callable[[Any, Tensor], Tensor]:
    """Return the loss as (output, target) -> the mean over the batch.

    It raises ``UserError`` if nothing can be trained with the value.
    """
    name = config.loss.name
    function = functools.partial(_function(config), **config.loss.options)

    # Checked at every call: what a loss returns depends on the shapes that it gets.
    def loss(output: Any, target: Tensor) -> Tensor:
        _check_classes(name, output)
        value = function(output, target)
        if isinstance(value, Tensor) and value.numel() == 1:
            return value
        returned = f"a {type(value).__name__}"
        if isinstance(value, Tensor):
            returned = f"a tensor of shape {tuple(value.shape)}"
        raise UserError(
            f"loss: {name} returned {returned} (allowed: a scalar tensor, the mean over the batch)"
        )

    return loss


def ignoring_sum(config: RunConfig) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return torch's loss as a sum, if it is one that leaves ignored targets out of its mean."""
    name = config.loss.name
    if is_users_own(name):
        return None
    function = getattr(nn.functional, name)
    if "ignore_index" not in inspect.signature(function).parameters:
        return None

    def sums(output: Tensor, target: Tensor) -> Tensor:
        _check_classes(name, output)
        total: Tensor = function(output, target, reduction="sum", **config.loss.options)
        return total

    return sums


def _check_classes(loss: str, output: Any) -> None:
    is_one = isinstance(output, Tensor) and output.ndim > 1 and output.shape[1] == 1
    if loss == "cross_entropy" and is_one:
        raise UserError(
            "loss: cross_entropy over one class is always 0, and the model has one output"
            " (allowed: an output for each class, or another loss, such as"
            " binary_cross_entropy_with_logits or mse_loss)"
        )


def _function(config: RunConfig) -> Callable[..., Tensor]:
    name = config.loss.name
    if is_users_own(name):
        users_own: Callable[..., Tensor] = plugins.load("loss", name, config.search_path)
        return users_own
    function = getattr(nn.functional, name, None)
    # ``reduction`` tells losses from everything else in torch.nn.functional, such as relu.
    if function is not None and "reduction" in inspect.signature(function).parameters:
        found: Callable[..., Tensor] = function
        return found
    # Only for the message: names that are probably losses.
    losses = []
    for public, value in vars(nn.functional).items():
        is_public = callable(value) and not public.startswith("_")
        if is_public and public.endswith(("loss", "entropy", "div", "logits")):
            losses.append(public)
    raise unknown("loss", name, losses)
