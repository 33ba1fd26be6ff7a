"""Check a configuration. A mistake is one line: the key, the value, and allowed values."""

import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from pydantic import BaseModel
from pydantic_core import ErrorDetails

from scaletrain import plugins, torch_names
from scaletrain.config import yaml
from scaletrain.config.grammar import (
    expand_exchange,
    is_users_own,
    parse_setting,
    set_key,
    split_spec,
)
from scaletrain.config.schema import Named, RunConfig
from scaletrain.errors import UserError, did_you_mean, unknown

Model = TypeVar("Model", bound=BaseModel)


def load(path: Path, settings: dict[str, Any] | None = None) -> RunConfig:
    """Read and check a run's YAML file.

    Args:
        path: the file.
        settings: values by dotted key, which replace those of the file.

    Raises:
        UserError: the first thing that is wrong, in one line.
    """
    tree = yaml.read(path)
    # Defaults, not values: workers load RUN_DIR/config.yaml, which holds the name and the source of
    # the person's own file. Modules are still looked for beside that one.
    tree.setdefault("name", path.stem)
    tree.setdefault("source", str(path.resolve()))
    for key, value in (settings or {}).items():
        set_key(tree, key, value)
    return check(tree, str(path))


def check(tree: dict[str, Any], where: str = "config") -> RunConfig:
    """Return a mapping as a RunConfig, with the options of plugins checked and their defaults set.

    Args:
        tree: the run, as its file holds it.
        where: the beginning of an error's line, such as the file's name.

    Raises:
        UserError: the first thing that is wrong, in one line.
    """
    # First: the schema would take "ring@gloo" for the name of an exchange.
    tree = _with_exchange_expanded(tree, where)
    config = _validate(RunConfig, tree, where)
    # With all defaults filled in, the written configuration says what ran, even if a later version
    # has other defaults.
    _check_workload(config, where)
    for kind in ("model", "data", "workload", "exchange", "launcher"):
        named: Named | None = getattr(config, kind)
        if named is not None:
            options = plugin_options(kind, named.name, named.options, where, config.search_path)
            setattr(config, kind, Named(name=named.name, **options))
    for index, named in enumerate(config.callbacks):
        options = plugin_options("callback", named.name, named.options, where, config.search_path)
        config.callbacks[index] = Named(name=named.name, **options)
    _check_loss(config, where)
    _check_nonfinite(config, where)
    if config.optimizer is None and config.workload is None:
        config.optimizer = Named(name="sgd", lr=0.1)  # type: ignore[call-arg]
    if config.optimizer is not None:  # else the workload's own
        optimizer_options = _optimizer_options(config.optimizer, where)
        config.optimizer = Named(name=config.optimizer.name, **optimizer_options)
    _check_length(config, where)
    _check_batch(config, where)
    return config


def _with_exchange_expanded(tree: dict[str, Any], where: str) -> dict[str, Any]:
    exchange = tree.get("exchange")
    if isinstance(exchange, str):
        return {**tree, "exchange": expand_exchange(exchange, f"{where}: ")}
    # The long form of the same shorthand: {name: ring, transport: gloo}.
    if isinstance(exchange, dict) and exchange.get("name") in plugins.names("collective"):
        scheduled = {**exchange, "name": "scheduled", "collective": exchange["name"]}
        return {**tree, "exchange": scheduled}
    return tree


def _check_workload(config: RunConfig, where: str) -> None:
    """Raise ``UserError`` unless it is clear what is trained: a workload, or a model and data."""
    if config.workload is None:
        for key in ("model", "data"):
            if getattr(config, key) is None:
                raise UserError(f"{where}: {key}: is missing")
        return
    if not is_users_own(config.workload.name):
        raise UserError(
            f"{where}: workload: {config.workload.name!r} is not allowed"
            " (allowed: package.module:Class)"
        )
    for key in ("model", "data"):
        if getattr(config, key) is not None:
            raise UserError(
                f"{where}: {key}: the workload {config.workload.name} has its own"
                f" (remove {key}, or remove workload)"
            )


