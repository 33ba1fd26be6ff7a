"""The optimizer that a configuration names, over the groups of parameters that it describes."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scaletrain import plugins
from scaletrain.config import RunConfig
from scaletrain.config.checks import is_torchs_optimizer
from scaletrain.config.grammar import is_users_own
from scaletrain.config.schema import Optimizer
from scaletrain.errors import UserError, unknown
from scaletrain.training import patterns


@dataclass(frozen=True)
class Group:
    """Parameters that are stepped with the same options."""

    key: str  # in the configuration
    parameters: dict[str, nn.Parameter]  # by name
    options: dict[str, Any]  # all that are set, of the optimizer and of the group


def build(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer of a configuration over all parameters of a model.

    Raises:
        UserError: there is no such optimizer or option, or a group matches nothing.
    """
    named = config.optimizer
    if named is None:
        raise UserError(
            "optimizer: is missing: name one in the configuration, or set self.optimizer in the"
            " workload"
        )
    factory = _factory(config, named.name)
    merged = []
    for group in split(named, model):
        # An optimizer of its own: torch checks only the options that all groups share.
        alone = _make(factory, [{"params": [*group.parameters.values()]}], named.name, group)
        merged.append(_with_options_of(alone, named.name, group))
    whole = Group("optimizer", {}, named.options)
    return _make(factory, merged, named.name, whole)


def split(optimizer: Optimizer, model: nn.Module) -> list[Group]:
    """Return the groups of a model's parameters, without empty ones.

    The first group holds the parameters that no pattern matches.

    Args:
        optimizer: with the patterns. The first group that matches a parameter has it.
        model: its parameters' names are compared with the patterns.

    Raises:
        UserError: a pattern, or a group after those before it, matches nothing.
    """
    rest = dict(model.named_parameters())
    names = [*rest]
    groups = []
    for index, described in enumerate(optimizer.groups):
        key = f"optimizer.groups[{index}]"
        patterns.check(described.match, names, f"{key}.match")
        parameters = {}
        for name in [*rest]:
            if any(patterns.matches(pattern, name) for pattern in described.match):
                parameters[name] = rest.pop(name)
        if not parameters:
            raise UserError(
                f"{key}.match: groups before it have all parameters that {described.match} match"
                " (put it before them, or remove it)"
            )
        groups.append(Group(key, parameters, optimizer.options | described.options))
    if rest:
        groups.insert(0, Group("optimizer", rest, optimizer.options))
    return groups


def describe(named: Optimizer | None, made: torch.optim.Optimizer) -> list[str]:
    """Return lines about the optimizer that a configuration names, and about its groups.

    Args:
        named: of the configuration; None: the workload has its own.
        made: by ``build``.
    """
    if named is None:
        return []
    chosen = ", ".join(f"{key} {value}" for key, value in named.options.items())
    lines = [f"optimizer: {type(made).__name__} with {chosen}"]
    if not named.groups:
        return lines
    sizes = [len(group["params"]) for group in made.param_groups]
    parts = []
    if len(sizes) > len(named.groups):
        parts.append(f"{sizes.pop(0)} with the optimizer's options")
    for group, size in zip(named.groups, sizes, strict=True):
        options = ", ".join(f"{key} {value}" for key, value in group.options.items())
        parts.append(f"{size} of {', '.join(group.match)} with {options}")
    return [*lines, f"parameter groups: {'; '.join(parts)}"]


def _factory(config: RunConfig, name: str) -> Callable[..., Any]:
    if not is_torchs_optimizer(name):
        factory: Callable[..., Any] = plugins.load("optimizer", name, config.search_path)
        return factory
    classes = _torchs_classes()
    if name.lower() not in classes:
        raise unknown("optimizer", name, [*classes, *plugins.names("optimizer")])
    return classes[name.lower()]


def _torchs_classes() -> dict[str, Callable[..., torch.optim.Optimizer]]:
    """Return the classes of ``torch.optim`` by their names in lower case."""
    base = torch.optim.Optimizer
    classes: dict[str, Callable[..., torch.optim.Optimizer]] = {}
    for name, value in vars(torch.optim).items():
        if inspect.isclass(value) and issubclass(value, base) and value is not base:
            classes[name.lower()] = value
    return classes


def _make(
    factory: Callable[..., Any], groups: list[dict[str, Any]], name: str, group: Group
) -> torch.optim.Optimizer:
    """Call an optimizer's factory over groups, with the options of one of them."""
    parameters = inspect.signature(factory).parameters.values()
    takes_any = any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters)
    allowed = [each.name for each in parameters][1:]  # the first is the groups
    for key, value in group.options.items():
        if key not in allowed and not takes_any:
            raise unknown(f"{group.key}: option of {name}", key, allowed)
        # torch compares it with numbers, and says only that it cannot.
        if isinstance(value, str) and is_torchs_optimizer(name):
            raise UserError(
                f"{group.key}.{key}: {value!r} is not allowed"
                " (allowed: a number, true, false or a list)"
            )
    # A TypeError in a person's own code is theirs to see, with its traceback.
    mistakes = ValueError if is_users_own(name) else (TypeError, ValueError)
    try:
        made = factory(groups, **group.options)
    except mistakes as error:
        raise UserError(f"{group.key}: {name}: {error}") from None
    if not isinstance(made, torch.optim.Optimizer):
        raise UserError(
            f"optimizer: {name} returned a {type(made).__name__} (allowed: a class that derives"
            " from torch.optim.Optimizer)"
        )
    return made


def _with_options_of(alone: torch.optim.Optimizer, name: str, group: Group) -> dict[str, Any]:
    """Return the group of an optimizer that has one, if it really keeps the group's options."""
    (kept,) = alone.param_groups
    for key in group.options:
        if group.key != "optimizer" and key not in kept:
            raise unknown(f"{group.key}: option that {name} has for all groups alike", key, kept)
    return kept
