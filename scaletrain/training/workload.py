"""What is trained: model, loss, optimizer and data, built from a configuration; the same on every rank."""

import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from scaletrain import plugins
from scaletrain.config import RunConfig
from scaletrain.errors import UserError, unknown


class Workload(NamedTuple):
    """The parts of a training job that do not know about workers."""

    model: nn.Module  # on the device, initialised from the seed
    loss: Callable[[Tensor, Tensor], Tensor]  # (output, target) -> mean over the batch, scalar
    optimizer: torch.optim.Optimizer
    train: Dataset
    test: Dataset


def build(config: RunConfig, device: torch.device) -> Workload:
    """Build the job's parts. Seeds torch first, so every rank starts from the same weights.

    Raises:
        UserError: a name that is not there, an option that the optimizer does not have, a factory that returns something else.
    """
    torch.manual_seed(config.seed)
    model = config.load("model")(**config.model.options)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model: {config.model.name} returned a {type(model).__name__}, not a torch.nn.Module"
        )
    datasets = config.load("data")(**config.data.options)
    if not (
        isinstance(datasets, tuple)
        and len(datasets) == 2
        and all(hasattr(d, "__getitem__") for d in datasets)
    ):
        raise UserError(
            f"data: {config.data.name} must return two datasets with [index] and len(): (train, test)"
        )
    model = model.to(device)
    if config.compute:
        from scaletrain.training.emulation import emulate

        model = emulate(model, config.compute.step_s, config.compute.sample_s)
    return Workload(model, _loss(config), _optimizer(config, model), *datasets)


def _loss(config: RunConfig) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss, which raises ``UserError`` for what cannot be trained with: no scalar, or a constant."""
    function = _loss_function(config)

    def loss(output: Tensor, target: Tensor) -> Tensor:
        if config.loss == "cross_entropy" and output.ndim > 1 and output.shape[1] == 1:
            raise UserError(
                "loss: cross_entropy over one class is always 0, and the model has one output"
                " (allowed: an output for each class, or another loss, such as binary_cross_entropy_with_logits or mse_loss)"
            )
        value = function(output, target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            shape = (
                f"a tensor of shape {tuple(value.shape)}"
                if isinstance(value, Tensor)
                else f"a {type(value).__name__}"
            )
            raise UserError(
                f"loss: {config.loss} returned {shape} (allowed: a scalar tensor, the mean over the batch)"
            )
        return value

    return loss


def _loss_function(config: RunConfig) -> Callable[..., Tensor]:
    if ":" in config.loss:
        return plugins.load("loss", config.loss, config.search_path)
    function = getattr(nn.functional, config.loss, None)
    if function is None or "reduction" not in inspect.signature(function).parameters:
        losses = [
            n
            for n, f in vars(nn.functional).items()
            if callable(f) and n.endswith(("loss", "entropy", "div", "logits"))
        ]
        raise unknown("loss", config.loss, [n for n in losses if not n.startswith("_")])
    return function


def _optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    classes = {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if inspect.isclass(value)
        and issubclass(value, torch.optim.Optimizer)
        and value is not torch.optim.Optimizer
    }
    kind = classes.get(config.optimizer.name.lower())
    if kind is None:
        raise unknown("optimizer", config.optimizer.name, classes)
    options = config.optimizer.options
    allowed = [name for name in inspect.signature(kind).parameters if name != "params"]
    for key in options:
        if key not in allowed:
            raise unknown(f"optimizer: option of {config.optimizer.name}", key, allowed)
        if isinstance(
            options[key], str
        ):  # torch compares it with numbers, and says no more than that it cannot
            raise UserError(
                f"optimizer.{key}: {options[key]!r} is not allowed (allowed: a number, true, false or a list)"
            )
    try:
        return kind(model.parameters(), **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer: {config.optimizer.name}: {error}") from None
