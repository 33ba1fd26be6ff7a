"""Whether recipes show the same on 1, 2 and 3 workers: ``benchmarks/results/recipe_workers.md``."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import click

from benchmarks.lab import pages
from scaletrain.recipes import judging, recipe, running
from scaletrain.recipes.recipe import Recipe
from scaletrain.run.environment import environment
from scaletrain.scaling.measure import intervals

ALONE = 1
WORKERS = (2, 3)


class Row(NamedTuple):
    """A variant of a recipe on several workers, beside one worker; seeds in pairs."""

    recipe: str
    variant: str
    figure: str
    seeds: int
    alone: float  # mean of the figure on one worker
    alone_ci95: float
    workers: int
    together: float
    difference: float
    difference_ci95: float

    @property
    def verdict(self) -> str:
        """Whether the interval of the difference holds 0."""
        if abs(self.difference) <= self.difference_ci95:
            return "the same"
        return "DIFFERENT"


@click.command("recipe-workers")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(2))
@click.option("--only", multiple=True, help="A recipe; repeatable [default: all].")
@click.option(
    "--runs",
    type=click.Path(path_type=Path),
    default=Path("runs/recipe-workers"),
    show_default=True,
    help="Where trainings go; those that are there are not run again.",
)
@pages.out_option("recipe_workers")
def command(seeds: int, only: tuple[str, ...], runs: Path, out: Path) -> None:
    """Train the first variant of each recipe on 1, 2 and 3 workers.

    \b
    Example:
      python -m benchmarks.lab recipe-workers --only dropout
    """
    rows: list[Row] = []
    fixed: list[str] = []  # recipes whose variants set their workers themselves
    for name in only or recipe.names():
        shown = recipe.load(name)
        variant = first_variant(shown)
        if variant is None:
            fixed.append(name)
            continue
        found = {}
        for workers in (ALONE, *WORKERS):
            found[workers] = _figures(shown, variant, workers, seeds, runs / name / str(workers))
        rows += compare(name, variant, figure_of(shown), found)
    measured = {"environment": environment(), "rows": [row._asdict() for row in rows]}
    pages.publish(out, "recipe_workers", measured, rows=rows, fixed=fixed)


def first_variant(of: Recipe) -> str | None:
    """Return the first variant that neither begins with another nor sets its workers."""
    for name, changes in of.variants.items():
        if "workers" not in changes and "${" not in json.dumps(changes):
            return name
    return None


def figure_of(of: Recipe) -> str:
    """Return the figure of the test set that the recipe's first claim about one is about."""
    claimed = [claim.figure for claim in of.claims if claim.figure.startswith("test_")]
    return claimed[0]


def _figures(
    of: Recipe, variant: str, workers: int, seeds: int, out: Path
) -> list[judging.Figures]:
    """Train a variant with each seed, and return the figures of each."""
    alone = of.model_copy(update={"variants": {variant: of.variants[variant]}, "claims": []})
    plan = running.plan(alone, running.Request(workers=workers, seeds=seeds), out)
    running.run(plan, click.echo)
    return [judging.figures(run_dir) for run_dir in plan.run_dirs[variant]]


def compare(
    name: str, variant: str, figure: str, found: Mapping[int, Sequence[judging.Figures]]
) -> list[Row]:
    """Return a row for each number of workers but one.

    Args:
        name: of the recipe.
        variant: its variant.
        figure: which is compared.
        found: the figures of each seed, by the number of workers.
    """
    values = {workers: [each[figure] for each in found[workers]] for workers in found}
    alone = intervals.mean(values[ALONE])
    rows = []
    for workers in WORKERS:
        pairs = zip(values[workers], values[ALONE], strict=True)
        difference = intervals.mean([together - own for together, own in pairs])
        rows.append(
            Row(
                recipe=name,
                variant=variant,
                figure=figure,
                seeds=alone.n,
                alone=alone.value,
                alone_ci95=alone.ci95 or 0.0,
                workers=workers,
                together=intervals.mean(values[workers]).value,
                difference=difference.value,
                difference_ci95=difference.ci95 or 0.0,
            )
        )
    return rows