def _check_nonfinite(config: RunConfig, where: str) -> None:
    if config.nonfinite == "skip" and config.exchange.name == "parameter_server":
        raise UserError(
            f"{where}: nonfinite: 'skip' is not allowed under parameter_server, whose servers make"
            " the step before a worker can see it (allowed: stop)"
        )


def _check_length(config: RunConfig, where: str) -> None:
    # True if both are given, and if neither is.
    if (config.epochs is None) == (config.steps is None):
        raise UserError(
            f"{where}: give exactly one of epochs and steps"
            f" (now: {config.epochs} and {config.steps}; --set epochs=null leaves one out)"
        )


def _check_batch(config: RunConfig, where: str) -> None:
    if config.batch_mode == "strong" and config.workers > config.batch_size:
        raise UserError(
            f"{where}: workers: {config.workers} workers cannot share a global batch_size of"
            f" {config.batch_size} (allowed: 1 to {config.batch_size} workers,"
            " a larger batch_size, or batch_mode: weak)"
        )
    # In weak mode each worker has a whole batch_size to itself.
    sharing = config.workers if config.batch_mode == "strong" else 1
    # Rounded down: where the batch does not divide evenly, some workers have a sample less.
    smallest_share = config.batch_size // sharing
    if config.accumulate > smallest_share:
        raise UserError(
            f"{where}: accumulate: {config.accumulate} backward passes need as many samples,"
            f" a worker has {smallest_share} of the batch_size of {config.batch_size}"
            f" (allowed: 1 to {smallest_share})"
        )


def _check_loss(config: RunConfig, where: str) -> None:
    if is_users_own(config.loss):
        plugins.options("loss", config.loss, config.search_path)  # raises if it does not exist
        return
    # None without an installed torch. The worker then finds the mistake.
    losses = torch_names.losses()
    if losses and config.loss not in losses:
        raise unknown(f"{where}: loss", config.loss, losses)


def _optimizer_options(optimizer: Named, where: str) -> dict[str, Any]:
    """Return the options that are set, checked against torch's class where torch is installed."""
    optimizers = torch_names.optimizers()
    if optimizers is None:
        return optimizer.options
    if optimizer.name.lower() not in optimizers:
        raise unknown(f"{where}: optimizer", optimizer.name, optimizers)
    schema = torch_names.optimizer_options(optimizer.name)
    if schema is None:
        return optimizer.options
    checked = _validate(schema, optimizer.options, where, "optimizer.").model_dump()
    # Only those that were set: the worker's torch fills in its own defaults.
    return {key: checked[key] for key in optimizer.options}


def plugin_options(
    kind: str,
    name: str,
    chosen: dict[str, Any],
    where: str = "options",
    search_path: Path | None = None,
) -> dict[str, Any]:
    """Return a plugin's options, checked against its signature and completed with its defaults.

    An option that is called like a kind of plugin (``collective``, ``transport``) takes ``auto``
    or a name of that kind, with options of its own (``plugin_spec``).

    Args:
        kind: a key of ``plugins.KINDS``.
        name: a plugin's name, or ``package.module:factory``.
        chosen: the options that are set.
        where: the beginning of an error's line.
        search_path: where a person's modules are looked for.

    Raises:
        UserError: there is no such plugin, an option is unknown, or a value is not allowed.
    """
    if not is_users_own(name) and not plugins.exists(kind, name):
        raise unknown(f"{where}: {kind}", name, plugins.names(kind))
    schema = plugins.options(kind, name, search_path)
    if schema is None:
        return chosen
    options = _validate(schema, chosen, where, f"{kind}.").model_dump()
    for key, value in options.items():
        # A plugin inside a plugin, such as the collective of `scheduled`.
        if key in plugins.KINDS and value != "auto":
            plugin_spec(key, value, f"{where}: {kind}.{key}", also=("auto",))
    # Where only the module knows the default, the factory must be called without the option.
    return {key: value for key, value in options.items() if value != plugins.COMPUTED}


