"""Tests benchmarks/lab/recipe_workers.py: what it trains, and when it says that results differ."""

import pytest

from benchmarks.lab import recipe_workers
from scaletrain.recipes import recipe


def test_every_recipe_has_a_variant_to_compare_or_sets_its_workers():
    for name in recipe.names():
        shown = recipe.load(name)
        variant = recipe_workers.first_variant(shown)
        if variant is None:
            assert all("workers" in changes for changes in shown.variants.values())
        else:
            assert shown.run_config(variant, settings={"workers": 3}).workers == 3
            assert recipe_workers.figure_of(shown).startswith("test_")


@pytest.mark.parametrize(
    ("together", "verdict"),
    [
        ((0.31, 0.19, 0.25), "the same"),  # one up, one down
        ((0.30, 0.20, 0.25), "the same"),  # nothing moves at all
        ((0.33, 0.23, 0.281), "DIFFERENT"),  # small beside the spread of seeds, but in every pair
    ],
)
def test_seeds_are_compared_in_pairs(together: tuple[float, ...], verdict: str):
    alone = [{"test_error": value} for value in (0.30, 0.20, 0.25)]
    others = [{"test_error": value} for value in together]
    shown = recipe.load("dropout").model_copy(update={"variants": {"plain": {}}})
    rows = recipe_workers.compare(shown, {1: alone, 2: alone, 3: others})
    assert [(row.workers, row.verdict) for row in rows] == [(2, "the same"), (3, verdict)]
    assert rows[1].difference == pytest.approx(sum(together) / 3 - 0.25)
