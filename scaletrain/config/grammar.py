"""The short forms that people type: ``NAME:OPTION=VALUE``, ``@transport`` and labels.

>>> expand_exchange("ring@gloo")
{'name': 'scheduled', 'collective': 'ring', 'transport': 'gloo'}
"""

from typing import Any, NamedTuple

from scaletrain import plugins
from scaletrain.config import yaml
from scaletrain.config.schema import Named
from scaletrain.errors import UserError, unknown

# Keys whose text stands for something else than the name of a plugin: the option that it sets.
_TEXT_SETS = {"init_from": "path", "scaling": "rule", "best": "figure", "bad_samples": None}
# Keys whose names, such as "cosine", all have the same options.
_SHARED_OPTIONS = {"lr_schedule"}


class Spec(NamedTuple):
    """A plugin's name and the options that were typed with it, not yet checked."""

    name: str
    settings: tuple[str, ...] = ()  # "OPTION=VALUE" each

    @property
    def rest(self) -> str:
        """Everything after the first colon, as it was typed."""
        return ":".join(self.settings)


def split_spec(text: str) -> Spec:
    """Split ``NAME:OPTION=VALUE:OPTION=VALUE``.

    >>> split_spec("pipelined_tree:segments=8:fan_out=2")
    Spec(name='pipelined_tree', settings=('segments=8', 'fan_out=2'))
    """
    name, *settings = text.split(":")
    return Spec(name, tuple(settings))


def without_transport(exchange: str) -> str:
    """Return an exchange's label without ``@transport``.

    >>> without_transport("ring@gloo")
    'ring'
    """
    return exchange.partition("@")[0]


def is_users_own(name: str) -> bool:
    """Return True for ``package.module:factory``, a person's own factory."""
    return ":" in name


def parse_setting(
    text: str, where: str = "--set", example: str = "optimizer.lr=0.05"
) -> tuple[str, Any]:
    """Split ``KEY=VALUE``; the value is read as YAML.

    Args:
        text: the setting. A key may have dots.
        where: where it was typed, for the message.
        example: a setting that would be right in this place.

    Raises:
        UserError: the text has another form, or its value is not YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{where} {text}: expected KEY=VALUE, such as {example}")
    try:
        return key.strip(), yaml.parse(value)
    except ValueError:
        raise UserError(f"{where} {text}: the value is not YAML") from None


def expand_exchange(text: str, where: str = "") -> dict[str, Any]:
    """Return the mapping that a short form of an exchange stands for.

    ``NAME:VALUE`` sets the exchange's first option, and ``@VALUE`` its option ``transport``. The
    name of a collective is short for the exchange ``scheduled`` with this collective:

    - ``native``
    - ``ring``, or ``scheduled:ring``
    - ``scheduled:ring@gloo``
    - ``pipelined_tree:segments=8``
    - ``parameter_server:async``

    Args:
        text: the short form.
        where: the beginning of an error's line.

    Raises:
        UserError: there is no exchange or collective of this name, or the exchange has no options.
    """
    head, _, transport = text.partition("@")
    name, _, value = head.partition(":")
    # The collective keeps its own options: "pipelined_tree:segments=8" is one value of the option
    # `collective`.
    if name in plugins.names("collective"):
        name, value = "scheduled", head
    if name not in plugins.names("exchange"):
        choices = [*plugins.names("exchange"), *plugins.names("collective")]
        raise unknown(f"{where}exchange", name, choices)
    tree: dict[str, Any] = {"name": name}
    if value:
        options = _option_names(name)
        if not options:
            raise UserError(f"exchange: {text!r}: {name} has no options")
        option = value.partition("=")[0]
        if option in options:
            raise UserError(
                f"{where}exchange: {text!r} is not allowed (allowed: {name}, with"
                f" --set exchange.{value} beside it)"
            )
        # Not checked here: `checks` does it, with the plugin's own types.
        tree[options[0]] = value
    if transport:
        tree["transport"] = transport
    return tree


def exchange_label(exchange: Named) -> str:
    """Return the shortest text that ``expand_exchange`` takes for an exchange.

    It labels the rows of reports. Options other than the first one and the transport are left out.
    """
    label = exchange.name
    schema = plugins.options("exchange", exchange.name)
    options = _option_names(exchange.name)
    if schema and options:
        value = exchange.options.get(options[0])
        # A value that is the default is left out, so that one exchange has one label.
        if value not in (None, schema.model_fields[options[0]].default):
            # The name of a collective says by itself that it is scheduled.
            label = str(value) if exchange.name == "scheduled" else f"{exchange.name}:{value}"
    transport = exchange.options.get("transport", "auto")
    return label if transport == "auto" else f"{label}@{transport}"


def set_key(tree: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one key of a run's mapping, in place.

    Args:
        tree: a run as its file holds it.
        dotted: the key; dots lead into mappings, which are made if they are missing.
        value: replaces the key's value. The name of a plugin replaces the plugin with its options,
            unless it is the same plugin: then the options that the file gives are kept. Policies of
            the learning rate keep them, too.
    """
    # Without a dot the value names the plugin itself; with one it is an option of the plugin.
    is_name = "." not in dotted and isinstance(value, str) and dotted not in _TEXT_SETS
    before = tree.get(dotted)
    if is_name and isinstance(before, dict):
        named = _as_mapping(dotted, value)
        # Options of another plugin would be unknown to the new one; policies share theirs.
        keeps = before.get("name") == named["name"] or dotted in _SHARED_OPTIONS
        tree[dotted] = before | named if keeps else named
        return
    *parents, last = dotted.split(".")
    for parent in parents:
        below = tree.get(parent)
        # "exchange: ring" has to become a mapping before exchange.transport can be set.
        if isinstance(below, str):
            below = _as_mapping(parent, below)
        # A copy: with YAML's anchors, several keys may hold the same mapping.
        tree[parent] = dict(below or {})
        tree = tree[parent]
    tree[last] = value


def _as_mapping(key: str, text: str) -> dict[str, Any]:
    if key == "exchange":
        return expand_exchange(text)
    option = _TEXT_SETS.get(key, "name")
    return {option: text} if option else {}


def _option_names(exchange: str) -> list[str]:
    schema = plugins.options("exchange", exchange)
    return list(schema.model_fields) if schema else []