def plugin_spec(
    kind: str, text: str, where: str, also: Sequence[str] = ()
) -> tuple[str, dict[str, Any]]:
    """Return the name and the options that ``NAME:OPTION=VALUE:...`` sets, both checked.

    >>> plugin_spec("collective", "pipelined_tree:segments=8", "collective")
    ('pipelined_tree', {'segments': 8})

    Args:
        kind: a key of ``plugins.KINDS``.
        text: the short form.
        where: the beginning of an error's line.
        also: names that are allowed beside those of the plugins.

    Raises:
        UserError: the name, an option or a value is not allowed.
    """
    spec = split_spec(text)
    if not plugins.exists(kind, spec.name):
        raise unknown(where, spec.name, [*also, *plugins.names(kind)])
    chosen: dict[str, Any] = {}
    if spec.settings:
        # A message with a setting of this very plugin is worth more than a general one.
        example = _example_setting(kind, spec.name)
        if not example:
            raise UserError(
                f"{where}: {text!r} is not allowed: {spec.name} has no options"
                f" (allowed: {spec.name})"
            )
        for setting in spec.settings:
            key, value = parse_setting(setting, f"{where}: {spec.name}", example)
            chosen[key] = value
    # Checking also fills in the defaults, and only what was typed is wanted.
    checked = plugin_options(kind, spec.name, chosen, where)
    return spec.name, {key: checked[key] for key in chosen}


def _example_setting(kind: str, name: str) -> str:
    """Return a setting that a plugin accepts; empty if it has no options."""
    schema = plugins.options(kind, name)
    if schema is None:
        return ""
    for key, field in schema.model_fields.items():
        return f"{key}={field.default}"
    return ""


def _validate(schema: type[Model], tree: dict[str, Any], where: str, prefix: str = "") -> Model:
    try:
        return schema.model_validate(tree)
    except pydantic.ValidationError as error:
        worst = min(error.errors(), key=_importance)
        raise _mistake(worst, schema, where, prefix) from None


def _importance(error: ErrorDetails) -> tuple[bool, bool]:
    """Return a sort key: a misspelt key also leaves a key missing, which is not the news."""
    return error["type"] != "extra_forbidden", error["type"] == "missing"


def _mistake(error: ErrorDetails, schema: type[BaseModel], where: str, prefix: str) -> UserError:
    """Return pydantic's error in our words."""
    location = error["loc"]
    key = prefix + ".".join(part for part in map(str, location) if _is_key_or_index(part))
    if error["type"] == "extra_forbidden":
        # The keys that are allowed are those of the mapping in which the key stands.
        inner = _schema_at(schema, location[:-1])
        return unknown(f"{where}: key {key}", str(location[-1]), inner.model_fields)
    if error["type"] == "missing":
        return UserError(f"{where}: {key}: is missing")
    # What is left of pydantic's sentence reads on after "allowed:".
    allowed = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    allowed = allowed.partition(", unable to parse")[0]
    hint = ""
    if error["type"] == "literal_error":
        choices = re.findall("'([^']*)'", allowed)
        hint = did_you_mean(str(error["input"]), choices)
    return UserError(
        f"{where}: {key}: {error['input']!r} is not allowed{hint} (allowed: {allowed})"
    )


def _is_key_or_index(part: str) -> bool:
    """Return False for the names that pydantic gives to the branches of a union."""
    return part.replace("_", "").isidentifier() or part.isdigit()


def _schema_at(schema: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """Return the model that holds the key at a location."""
    for part in location:
        field = schema.model_fields.get(str(part))
        # An index of a list, or the name of a union's branch: the model stays the same.
        if field is None:
            continue
        # The model may be wrapped, as in `Compute | None`.
        for candidate in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                schema = candidate
                break
    return schema
