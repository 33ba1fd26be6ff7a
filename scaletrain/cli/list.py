"""``scaletrain list``: every plugin on disk, with its options."""

import json
from typing import NamedTuple

import click

from scaletrain import plugins

KINDS = (
    "exchange", "collective", "transport", "launcher", "model", "data", "optimizer", "callback",
    "bench",
)  # fmt: skip


class Entry(NamedTuple):
    """One plugin in the menu."""

    name: str  # as it is typed
    description: str  # first line of its docstring
    options: list[str]  # "name=default", or the name alone of an option that must be given


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def command(as_json: bool) -> None:
    """Show all plugins: exchanges, collectives, wires, launchers, models, data, optimizers, ...

    Each comes with its options and their defaults.

    \b
    Example:
      scaletrain list
    """
    menu = {kind: [_entry(kind, name) for name in plugins.names(kind)] for kind in KINDS}
    if as_json:
        as_dicts = {kind: [entry._asdict() for entry in menu[kind]] for kind in menu}
        click.echo(json.dumps(as_dicts, indent=2))
        return
    for kind, entries in menu.items():
        click.secho(kind, bold=True)
        for entry in entries:
            click.echo(f"  {entry.name:<18} {entry.description}")
            if entry.options:
                click.secho(f"  {'':<18} options: {', '.join(entry.options)}", dim=True)


def _entry(kind: str, name: str) -> Entry:
    # The options of a benchmark are click's, not its factory's parameters: see its --help.
    options = [] if kind == "bench" else _options(kind, name)
    return Entry(plugins.typed_name(kind, name), plugins.describe(kind, name), options)


def _options(kind: str, name: str) -> list[str]:
    schema = plugins.options(kind, name)
    if schema is None:
        return []
    options = []
    for option, field in schema.model_fields.items():
        must_be_given = field.is_required()
        options.append(option if must_be_given else f"{option}={field.default!r}")
    return options
