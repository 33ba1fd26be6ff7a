"""Whether recipes show the same on 1, 2 and 3 workers: ``benchmarks/results/recipe_workers.md``."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import click

from benchmarks.lab import pages
from scaletrain.errors import UserError
from scaletrain.recipes import judging, recipe, running
from scaletrain.recipes.recipe import Recipe
from scaletrain.run.environment import environment
from scaletrain.scaling.measure import intervals, trainings

ALONE = 1
WORKERS = (2, 3)
_TRAINING_S = 3600.0  # the limit of one; times are not measured, so others may compute beside it


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
    plans: dict[str, dict[int, running.Plan]] = {}
    for name in only or recipe.names():
        shown = recipe.load(name)
        variant = first_variant(shown)
        if variant is None:
            fixed.append(name)
            continue
        plans[name] = {}
        for workers in (ALONE, *WORKERS):
            plan = _plan(shown, variant, workers, seeds, runs / name / str(workers))
            running.check_presence(plan)
            plans[name][workers] = plan
    for by_workers in plans.values():
        found = {workers: _figures(plan) for workers, plan in by_workers.items()}
        rows += compare(by_workers[ALONE].recipe, found)
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


def _plan(of: Recipe, variant: str, workers: int, seeds: int, out: Path) -> running.Plan:
    """Return the trainings of one variant alone."""
    alone = of.model_copy(update={"variants": {variant: of.variants[variant]}})
    request = running.Request(workers=workers, seeds=seeds, timeout_s=_TRAINING_S)
    return running.plan(alone, request, out)


def _figures(plan: running.Plan) -> list[judging.Figures]:
    """Train a plan's variant with each seed, and return the figures of each.

    Raises:
        UserError: a training failed.
    """
    running.train(plan, click.echo)
    (run_dirs,) = plan.run_dirs.values()
    for run_dir in run_dirs:
        reason = trainings.read_failure(run_dir)
        if reason:
            raise UserError(f"{run_dir}: {reason}")
    return [judging.figures(run_dir) for run_dir in run_dirs]


def compare(of: Recipe, found: Mapping[int, Sequence[judging.Figures]]) -> list[Row]:
    """Return a row for each number of workers but one.

    Args:
        of: the recipe, with one variant.
        found: the figures of each seed, by the number of workers.
    """
    (variant,) = of.variants
    figure = figure_of(of)
    values = {workers: [each[figure] for each in found[workers]] for workers in found}
    alone = intervals.mean(values[ALONE])
    rows = []
    for workers in WORKERS:
        pairs = zip(values[workers], values[ALONE], strict=True)
        difference = intervals.mean([together - own for together, own in pairs])
        rows.append(
            Row(
                recipe=of.name,
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
