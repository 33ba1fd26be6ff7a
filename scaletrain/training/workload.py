"""Model, loss, optimizer and data, built from a configuration, the same on every rank."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from scaletrain import plugins
from scaletrain.config import RunConfig
from scaletrain.config.grammar import is_users_own
from scaletrain.errors import UserError, unknown
from scaletrain.training.randomness import seed_generators

Loss = Callable[[Tensor, Tensor], Tensor]


class Workload(NamedTuple):
    """The parts of a training job that do not know about workers."""

    model: nn.Module  # on the device, initialised from the seed
    loss: Loss  # (output, target) -> mean over the batch, scalar
    optimizer: torch.optim.Optimizer
    train: Dataset
    test: Dataset


def build(config: RunConfig, device: torch.device) -> Workload:
    """Build the job's parts. Seeds come first, so every rank starts from the same weights.

    A data set that is drawn at random is the same on every rank, too.

    Raises:
        UserError: a name does not exist, the optimizer has no such option, or a factory returns
            something else than it should.
    """
    # torch takes 64 bits; for a seed that fits, the weights are those of ``torch.manual_seed``.
    seed = config.seed % 2**64
    torch.manual_seed(seed)  # of all devices
    seed_generators(seed)  # also those of ``random`` and numpy
    # The model comes first: no random number that the data draws may change its weights.
    model = config.load("model")(**config.model.options)
    if not isinstance(model, nn.Module):
        raise UserError(
            f"model: {config.model.name} returned a {type(model).__name__}, not a torch.nn.Module"
        )
    datasets = config.load("data")(**config.data.options)
    if not _is_train_and_test(datasets):
        raise UserError(
            f"data: {config.data.name} must return two datasets with [index] and len(): (train, test)"
        )
    train, test = datasets
    model = model.to(device)
    if config.compute:
        from scaletrain.training.emulation import emulate

        model = emulate(model, config.compute.step_s, config.compute.sample_s)
    return Workload(model, _checked_loss(config), _optimizer(config, model), train, test)


def _is_train_and_test(value: Any) -> bool:
    is_pair = isinstance(value, tuple) and len(value) == 2
    return is_pair and all(hasattr(dataset, "__getitem__") for dataset in value)


def _checked_loss(config: RunConfig) -> Loss:
    """Return the loss, which raises ``UserError`` if nothing can be trained with its value."""
    function = _loss_function(config)

    # Checked at every call: what a loss returns depends on the shapes that it gets.
    def loss(output: Tensor, target: Tensor) -> Tensor:
        if config.loss == "cross_entropy" and output.ndim > 1 and output.shape[1] == 1:
            raise UserError(
                "loss: cross_entropy over one class is always 0, and the model has one output"
                " (allowed: an output for each class, or another loss, such as"
                " binary_cross_entropy_with_logits or mse_loss)"
            )
        value = function(output, target)
        if isinstance(value, Tensor) and value.numel() == 1:
            return value
        returned = f"a {type(value).__name__}"
        if isinstance(value, Tensor):
            returned = f"a tensor of shape {tuple(value.shape)}"
        raise UserError(
            f"loss: {config.loss} returned {returned}"
            " (allowed: a scalar tensor, the mean over the batch)"
        )

    return loss


def _loss_function(config: RunConfig) -> Callable[..., Tensor]:
    if is_users_own(config.loss):
        users_own: Callable[..., Tensor] = plugins.load("loss", config.loss, config.search_path)
        return users_own
    # ``reduction`` tells losses from everything else in torch.nn.functional, such as relu.
    function = getattr(nn.functional, config.loss, None)
    if function is not None and "reduction" in inspect.signature(function).parameters:
        found: Callable[..., Tensor] = function
        return found
    # Only for the message: names that are probably losses.
    losses = []
    for name, value in vars(nn.functional).items():
        is_public = callable(value) and not name.startswith("_")
        if is_public and name.endswith(("loss", "entropy", "div", "logits")):
            losses.append(name)
    raise unknown("loss", config.loss, losses)


def _optimizer(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    name, options = config.optimizer.name, config.optimizer.options
    classes = _optimizer_classes()
    if name.lower() not in classes:
        raise unknown("optimizer", name, classes)
    optimizer_class = classes[name.lower()]
    parameters = inspect.signature(optimizer_class).parameters
    # ``params`` is filled in below; all other parameters of the class are options.
    allowed = [parameter for parameter in parameters if parameter != "params"]
    for key, value in options.items():
        if key not in allowed:
            raise unknown(f"optimizer: option of {name}", key, allowed)
        # torch compares it with numbers, and says only that it cannot.
        if isinstance(value, str):
            raise UserError(
                f"optimizer.{key}: {value!r} is not allowed"
                " (allowed: a number, true, false or a list)"
            )
    try:
        return optimizer_class(model.parameters(), **options)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer: {name}: {error}") from None


def _optimizer_classes() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """Return the classes of ``torch.optim`` by their names in lower case."""
    base = torch.optim.Optimizer
    classes: dict[str, Callable[..., torch.optim.Optimizer]] = {}
    for name, value in vars(torch.optim).items():
        if inspect.isclass(value) and issubclass(value, base) and value is not base:
            classes[name.lower()] = value
    return classes
