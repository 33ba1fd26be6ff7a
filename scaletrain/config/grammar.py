"""The short forms that people type: exchanges, options and settings."""

from typing import Any

from yaml import YAMLError

from scaletrain import plugins
from scaletrain.config import yaml
from scaletrain.config.schema import Named
from scaletrain.errors import UserError, unknown


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
        return key.strip(), yaml.parse(value)
    except YAMLError:
        raise UserError(f"{where} {text}: the value is not YAML") from None


def set_key(tree: dict[str, Any], dotted: str, value: Any) -> None:
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
