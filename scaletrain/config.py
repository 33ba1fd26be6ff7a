"""What a run is: the YAML that people write, checked against a schema, resolved once, written to RUN_DIR/config.yaml.

Workers read that file and their rank variables, nothing else. Every mistake ends in one line that names the key, the value and what
would be right. This module imports no torch.
"""

import re
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic
import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from scaletrain import plugins, torch_source
from scaletrain.errors import UserError, did_you_mean, unknown

Model = TypeVar("Model", bound=BaseModel)


class Named(BaseModel):
    """A plugin's name and its options. The options are checked against the plugin's signature (``plugins.options``)."""

    model_config = ConfigDict(extra="allow")
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def _named(value: Any) -> Any:
    return {"name": value} if isinstance(value, str) else value


NameOrOptions = Annotated[Named, BeforeValidator(_named)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LrSchedule(Strict):
    """The learning rate of optimizer step i of n, Caffe's policies plus cosine, after a linear warm-up.

    ``fixed``; ``step`` lr gamma^floor(i/step_size); ``multistep`` gamma at each milestone (fractions of the run); ``exp`` lr gamma^i;
    ``inv`` lr (1 + gamma i)^-power; ``poly`` lr (1 - i/n)^power; ``sigmoid`` lr / (1 + exp(-gamma (i - step_size))); ``cosine``.
    """

    name: Literal["fixed", "step", "multistep", "exp", "inv", "poly", "sigmoid", "cosine"] = "fixed"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    gamma: float = 0.1
    power: float = 1.0
    step_size: Annotated[int, Field(ge=1)] = 1000
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = []


class Checkpoint(Strict):
    every_steps: Annotated[int, Field(ge=1)] | None = None  # None: only the last step
    keep: Annotated[int, Field(ge=1)] = 2


class Compute(Strict):
    """An emulated accelerator: the step waits this long instead of computing, gradients of the true sizes really move."""

    step_s: Annotated[float, Field(ge=0)] = 0.0  # seconds a step, whatever the batch
    sample_s: Annotated[float, Field(ge=0)] = 0.0  # seconds a sample of the worker's batch


class RunConfig(Strict):
    """One training job. See docs/configuration.md for each key."""

    name: str = "run"
    model: NameOrOptions
    data: NameOrOptions
    loss: str = "cross_entropy"
    batch_size: Annotated[int, Field(ge=1)]
    batch_mode: Literal["strong", "weak"] = (
        "strong"  # strong: batch_size is global and fixed; weak: it is each worker's
    )
    accumulate: Annotated[int, Field(ge=1)] = (
        1  # backward passes a step; the batch is split over them, not multiplied
    )
    epochs: Annotated[float, Field(gt=0)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None  # exactly one of epochs and steps
    optimizer: NameOrOptions = Named(name="sgd", lr=0.1)  # type: ignore[call-arg]
    lr_schedule: Annotated[LrSchedule, BeforeValidator(_named)] = LrSchedule()
    exchange: NameOrOptions = Named(name="native")
    launcher: NameOrOptions = Named(name="local")
    workers: Annotated[int, Field(ge=1)] = 1
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=1)] | Literal["auto"] = (
        "auto"  # a worker's; auto: its share of the cores
    )
    loader_workers: Annotated[int, Field(ge=0)] = 0
    seed: int = 0
    evaluate_every: Annotated[int, Field(ge=1)] | None = None  # steps; None: only after the last
    target_accuracy: Annotated[float, Field(gt=0, le=1)] | None = (
        None  # the run notes when it is first reached
    )
    checkpoint: Checkpoint = Checkpoint()
    log_every: Annotated[int, Field(ge=1)] = 10
    timeout_s: Annotated[float, Field(gt=0)] = (
        60.0  # a rank without progress for this long is taken as hung
    )
    compute: Compute | None = None
    trace: bool = (
        False  # record buckets, rounds and waits, and each rank's clock, for a Chrome trace
    )
    source: str | None = None  # file this came from; user modules are looked for beside it

    @property
    def search_path(self) -> Path | None:
        """Where ``package.module:factory`` names are looked for first."""
        return Path(self.source).parent if self.source else None

    def load(self, kind: Literal["model", "data", "exchange", "launcher"]) -> Any:
        """Import the plugin that this config names for a kind; returns its factory."""
        return plugins.load(kind, getattr(self, kind).name, self.search_path)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """A key given twice is a mistake. YAML 1.2's numbers:
    1e-3 is one (in YAML 1.1, pyyaml's, it is a string unless it is written 1.0e-3), 1:2 is none (there: 62)."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        if kind is yaml.ScalarNode and implicit[0] and ":" in value:
            return "tag:yaml.org,2002:str"
        return super().resolve(kind, value, implicit)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{key.value} is given twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def load(path: Path, settings: dict[str, Any] | None = None) -> RunConfig:
    """Read and check a YAML file; ``settings`` (dotted key: value) replace what it says.

    Raises:
        UserError: in one line, the first thing that is wrong.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file (UTF-8)") from None
    try:
        tree = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not YAML: {getattr(error, 'problem', None) or error}") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"{path}: a run is a mapping of keys to values, this file holds {_kind(tree)}"
        )
    tree.setdefault("name", path.stem)
    tree.setdefault("source", str(path.resolve()))
    for key, value in (settings or {}).items():
        _set(tree, key, value)
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
    known = torch_source.losses()
    if ":" in config.loss:
        plugins.options("loss", config.loss, config.search_path)
    elif known and config.loss not in known:
        raise unknown(f"{where}: loss", config.loss, known)


