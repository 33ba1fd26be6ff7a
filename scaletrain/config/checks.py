"""Check a configuration: every mistake ends in one line that names the key, the value and what would be right."""

import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
from pydantic import BaseModel

from scaletrain import plugins, torch_names
from scaletrain.config import yaml
from scaletrain.config.grammar import expand_exchange, parse_setting, set_key
from scaletrain.config.schema import Named, RunConfig
from scaletrain.errors import UserError, did_you_mean, unknown

Model = TypeVar("Model", bound=BaseModel)


def load(path: Path, settings: dict[str, Any] | None = None) -> RunConfig:
    """Read and check a YAML file; ``settings`` (dotted key: value) replace what it says.

    Raises:
        UserError: in one line, the first thing that is wrong.
    """
    tree = yaml.read(path)
    tree.setdefault("name", path.stem)
    tree.setdefault("source", str(path.resolve()))
    for key, value in (settings or {}).items():
        set_key(tree, key, value)
    return check(tree, str(path))


def check(tree: dict[str, Any], where: str = "config") -> RunConfig:
    """A mapping as a RunConfig, plugins' options included and their defaults filled in. Raises ``UserError``."""
    if isinstance(tree.get("exchange"), str):
        tree = {**tree, "exchange": expand_exchange(tree["exchange"], f"{where}: ")}
    exchange = tree.get("exchange")
    if isinstance(exchange, dict) and exchange.get("name") in plugins.names("collective"):
        tree = {
            **tree,
            "exchange": {**exchange, "name": "scheduled", "collective": exchange["name"]},
        }
    config = _validate(RunConfig, tree, where)
    for kind in ("model", "data", "exchange", "launcher"):
        named: Named = getattr(config, kind)
        options = plugin_options(kind, named.name, named.options, where, config.search_path)
        setattr(config, kind, Named(name=named.name, **options))
    _check_loss(config, where)
    config.optimizer = Named(
        name=config.optimizer.name, **_optimizer_options(config.optimizer, where)
    )
    if (config.epochs is None) == (config.steps is None):
        raise UserError(
            f"{where}: give exactly one of epochs and steps (now: {config.epochs} and {config.steps};"
            " --set epochs=null leaves one out)"
        )
    if config.batch_mode == "strong" and config.workers > config.batch_size:
        raise UserError(
            f"{where}: workers: {config.workers} workers cannot share a global batch_size of {config.batch_size}"
            f" (allowed: 1 to {config.batch_size} workers, a larger batch_size, or batch_mode: weak)"
        )
    smallest_share = config.batch_size // (config.workers if config.batch_mode == "strong" else 1)
    if config.accumulate > smallest_share:
        raise UserError(
            f"{where}: accumulate: {config.accumulate} backward passes need as many samples, a worker has {smallest_share} of the"
            f" batch_size of {config.batch_size} (allowed: 1 to {smallest_share})"
        )
    return config


def _check_loss(config: RunConfig, where: str) -> None:
    known = torch_names.losses()
    if ":" in config.loss:
        plugins.options("loss", config.loss, config.search_path)
    elif known and config.loss not in known:
        raise unknown(f"{where}: loss", config.loss, known)


def _optimizer_options(optimizer: Named, where: str) -> dict[str, Any]:
    """The options that are given, checked against the signature of torch's class where torch is installed."""
    given, known = optimizer.options, torch_names.optimizers()
    if known is None:
        return given
    if optimizer.name.lower() not in known:
        raise unknown(f"{where}: optimizer", optimizer.name, known)
    schema = torch_names.optimizer_options(optimizer.name)
    if schema is None:
        return given
    checked = _validate(schema, given, where, "optimizer.").model_dump()
    return {key: checked[key] for key in given}


def plugin_options(
    kind: str,
    name: str,
    given: dict[str, Any],
    where: str = "options",
    search_path: Path | None = None,
) -> dict[str, Any]:
    """A plugin's options, checked against its signature and completed with its defaults. Raises ``UserError``.

    An option that is called like a kind of plugin (``collective``, ``transport``) takes a name of that kind, with options of its own if
    need be (``plugin_spec``), or ``auto``.
    """
    if ":" not in name and name not in plugins.names(kind):
        raise unknown(f"{where}: {kind}", name, plugins.names(kind))
    schema = plugins.options(kind, name, search_path)
    if schema is None:
        return given
    filled = _validate(schema, given, where, f"{kind}.").model_dump()
    for key, value in filled.items():
        if key in plugins.KINDS and value != "auto":
            plugin_spec(key, value, f"{where}: {kind}.{key}", also=("auto",))
    return {key: value for key, value in filled.items() if value != plugins.COMPUTED}


def plugin_spec(
    kind: str, text: str, where: str, also: Sequence[str] = ()
) -> tuple[str, dict[str, Any]]:
    """``NAME`` or ``NAME:OPTION=VALUE:...``, such as ``pipelined_tree:segments=8``: the name and the options that are given, checked.

    Raises:
        UserError: no such name (``also``: names that are allowed beside the plugins'), option or value.
    """
    name, *settings = text.split(":")
    if name not in plugins.names(kind):
        raise unknown(where, name, [*also, *plugins.names(kind)])
    given: dict[str, Any] = {}
    if settings:
        schema = plugins.options(kind, name)
        example = (
            next((f"{key}={field.default}" for key, field in schema.model_fields.items()), "")
            if schema
            else ""
        )
        if not example:
            raise UserError(
                f"{where}: {text!r} is not allowed: {name} has no options (allowed: {name})"
            )
        given = dict(parse_setting(setting, f"{where}: {name}", example) for setting in settings)
    checked = plugin_options(kind, name, given, where)
    return name, {key: checked[key] for key in given}


def _validate(schema: type[Model], tree: dict[str, Any], where: str, prefix: str = "") -> Model:
    try:
        return schema.model_validate(tree)
    except pydantic.ValidationError as error:
        # A misspelt key is also a missing one: the misspelling is the news.
        first = min(
            error.errors(), key=lambda e: (e["type"] != "extra_forbidden", e["type"] == "missing")
        )
        path = [
            str(part)
            for part in first["loc"]
            if str(part).replace("_", "").isidentifier() or isinstance(part, int)
        ]
        key = prefix + ".".join(path)
        if first["type"] == "extra_forbidden":
            inner = _schema_at(schema, first["loc"][:-1])
            raise unknown(
                f"{where}: key {key}", str(first["loc"][-1]), inner.model_fields
            ) from None
        if first["type"] == "missing":
            raise UserError(f"{where}: {key}: is missing") from None
        message = (
            first["msg"]
            .removeprefix("Input should be ")
            .removeprefix("Value error, ")
            .partition(", unable to parse")[0]
        )
        words = re.findall("'([^']*)'", message) if first["type"] == "literal_error" else []
        near = did_you_mean(str(first["input"]), words)
        raise UserError(
            f"{where}: {key}: {first['input']!r} is not allowed{near} (allowed: {message})"
        ) from None


def _schema_at(schema: type[BaseModel], location: tuple[int | str, ...]) -> type[BaseModel]:
    for part in location:
        field = schema.model_fields.get(str(part))
        candidates = [field.annotation, *typing.get_args(field.annotation)] if field else []
        schema = next(
            (c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), schema
        )
    return schema
