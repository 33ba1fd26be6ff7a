"""``scaletrain recipes``: the papers of the reading list, as jobs that state a claim."""

import sys
from pathlib import Path
from typing import Any

import click

from scaletrain.cli.options import directory_name


@click.group()
def command() -> None:
    """Run the papers of the reading list, and judge what they claim.

    \b
    Examples:
      scaletrain recipes list
      scaletrain recipes run dropout --workers 2
    """


@command.command("list")
def list_recipes() -> None:
    """Show all recipes, with their claims."""
    from scaletrain.recipes import judging, recipe

    for name in recipe.names():
        loaded = recipe.load(name)
        scales = ", ".join(["small", *loaded.forms])
        click.secho(f"{name}: {loaded.title} ({scales})", bold=True)
        click.echo(f"  {loaded.source}")
        for claim in loaded.claims_at("small"):
            click.echo(f"  - {claim.says} ({judging.rule(claim)})")


@command.command()
@click.argument("names", metavar="NAME...", nargs=-1)
@click.option("--all", "run_all", is_flag=True, help="Run every recipe.")
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True)
@click.option("--seeds", type=click.IntRange(min=1), help="Trainings of each variant.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the job, or scale=tiny|small|full; repeatable.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where trainings go [default: runs/recipes-TIME]. Given again: only missing ones run.",
)
@click.option(
    "--results",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where recipes.md and recipes.json go [default: OUT].",
)
@click.option("--cold", is_flag=True, help="Let each worker of each run import torch itself.")
@click.option("--dry-run", is_flag=True, help="Print the command of every training; start nothing.")
def run(
    names: tuple[str, ...],
    run_all: bool,
    out: Path | None,
    results: Path | None,
    settings: tuple[str, ...],
    dry_run: bool,
    **options: Any,
) -> None:
    """Train the variants of recipes, and judge their claims.

    NAME is a recipe of `scaletrain recipes list`, or a YAML file of your own. The status is 1 if a
    claim is missed.

    \b
    Examples:
      scaletrain recipes run dropout googlenet
      scaletrain recipes run --all --set scale=tiny
    """
    import shlex

    from scaletrain.config import parse_setting
    from scaletrain.errors import UserError
    from scaletrain.recipes import page, recipe, running
    from scaletrain.run import claim

    if bool(names) == run_all:
        raise UserError("recipes run: give names of recipes, or --all")
    changes = dict(parse_setting(text) for text in settings)
    scale = str(changes.pop("scale", "small"))
    request = running.Request(scale=scale, settings=changes, **options)
    recipes = [recipe.load(name) for name in names or recipe.names()]
    if run_all:
        recipes = [each for each in recipes if scale == "small" or scale in each.forms]
    directory = out or directory_name("recipes")
    # All of them before the first training: a mistake in the last one shows at once.
    plans = [running.plan(each, request, directory / each.name) for each in recipes]
    if dry_run:
        for plan in plans:
            for training in plan.series:
                click.echo(shlex.join(training.command))
        return
    for plan in plans:
        running.check_presence(plan)
    if out is None:
        made = claim.new_directory(directory)
        plans = [running.plan(each, request, made / each.name) for each in recipes]
        directory = made
    all_met = True
    with claim.in_use(directory, "--out"):
        for plan in plans:
            click.secho(f"{plan.recipe.name}: {plan.recipe.title}", bold=True)
            result = running.run(plan, click.echo)
            page.publish(result, results or directory)
            for line in page.text(result):
                click.echo(line)
            all_met = all_met and result.is_met
    click.echo(f"page: {(results or directory) / 'recipes.md'}")
    sys.exit(0 if all_met else 1)
