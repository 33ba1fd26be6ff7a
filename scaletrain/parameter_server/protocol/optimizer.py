"""An optimizer as plain data: described by the worker, built by the server.

A description is JSON: ``{"name": "SGD", "groups": [{"lr": 0.1, "momentum": 0.9, ...}, ...]}``.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import lr_scheduler

from scaletrain.errors import UserError

# Each element is updated from its own history alone, so any flat range of a tensor can be updated
# by itself.
ELEMENTWISE = {
    "SGD", "Adam", "AdamW", "Adagrad", "Adadelta", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop",
    "ASGD", "SparseAdam",
}  # fmt: skip

# Take sparse gradients at a cost of the touched rows.
SPARSE = {"SGD", "Adagrad", "SparseAdam"}

# Arguments that say how a step is computed, not what it does. They stay with each process.
_LOCAL = ("params", "capturable", "foreach", "fused", "differentiable")

_MAX_VALUES = 16  # in an option that is a list
# Of options and rates. Updates compute in float32, which ends near 1e38: torch raises beyond it.
_LARGEST = 1e20
_NO_SCHEDULES = ("LRScheduler", "ReduceLROnPlateau")  # a base class; one that needs a metric


def describe(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the class of an optimizer and the options of its groups, as JSON.

    Raises:
        UserError: it is not of torch.optim, needs a closure, or has options that are not plain
            values.
    """
    kind = type(optimizer)
    name = kind.__name__
    # By identity: a class of the same name from elsewhere may take other steps.
    if getattr(torch.optim, name, None) is not kind:
        raise UserError(
            f"optimizer: {name} is not of torch.optim: a parameter server makes its own from name"
            " and options"
        )
    if name == "LBFGS":
        raise UserError(
            "optimizer: LBFGS evaluates the loss several times a step, which a parameter server"
            " cannot do"
        )
    allowed = _arguments(kind)
    groups = []
    for group in optimizer.param_groups:
        options = {}
        for key, value in group.items():
            if key in allowed:
                options[key] = _plain_option(name, key, value)
        groups.append(options)
    return {"name": name, "groups": groups}


def check_sparse(description: dict[str, Any], group: int) -> None:
    """Check that an optimizer's step touches only the rows of a sparse gradient.

    Args:
        description: of the optimizer.
        group: the parameter group of a sparse table.

    Raises:
        UserError: it touches the others, too, or takes no sparse gradients.
    """
    name = description["name"]
    options = description["groups"][group]
    if name not in SPARSE:
        allowed = ", ".join(sorted(SPARSE))
        raise UserError(f"optimizer: {name} does not take sparse gradients (allowed: {allowed})")
    for key in ("momentum", "weight_decay"):
        if options.get(key):
            raise UserError(
                f"optimizer: {name} with {key} {options[key]} would touch every row of a sparse"
                " table (allowed: 0)"
            )


def build(
    description: Any, group: int, parameters: Sequence[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return the optimizer of one block.

    Args:
        description: from the wire, so that anything may be in it.
        group: the parameter group that the block belongs to.
        parameters: the block's weights, piece by piece.

    Raises:
        ValueError: ``describe`` would not have written this.
    """
    try:
        name = description["name"]
        options = dict(description["groups"][group])
    except (TypeError, KeyError, IndexError):
        raise ValueError("malformed optimizer") from None
    kind: Any = None
    # Only in torch.optim: a name from the wire must not lead to any other code.
    if isinstance(name, str):
        kind = getattr(torch.optim, name, None)
    if not _is_subclass(kind, torch.optim.Optimizer) or kind is torch.optim.Optimizer:
        raise ValueError("unknown optimizer")
    allowed = _arguments(kind)
    for key, value in options.items():
        if key not in allowed or not _is_plain(value):
            raise ValueError("bad optimizer option")
        if isinstance(value, list):  # JSON has no tuples
            options[key] = tuple(value)
    try:
        return kind(parameters, **options)
    except Exception as error:  # of any kind: torch looks at some options and trusts others
        raise ValueError(f"bad optimizer option: {error}") from None


def scheduler(
    description: dict[str, Any], optimizer: torch.optim.Optimizer
) -> lr_scheduler.LRScheduler:
    """Return a schedule of torch.optim.lr_scheduler that counts the updates of one block.

    Args:
        description: the option ``server_lr``: a name, and the arguments of the schedule.
        optimizer: of the block.

    Raises:
        UserError: no such schedule or argument.
    """
    arguments = dict(description)
    name = str(arguments.pop("name", ""))
    kind: Any = getattr(lr_scheduler, name, None)
    if not _is_subclass(kind, lr_scheduler.LRScheduler) or name in _NO_SCHEDULES:
        raise UserError(
            f"exchange.server_lr.name: {name!r} is not a schedule of torch.optim.lr_scheduler,"
            " such as StepLR"
        )
    try:
        return kind(optimizer, **arguments)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"exchange.server_lr: {name}: {error}") from None


def split_entry(entry: str) -> tuple[int, str]:
    """Return the piece of a block and the name in a key of its optimizer's state.

    >>> split_entry("3.exp_avg")
    (3, 'exp_avg')

    Raises:
        ValueError: it names no piece.
    """
    number, _, name = entry.partition(".")
    return int(number), name


def _arguments(kind: Any) -> set[str]:
    """Return the arguments of an optimizer's class that a description holds."""
    return set(inspect.signature(kind).parameters).difference(_LOCAL)


def plain(value: Any) -> Any:
    """Return the value of an optimizer's option as a description has it: a tensor as a number."""
    if isinstance(value, torch.Tensor):
        return value.item()
    if isinstance(value, list | tuple):
        return tuple(plain(item) for item in value)
    return value


def _plain_option(name: str, key: str, value: Any) -> Any:
    """Return the value of an optimizer's option for a description.

    Raises:
        UserError: it is not a plain value.
    """
    value = plain(value)
    if not _is_plain(value):
        raise UserError(
            f"optimizer: option {key} of {name} is a {type(value).__name__}, not a plain value"
        )
    return value


def _is_plain(value: Any) -> bool:
    """Return True for a value, or a short list of values, that JSON can hold."""
    if isinstance(value, list | tuple):
        return len(value) <= _MAX_VALUES and all(_is_plain(item) for item in value)
    if isinstance(value, int | float):
        return is_number(value)
    return value is None or isinstance(value, str)


def is_number(value: float) -> bool:
    """Return True for a number that an update can compute with."""
    return abs(value) <= _LARGEST  # False for NaN; a number of JSON may be too large for a float


def _is_subclass(kind: Any, base: type) -> bool:
    """Return True if ``kind`` is a class, and ``base`` or below it."""
    return inspect.isclass(kind) and issubclass(kind, base)
