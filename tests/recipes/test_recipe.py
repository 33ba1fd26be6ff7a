"""Tests of ``recipes/recipe.py``, ``judging.py`` and the shipped recipes' files."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from scaletrain import Data
from scaletrain.errors import UserError
from scaletrain.recipes import judging, page, recipe, running
from scaletrain.recipes.recipe import Claim
from scaletrain.run.records import StepRecord
from scaletrain.training.workload import Supervised

RECIPE = """
title: Wide beats narrow
source: nobody
setting: a test
job: {model: {name: mlp, sizes: [64, 8, 10]}, data: digits, batch_size: 8, steps: 2}
variants:
  narrow: {}
  wide: {model.sizes: [64, 32, 10], init_from: "${narrow}"}
claims:
  - {says: wide is better, of: wide, to: narrow, at_most: 0.9}
seeds: 3
forms:
  tiny: {job: {steps: 1}, variants: [narrow], seeds: 1}
"""


def written(tmp_path: Path, text: str = RECIPE) -> Path:
    path = tmp_path / "wide.yaml"
    path.write_text(text)
    return path


def loaded(tmp_path: Path, text: str = RECIPE) -> recipe.Recipe:
    return recipe.load(str(written(tmp_path, text)))


def finished(run_dir: Path, **figures: float) -> Path:
    run_dir.mkdir(parents=True)
    summary = {"workers": 1, "finished": True, **figures}
    (run_dir / "summary.json").write_text(json.dumps(summary))
    return run_dir


@pytest.mark.parametrize("name", recipe.names())
def test_a_shipped_recipe_is_checked_at_each_of_its_scales(name: str):
    of = recipe.load(name)
    assert of.source and of.setting
    for scale in ("small", *of.forms):
        plan = running.plan(of, running.Request(scale=scale), Path("out"))
        assert len(plan.series) == len(of.variant_names(scale)) * of.num_seeds(scale)
    assert of.claims_at("small"), "a recipe without a claim shows nothing"


def test_later_changes_win_and_variants_have_the_last_word(tmp_path: Path):
    of = loaded(tmp_path)
    assert of.run_config("narrow").steps == 2
    assert of.run_config("narrow", scale="tiny").steps == 1
    assert of.run_config("narrow", scale="tiny", settings={"steps": 7}).steps == 7
    wide = of.run_config("wide", settings={"model.sizes": [64, 10]})
    assert wide.model.options["sizes"] == [64, 32, 10]


def test_a_form_may_change_the_variants_too(tmp_path: Path):
    text = RECIPE.replace("variants: [narrow],", "variants: {wide: {model.sizes: [64, 48, 10]}},")
    of = loaded(tmp_path, text)
    assert of.variant_names("tiny") == ["wide"]
    assert of.run_config("wide", scale="tiny").model.options["sizes"] == [64, 48, 10]
    assert of.run_config("wide").model.options["sizes"] == [64, 32, 10]


def full_variants() -> list[tuple[str, str]]:
    pairs = []
    for name in recipe.names():
        of = recipe.load(name)
        if "full" in of.forms:
            pairs += [(name, variant) for variant in of.variant_names("full")]
    return pairs


@pytest.mark.parametrize(("name", "variant"), full_variants())
def test_the_full_form_of_a_recipe_makes_a_step_on_the_meta_device(name: str, variant: str):
    """Networks take pictures of the size that the data has; every weight gets a gradient."""
    run = recipe.load(name).run_config(variant, scale="full")
    if run.model is None or run.data is None or run.data.name != "image_folder":
        pytest.skip("not a network for pictures")
    with torch.device("meta"):
        network = run.load("model")(**run.model.options).train()
        pictures = torch.zeros(2, 3, run.data.options["size"], run.data.options["size"])
        job = Supervised(network, cross_entropy, Data([], []), None)
        loss = job.forward((pictures, torch.zeros(2, dtype=torch.int64)))
        loss.total.backward()
    assert all(each.grad is not None for each in network.parameters())


def test_a_variant_begins_with_the_run_of_the_same_seed(tmp_path: Path):
    plan = running.plan(loaded(tmp_path), running.Request(), tmp_path / "out")
    for seed in range(3):
        config = plan.configs[tmp_path / "out" / "wide" / f"{seed}.yaml"]
        assert config.init_from.path == str(tmp_path / "out" / "narrow" / str(seed))
        assert config.seed == seed
    titles = [training.title for training in plan.series]
    assert titles[:3] == ["wide narrow seed 0", "wide wide seed 0", "wide narrow seed 1"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("of: wide", "of: wild", "claims[0].of: 'wild' is not known; did you mean 'wide'?"),
        ("to: narrow", "too: narrow", "claims[0].too: 'too' is not known; did you mean 'to'?"),
        (", at_most: 0.9", "", "a claim with at_least, at_most or both"),
        ("[narrow], seeds", "[narow], seeds", "forms.tiny.variants: 'narow' is not known"),
        ("{model.sizes", "{model.size", "did you mean 'sizes'"),
        ("${narrow}", "${wide}", "${wide}: 'wide' is not known (allowed: narrow)"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, old: str, new: str, message: str):
    assert old in RECIPE
    with pytest.raises(UserError) as caught:
        running.plan(loaded(tmp_path, RECIPE.replace(old, new)), running.Request(), tmp_path)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def verdict(tmp_path: Path, claim: Claim, ours: list[float], theirs: list[float]):
    run_dirs = {}
    for variant, values in (("ours", ours), ("theirs", theirs)):
        run_dirs[variant] = [
            finished(tmp_path / variant / str(seed), test_accuracy=1 - value)
            for seed, value in enumerate(values)
        ]
    return judging.judge(claim, run_dirs)


@pytest.mark.parametrize(
    ("limits", "met"),
    [
        ({"at_most": 0.56}, True),
        ({"at_most": 0.50}, False),  # the interval reaches beyond
        ({"at_least": 0.44, "at_most": 0.56}, True),
        ({"at_least": 0.5}, False),
    ],
)
def test_a_claim_is_met_if_the_whole_interval_is_within_its_limits(tmp_path: Path, limits, met):
    claim = Claim(says="half the errors", of="ours", to="theirs", **limits)
    found = verdict(tmp_path, claim, [0.10, 0.11, 0.12], [0.20, 0.21, 0.25])
    assert found.value.value == pytest.approx(0.33 / 0.66)
    assert 0 < found.value.ci95 < 0.06
    assert found.is_met is met


def test_differences_are_taken_in_pairs(tmp_path: Path):
    claim = Claim(says="", of="ours", to="theirs", by="difference", at_most=-0.09)
    found = verdict(tmp_path, claim, [0.1, 0.3, 0.5], [0.2, 0.4, 0.6])
    # Seeds differ by far more than the variants do: only pairs show it.
    assert found.value.value == pytest.approx(-0.1) and found.value.ci95 < 1e-9 and found.is_met


def test_a_run_that_failed_leaves_its_claims_unjudged(tmp_path: Path):
    claim = Claim(says="", of="ours", at_most=1.0)
    run_dirs = {"ours": [finished(tmp_path / "0", test_accuracy=0.9), tmp_path / "1"]}
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "failed.json").write_text('{"reason": "rank 0 at step 3: boom"}')
    found = judging.judge(claim, run_dirs)
    assert not found.is_met and found.reason == "ours, seed 1: rank 0 at step 3: boom"
    claim = Claim(says="", figure="test_f1", of="ours", at_most=1.0)
    found = judging.judge(claim, {"ours": run_dirs["ours"][:1]})
    assert (
        "has no figure test_f1 (there are: diverged, test_accuracy, test_error, workers)"
        in found.reason
    )


def test_sent_bytes_are_a_mean_over_the_steps_that_count_them(tmp_path: Path):
    run_dir = finished(tmp_path / "0")
    assert "sent_bytes" not in judging.figures(run_dir)
    steps = []
    for step, sent in enumerate((100.0, 300.0)):
        steps.append(StepRecord(step, 0, 0.0, 0.5, 8, 0.1, 0.2, 0, 0, 0, 0, {"bytes_sent": sent}))
    lines = [json.dumps(dataclasses.asdict(each)) + "\n" for each in steps]
    (run_dir / "rank-0.jsonl").write_text("".join(lines))
    assert judging.figures(run_dir)["sent_bytes"] == 200


def test_the_page_keeps_other_recipes_and_names_misses(tmp_path: Path):
    of = loaded(tmp_path)
    runs = tmp_path / "runs"
    for seed in range(3):
        finished(runs / "wide" / str(seed), test_accuracy=0.5 + 0.1 * seed)
        finished(runs / "narrow" / str(seed), test_accuracy=0.5 + 0.1 * seed, test_found=0.25)
        evaluations = [{"step": step, "test_accuracy": 0.1 * step} for step in (1, 2)]
        text = "".join(json.dumps(each) + "\n" for each in evaluations)
        (runs / "wide" / str(seed) / "evaluations.jsonl").write_text(text)
    request = running.Request(workers=2, settings={"exchange": "ring"})
    page.publish(running.result(running.plan(of, request, runs), 7.0), tmp_path / "results")
    tiny = running.Request(scale="tiny")
    of.claims.append(Claim(says="it learns", of="narrow", at_most=0.5, scales=["tiny"]))
    of.claims.append(
        Claim(says="it finds", figure="test_found", of="narrow", at_most=0.3, scales=["tiny"])
    )
    page.publish(running.result(running.plan(of, tiny, runs), 1.0), tmp_path / "results")
    text = (tmp_path / "results" / "recipes.md").read_text()
    assert "| `test_error: wide / narrow <= 0.9` | 1.000 ± 0.000 | 3 | MISSED | 7 s |" in text
    assert "| it learns | `test_error: narrow <= 0.5` | 0.500 | 1 | met | 1 s |" in text
    assert "`scaletrain recipes run wide --workers 2 --set exchange=ring`" in text
    assert "| variant | test_error | test_found |" in text, "what claims are about comes first"
    assert (tmp_path / "results" / "recipes" / "wide.svg").read_text().count("wide") >= 1


def test_a_curve_is_that_of_a_claimed_figure_where_there_is_no_error(tmp_path: Path):
    of = loaded(tmp_path)
    runs = tmp_path / "runs"
    for seed in range(3):
        for variant in ("narrow", "wide"):
            run_dir = finished(runs / variant / str(seed), test_ap50=0.5)
            evaluations = [
                {"step": step, "test_accuracy": None, "test_ap50": step * seed} for step in (1, 2)
            ]
            text = "".join(json.dumps(each) + "\n" for each in evaluations)
            (run_dir / "evaluations.jsonl").write_text(text)
    plan = running.plan(of, running.Request(), runs)
    assert not any(running.result(plan, 1.0).curves.values()), "no claim is about it"
    of.claims[0] = Claim(says="it finds", figure="test_ap50", of="wide", at_least=0.4)
    result = running.result(plan, 1.0)
    assert result.curve_figure == "test_ap50"
    assert [(point.step, point.value) for point in result.curves["wide"]] == [(1, 1.0), (2, 2.0)]
