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
from scaletrain.config.schema import LrSchedule, Named, Optimizer, ParameterGroup, RunConfig
from scaletrain.errors import UserError, did_you_mean, unknown
from scaletrain.needs import CountsSamples

Model = TypeVar("Model", bound=BaseModel)

# The plugins that options without a name belong to.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "loss": {"name": "cross_entropy"},
    "optimizer": {"name": "sgd", "lr": 0.1},
    "exchange": {"name": "native"},
    "launcher": {"name": "local"},
}


def load(path: Path, settings: dict[str, Any] | None = None) -> RunConfig:
    """Read and check a run's YAML file.

    Args:
        path: the file.
        settings: values by dotted key. They replace the file's values.

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
    tree = _with_defaults_named(tree)
    config = validate(RunConfig, tree, where)
    # With all defaults filled in, the written configuration says what ran, even if a later version
    # has other defaults.
    _check_workload(config, where)
    for kind in ("model", "data", "workload", "exchange", "launcher"):
        named: Named | None = getattr(config, kind)
        if named is not None:
            options = plugin_options(kind, named.name, named.options, where, config.search_path)
            setattr(config, kind, Named(name=named.name, **options))
    for index, named in enumerate(config.callbacks):
        key = f"callbacks[{index}]"
        options = plugin_options(
            "callback", named.name, named.options, where, config.search_path, key
        )
        config.callbacks[index] = Named(name=named.name, **options)
        _check_callback(named.name, config, f"{where}: {key}: {named.name}")
    config.loss = Named(name=config.loss.name, **_loss_options(config, where))
    _check_nonfinite(config, where)
    _check_precision(config, where)
    _check_initial_weights(config, where)
    _check_compile(config, where)
    if config.sync_batchnorm and config.exchange.name == "parameter_server":
        raise UserError(
            f"{where}: sync_batchnorm: true is not allowed under parameter_server, whose workers do"
            " not meet in forward (allowed: an exchange that averages all workers' gradients)"
        )
    if config.optimizer is None and config.workload is None:
        config.optimizer = Optimizer(**_DEFAULTS["optimizer"])
    if config.optimizer is not None:  # else the workload's own
        config.optimizer = _checked_optimizer(config.optimizer, config, where)
        _check_servers_can_step(config.optimizer, config, where)
    _check_one_schedule(config, where)
    _check_length(config, where)
    _check_batch(config, where)
    _check_samples(config, where)
    _check_groups(config, where)
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


def _with_defaults_named(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the tree with the name of the default where options are set without one."""
    named = dict(tree)
    for key, default in _DEFAULTS.items():
        options = tree.get(key)
        if isinstance(options, dict) and "name" not in options:
            named[key] = default | options
    return named


def _check_workload(config: RunConfig, where: str) -> None:
    """Raise ``UserError`` unless a workload, or a model and data, are named."""
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
    for key in ("model", "data", "metrics"):
        if not getattr(config, key):
            continue
        fix = f"remove {key}, or remove workload"
        if key == "metrics":
            fix = f"{fix}; a workload keeps metrics in self.metrics, and updates them in evaluate"
        raise UserError(f"{where}: {key}: the workload {config.workload.name} has its own ({fix})")


def _check_callback(name: str, config: RunConfig, who: str) -> None:
    """Raise ``UserError`` if the run is not of the kind that a callback needs."""
    needs = plugins.needs("callback", name)
    exchange = config.exchange.name
    if needs.evaluations and config.evaluate_every is None:
        raise UserError(
            f"{who} looks at evaluations, and there is none before the end"
            " (such as evaluate_every: 100)"
        )
    if needs.own_weights and exchange == "parameter_server":
        raise UserError(
            f"{who} changes weights on every rank, and here they are the servers'"
            " (allowed: an exchange that averages all workers' gradients)"
        )
    if needs.equal_replicas and exchange in ("none", "parameter_server"):
        raise UserError(
            f"{who}: the replicas of {exchange} may differ (allowed: an exchange that averages all"
            " workers' gradients)"
        )


