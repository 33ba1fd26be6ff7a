"""An optimizer as plain data: described by the worker, built by the server."""

import inspect
import math
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from scaletrain.errors import UserError

# Each element is updated from its own history alone: any flat range of a tensor can be updated by itself.
ELEMENTWISE = {
    "SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "ASGD", "SparseAdam"
}  # fmt: skip
SPARSE = {"SGD", "Adagrad", "SparseAdam"}  # take sparse gradients at a cost of the touched rows
_LOCAL = (
    "params",
    "capturable",
    "foreach",
    "fused",
    "differentiable",
)  # how a step is computed, not what it does


def describe(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Class and options of every group, as JSON.

    Raises:
        UserError: not of torch.optim, needs a closure, or has options that are not plain numbers.
    """
    name = type(optimizer).__name__
    if getattr(torch.optim, name, None) is not type(optimizer):
        raise UserError(
            f"optimizer: {name} is not of torch.optim: a parameter server makes its own from name and options"
        )
    if name == "LBFGS":
        raise UserError(
            "optimizer: LBFGS evaluates the loss several times a step, which a parameter server cannot do"
        )
    allowed = inspect.signature(type(optimizer)).parameters
    groups = []
    for group in optimizer.param_groups:
        options = {
            key: value for key, value in group.items() if key in allowed and key not in _LOCAL
        }
        for key, value in options.items():
            if isinstance(value, torch.Tensor):
                options[key] = value.item()
            elif not _plain(value):
                raise UserError(
                    f"optimizer: option {key} of {name} is a {type(value).__name__}, not a plain value"
                )
        groups.append(options)
    return {"name": name, "groups": groups}


def check_sparse(description: dict[str, Any], group: int) -> None:
    """Sparse tables need an optimizer whose step touches the gradient's rows alone. Raises ``UserError``."""
    name, options = description["name"], description["groups"][group]
    if name not in SPARSE:
        raise UserError(
            f"optimizer: {name} does not take sparse gradients (allowed: {', '.join(sorted(SPARSE))})"
        )
    for key in ("momentum", "weight_decay"):
        if options.get(key):
            raise UserError(
                f"optimizer: {name} with {key} {options[key]} would touch every row of a sparse table (allowed: 0)"
            )


def build(description: Any, group: int, parameter: nn.Parameter) -> torch.optim.Optimizer:
    """The optimizer of one block. Raises ``ValueError`` for anything that ``describe`` would not have written."""
    try:
        name, options = description["name"], dict(description["groups"][group])
    except (TypeError, KeyError, IndexError):
        raise ValueError("malformed optimizer") from None
    kind = getattr(torch.optim, name, None) if isinstance(name, str) else None
    if (
        not (inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer))
        or kind is torch.optim.Optimizer
    ):
        raise ValueError("unknown optimizer")
    allowed = [key for key in inspect.signature(kind).parameters if key not in _LOCAL]
    if not all(key in allowed and _plain(value) for key, value in options.items()):
        raise ValueError("bad optimizer option")
    try:
        return kind([parameter], **_tuples(options))
    except TypeError as error:
        raise ValueError(f"bad optimizer option: {error}") from None


def scheduler(
    description: dict[str, Any], optimizer: torch.optim.Optimizer
) -> lr_scheduler.LRScheduler:
    """A schedule of torch.optim.lr_scheduler that counts the updates of one block.

    Raises:
        UserError: no such schedule or option.
    """
    options = dict(description)
    name = str(options.pop("name", ""))
    kind = getattr(lr_scheduler, name, None)
    if not (inspect.isclass(kind) and issubclass(kind, lr_scheduler.LRScheduler)) or name in (
        "LRScheduler",
        "ReduceLROnPlateau",
    ):
        raise UserError(
            f"exchange.server_lr.name: {name!r} is not a schedule of torch.optim.lr_scheduler, such as StepLR"
        )
    try:
        return kind(optimizer, **options)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"exchange.server_lr: {name}: {error}") from None


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return len(value) <= 16 and all(_plain(item) for item in value)
    return (
        value is None
        or isinstance(value, (bool, int, str))
        or (isinstance(value, float) and math.isfinite(value))
    )


def _tuples(options: dict[str, Any]) -> dict[str, Any]:
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in options.items()
    }