def _optimizer_options(optimizer: Named, where: str) -> dict[str, Any]:
    """The options that are given, checked against the signature of torch's class where torch is installed."""
    given, known = optimizer.options, torch_source.optimizers()
    if known is None:
        return given
    if optimizer.name.lower() not in known:
        raise unknown(f"{where}: optimizer", optimizer.name, known)
    schema = torch_source.optimizer_options(optimizer.name)
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


def expand_exchange(text: str, where: str = "") -> dict[str, Any]:
    """The short forms people type: ``native``, ``ring`` (= ``scheduled:ring``), ``scheduled:ring@gloo``, ``pipelined_tree:segments=8``,
    ``parameter_server:async``.

    ``NAME:VALUE`` sets the exchange's first option, ``@VALUE`` its option ``transport``.
    """
    head, _, transport = text.partition("@")
    name, _, value = head.partition(":")
    if name in plugins.names("collective"):
        name, value = "scheduled", head
    if name not in plugins.names("exchange"):
        raise unknown(
            f"{where}exchange", name, [*plugins.names("exchange"), *plugins.names("collective")]
        )
    tree: dict[str, Any] = {"name": name}
    if value:
        schema = plugins.options("exchange", name)
        fields = list(schema.model_fields) if schema else []
        if not fields:
            raise UserError(f"exchange: {text!r}: {name} has no options")
        tree[fields[0]] = value
    return tree | ({"transport": transport} if transport else {})


def exchange_label(exchange: Named) -> str:
    """The shortest text that ``expand_exchange`` takes for this exchange; labels rows of reports."""
    options = exchange.options
    schema = plugins.options("exchange", exchange.name)
    first = next(iter(schema.model_fields), None) if schema else None
    label = exchange.name
    if first and options.get(first) not in (None, schema.model_fields[first].default):  # type: ignore[union-attr]
        value = str(options[first])
        label = value if exchange.name == "scheduled" else f"{exchange.name}:{value}"
    transport = options.get("transport", "auto")
    return label if transport == "auto" else f"{label}@{transport}"


def parse_setting(
    text: str, where: str = "--set", example: str = "optimizer.lr=0.05"
) -> tuple[str, Any]:
    """``a.b=value``; the value is read as YAML. ``example``: one that would be right in this place."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{where} {text}: expected KEY=VALUE, such as {example}")
    try:
        return key.strip(), yaml.load(value, _Loader)
    except yaml.YAMLError:
        raise UserError(f"{where} {text}: the value is not YAML") from None


def _set(tree: dict[str, Any], dotted: str, value: Any) -> None:
    if "." not in dotted and isinstance(value, str) and isinstance(tree.get(dotted), dict):
        # Another name replaces a plugin with its options; the same name keeps the options that the file gives it.
        named = expand_exchange(value) if dotted == "exchange" else {"name": value}
        before = tree[dotted]
        tree[dotted] = before | named if before.get("name") == named["name"] else named
        return
    *parents, last = dotted.split(".")
    for parent in parents:
        below = tree.get(parent)
        if isinstance(below, str):
            below = expand_exchange(below) if parent == "exchange" else {"name": below}
        tree[parent] = dict(below or {})
        tree = tree[parent]
    tree[last] = value


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


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