def _check_nonfinite(config: RunConfig, where: str) -> None:
    policy = config.nonfinite
    if policy != "stop" and config.exchange.name == "parameter_server":
        raise UserError(
            f"{where}: nonfinite: {policy!r} is not allowed under parameter_server, whose servers"
            " make the step before a worker can see it (allowed: stop)"
        )
    if policy != "roll_back":
        return
    if config.exchange.name == "none":
        raise UserError(
            f"{where}: nonfinite: 'roll_back' is not allowed under none, whose workers do not go"
            " back together (allowed: stop, skip)"
        )
    if config.checkpoint.every_steps is None:
        raise UserError(
            f"{where}: nonfinite: 'roll_back' has no checkpoints to go back to"
            " (such as checkpoint: {every_steps: 100})"
        )


def _check_precision(config: RunConfig, where: str) -> None:
    if config.precision != "fp16":
        return
    if config.exchange.name == "parameter_server":
        raise UserError(
            f"{where}: precision: 'fp16' is not allowed under parameter_server, whose servers use"
            " gradients before their scale is taken off (allowed: float32, bf16)"
        )
    if config.nonfinite == "roll_back":
        raise UserError(
            f"{where}: nonfinite: 'roll_back' is not allowed beside precision: fp16, whose gradients"
            " overflow now and then (allowed: stop, skip)"
        )


def _check_initial_weights(config: RunConfig, where: str) -> None:
    if config.init_from is None:
        return
    if config.compute is not None:
        raise UserError(
            f"{where}: init_from: an emulated accelerator has no use for weights"
            " (remove init_from, or remove compute)"
        )
    # Workers may start in another directory.
    config.init_from.path = str(Path(config.init_from.path).absolute())


