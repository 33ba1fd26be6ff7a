"""``scaletrain schema``: the JSON schema of a run's YAML file, for editors."""

import json

import click


@click.command()
def command() -> None:
    """Print the JSON schema of a run's YAML file, for editors that complete and check it.

    In VS Code with the YAML extension, the first line of the file then names the schema:
    `# yaml-language-server: $schema=run.schema.json`.

    \b
    Example:
      scaletrain schema > run.schema.json
    """
    from scaletrain.config import RunConfig

    click.echo(json.dumps(RunConfig.model_json_schema(), indent=2))