def _check_compile(config: RunConfig, where: str) -> None:
    if config.compile is None:
        return
    if config.compute is not None:
        raise UserError(
            f"{where}: compile: is not allowed beside compute, which emulates the model"
            " (remove one of them)"
        )
    if config.compile.mode is not None and config.compile.backend != "inductor":
        raise UserError(
            f"{where}: compile.mode: {config.compile.mode!r} is for the backend inductor"
            f" (allowed: no mode, or backend inductor in place of {config.compile.backend})"
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


def _check_samples(config: RunConfig, where: str) -> None:
    """Raise ``UserError`` if a step needs more samples than there are, as far as options tell."""
    if config.data is None:
        return
    marked = plugins.marked_options("data", config.data.name, CountsSamples, config.search_path)
    is_strong = config.batch_mode == "strong"
    sharing = 1 if is_strong else config.workers
    for option, mark in marked.items():
        num_samples = mark.for_training(config.data.options[option])
        if sharing > num_samples:
            raise UserError(
                f"{where}: workers: {config.workers}, each with a batch of its own, are more than"
                f" the {num_samples} training samples (allowed: 1 to {num_samples})"
            )
        if config.batch_size * sharing > num_samples:
            each = "" if is_strong else f" for each of {sharing} workers"
            raise UserError(
                f"{where}: batch_size: {config.batch_size}{each} is more than the {num_samples}"
                f" training samples (allowed: 1 to {num_samples // sharing})"
            )


def _check_groups(config: RunConfig, where: str) -> None:
    """Raise ``UserError`` if the workers cannot train several models side by side."""
    groups = config.groups
    if groups == 1:
        return
    for key in ("workers", "batch_size"):
        # In weak mode each worker has a whole batch_size to itself.
        is_shared = key == "workers" or config.batch_mode == "strong"
        if is_shared and getattr(config, key) % groups:
            raise UserError(
                f"{where}: exchange.groups: {groups} groups need equal parts of {key}:"
                f" {getattr(config, key)} (allowed: a multiple of {groups})"
            )
    refused = {
        "workload": (config.workload is not None, "model and data"),
        "metrics": (bool(config.metrics), "the figures of the loss, since each model has its own"),
        "bad_samples.skip": (config.leaves_out_samples, "0, since groups count for themselves"),
        "nonfinite": (config.nonfinite == "roll_back", "stop, skip"),
        "checkpoint.keep": (config.checkpoint.keep < 2, "2 or more, since groups save in turn"),
    }
    for key, (is_refused, allowed) in refused.items():
        if is_refused:
            raise UserError(
                f"{where}: {key}: is not allowed beside exchange.groups: {groups}"
                f" (allowed: {allowed})"
            )


def _loss_options(config: RunConfig, where: str) -> dict[str, Any]:
    """Return the options that are set, checked against the function's signature."""
    loss = config.loss
    if is_users_own(loss.name):
        return plugin_options("loss", loss.name, loss.options, where, config.search_path)
    # None without an installed torch. The worker then finds the mistake.
    losses = torch_names.losses()
    if losses and loss.name not in losses:
        raise unknown(f"{where}: loss", loss.name, losses)
    options = _set_options(torch_names.loss_options(loss.name), loss.options, where, "loss.")
    smoothing = options.get("label_smoothing", 0.0)
    # The one range that torch looks at, and that only in the first step.
    if losses and not 0 <= smoothing <= 1:
        raise UserError(
            f"{where}: loss.label_smoothing: {smoothing} is not allowed (allowed: 0 to 1)"
        )
    return options


def _checked_optimizer(optimizer: Optimizer, config: RunConfig, where: str) -> Optimizer:
    """Return an optimizer with the options of all its groups checked."""
    name = optimizer.name
    if plugins.exists("optimizer", name.lower()):
        name = name.lower()  # in any case, as the names of torch
    options = _optimizer_options(name, optimizer.options, config, where, "optimizer")
    groups = []
    for index, group in enumerate(optimizer.groups):
        key = f"optimizer.groups[{index}]"
        if not group.options:
            raise UserError(
                f"{where}: {key}: sets no option for {', '.join(group.match)}"
                " (such as {match: bias, weight_decay: 0})"
            )
        # With the others: a group need not repeat an option that must be given.
        checked = _optimizer_options(name, options | group.options, config, where, key)
        own = {option: checked[option] for option in group.options}
        groups.append(ParameterGroup(match=group.match, **own))
    lr = options.get("lr")
    if isinstance(lr, int | float) and config.lr_schedule.scaling is None:
        check_min_lr(config.lr_schedule, lr, f"{where}: ")
    return Optimizer(name=name, groups=groups, **options)


def _optimizer_options(
    name: str, chosen: dict[str, Any], config: RunConfig, where: str, key: str
) -> dict[str, Any]:
    """Return an optimizer's options, checked against the signature of its class."""
    if not is_torchs_optimizer(name):
        return plugin_options("optimizer", name, chosen, where, config.search_path, key)
    # None without an installed torch. The worker then finds the mistake.
    optimizers = torch_names.optimizers()
    if optimizers is not None and name.lower() not in optimizers:
        raise unknown(f"{where}: {key}", name, [*optimizers, *plugins.names("optimizer")])
    return _set_options(torch_names.optimizer_options(name), chosen, where, f"{key}.")


def is_torchs_optimizer(name: str) -> bool:
    """Return True if an optimizer is one of torch's: neither a file here nor a person's own."""
    return not is_users_own(name) and not plugins.exists("optimizer", name.lower())


def _set_options(
    schema: type[BaseModel] | None, chosen: dict[str, Any], where: str, prefix: str
) -> dict[str, Any]:
    """Return the options that are set, checked; all of them where there is no schema."""
    if schema is None:
        return chosen
    checked = validate(schema, chosen, where, prefix).model_dump()
    # Only those that were set: the worker's torch fills in its own defaults.
    return {key: checked[key] for key in chosen}


def check_min_lr(schedule: LrSchedule, lr: float, where: str = "") -> None:
    """Raise ``UserError`` if the floor of the rate lies above the rate itself.

    Args:
        schedule: with the floor.
        lr: of the optimizer's first group.
        where: the beginning of an error's line.
    """
    # Without a floor a negative rate is left to the optimizer, which refuses it by its name.
    if schedule.min_lr and schedule.min_lr > lr:
        raise UserError(
            f"{where}lr_schedule.min_lr: {schedule.min_lr:g} is not allowed"
            f" (allowed: 0 to {lr:g}, the rate of the optimizer's first group)"
        )


def _check_servers_can_step(optimizer: Optimizer, config: RunConfig, where: str) -> None:
    """Raise ``UserError`` if servers own the update, and cannot make this optimizer."""
    if config.exchange.name != "parameter_server":
        return
    # In the local modes workers run their own optimizer.
    mode = config.exchange.options["mode"]
    if is_torchs_optimizer(optimizer.name) or mode in ("local_sgd", "post_local"):
        return
    raise UserError(
        f"{where}: optimizer: {optimizer.name!r} is not allowed under parameter_server, whose"
        " servers run optimizers of torch.optim alone (allowed: one of those, mode: local_sgd or"
        " post_local, or another exchange)"
    )


def _check_one_schedule(config: RunConfig, where: str) -> None:
    """Raise ``UserError`` if both the workers and the servers would change the rate."""
    server_lr = config.exchange.options.get("server_lr")
    schedule = config.lr_schedule
    if server_lr is not None and (schedule.name != "fixed" or schedule.warmup_steps):
        raise UserError(
            f"{where}: lr_schedule: would count for nothing: exchange.server_lr sets the servers'"
            " rates (remove one of them)"
        )


def plugin_options(
    kind: str,
    name: str,
    chosen: dict[str, Any],
    where: str = "options",
    search_path: Path | None = None,
    key: str = "",
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
        key: the plugin's place in the configuration; default: its kind.

    Raises:
        UserError: there is no such plugin, an option is unknown, or a value is not allowed.
    """
    place = key or kind
    if not is_users_own(name) and not plugins.exists(kind, name):
        raise unknown(f"{where}: {place}", name, plugins.names(kind))
    schema = plugins.options(kind, name, search_path)
    if schema is None:
        return chosen
    options = validate(schema, chosen, where, f"{place}.").model_dump()
    needs = plugins.needs(kind, name)
    if needs.one_of and all(options[option] is None for option in needs.one_of):
        raise UserError(
            f"{where}: {place}: {name} needs {' or '.join(needs.one_of)} (such as"
            f" {{name: {name}, {needs.one_of[0]}: 1.0}})"
        )
    missing = [option for option in needs.together if not options[option]]
    if missing and len(missing) < len(needs.together):
        raise UserError(
            f"{where}: {place}.{missing[0]}: is missing"
            f" (give {' and '.join(needs.together)}, or none)"
        )
    for option, value in options.items():
        # A plugin inside a plugin, such as the collective of `scheduled`.
        if option in plugins.KINDS and value != "auto":
            plugin_spec(option, value, f"{where}: {place}.{option}", also=("auto",))
    # Where only the module knows the default, the factory must be called without the option.
    return {option: value for option, value in options.items() if value != plugins.COMPUTED}


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
        also: further names that are allowed beside the plugins.

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


def validate(schema: type[Model], tree: dict[str, Any], where: str, prefix: str = "") -> Model:
    """Return a mapping as a value of a schema.

    Args:
        schema: its keys, types and ranges.
        tree: the mapping.
        where: the beginning of an error's line, such as the file's name.
        prefix: before the keys that an error names.

    Raises:
        UserError: the first thing that is wrong, in one line.
    """
    try:
        return schema.model_validate(tree)
    except pydantic.ValidationError as error:
        worst = min(error.errors(), key=_importance)
        raise _mistake(worst, schema, where, prefix) from None


# What people write who come from other tools or look one level too high, and what it is here.
_ELSEWHERE = {
    "amp": "precision",
    "gradient_accumulation_steps": "accumulate",
    "learning_rate": "optimizer.lr",
    "lr": "optimizer.lr",
    "max_epochs": "epochs",
    "max_steps": "steps",
    "momentum": "optimizer.momentum",
    "num_workers": "loader_workers",
    "optimizer.learning_rate": "optimizer.lr",
    "scheduler": "lr_schedule",
    "weight_decay": "optimizer.weight_decay",
    "world_size": "workers",
}


def _importance(error: ErrorDetails) -> tuple[bool, bool]:
    """Return a sort key: a misspelt key also leaves a key missing, which is not the news."""
    return error["type"] != "extra_forbidden", error["type"] == "missing"


def _mistake(error: ErrorDetails, schema: type[BaseModel], where: str, prefix: str) -> UserError:
    """Return pydantic's error in our words."""
    location = error["loc"]
    key = prefix + _dotted(location)
    if error["type"] == "extra_forbidden":
        # The keys that are allowed are those of the mapping in which the key stands.
        inner = _schema_at(schema, location[:-1])
        # What the program sets itself, people do not.
        names = [name for name in inner.model_fields if name != "source"]
        return unknown(f"{where}: key {key}", str(location[-1]), names, _ELSEWHERE.get(key))
    if error["type"] == "missing":
        return UserError(f"{where}: {key}: is missing")
    if error["type"] == "model_type":
        keys = ", ".join(sorted(_schema_at(schema, location).model_fields))
        return UserError(
            f"{where}: {key}: {error['input']!r} is not allowed (allowed: a mapping with keys of"
            f" {keys})"
        )
    if error["type"] == "too_short":
        return UserError(
            f"{where}: {key}: {error['input']!r} is not allowed"
            f" (allowed: at least {error['ctx']['min_length']} of them)"
        )
    # What is left of pydantic's sentence reads on after "allowed:".
    allowed = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    allowed = allowed.partition(", unable to parse")[0]
    hint = ""
    if error["type"] == "literal_error":
        choices = re.findall("'([^']*)'", allowed)
        hint = _hint(str(error["input"]), choices)
    return UserError(
        f"{where}: {key}: {error['input']!r} is not allowed{hint} (allowed: {allowed})"
    )


# Words for accelerators, whose meaning counts more than their letters: "gpu" looks like "cpu".
# Empty: torch knows it by no name that is allowed.
_ACCELERATORS = {
    "gpu": "cuda", "nvidia": "cuda", "rocm": "cuda", "hip": "cuda", "amd": "cuda",
    "tpu": "", "xpu": "", "npu": "", "hpu": "", "mps": "",
}  # fmt: skip


def _hint(value: str, choices: Sequence[str]) -> str:
    """Return the choice that a person may have meant, as part of a sentence."""
    word = re.sub(r"\W.*", "", value.lower())  # without a number: gpu:0
    meant = _ACCELERATORS.get(word)
    if meant is None or "cuda" not in choices:
        return did_you_mean(value, choices)
    return f"; did you mean {meant!r}?" if meant else ""


def _dotted(location: tuple[int | str, ...]) -> str:
    """Return the key of a location, such as ``callbacks[0].norm``."""
    key = ""
    for part in location:
        if isinstance(part, int):
            key += f"[{part}]"
        # pydantic's names for the branches of a union are no identifiers.
        elif part.replace("_", "").isidentifier():
            key += f".{part}" if key else part
    return key


def _schema_at(schema: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    """Return the model that holds the key at a location."""
    for part in location:
        field = schema.model_fields.get(str(part))
        # An index of a list, or the name of a union's branch: the model stays the same.
        if field is None:
            continue
        schema = _model_in(field.annotation) or schema
    return schema


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """Return the model that an annotation wraps, as ``Annotated[Compute, ...] | None`` does."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for argument in typing.get_args(annotation):
        model = _model_in(argument)
        if model is not None:
            return model
    return None
