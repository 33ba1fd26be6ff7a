"""Recipes that train: the command, from the file to the page. CI runs three in their tiny form."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scaletrain.cli", "recipes", "run", *arguments]
    command += ["--set", "scale=tiny", "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=110)


FAILS = """
title: A rate that is too high
source: nobody
setting: a test
job: {model: {name: mlp, sizes: [64, 16, 10]}, data: digits, batch_size: 100, steps: 40}
variants:
  trains: {optimizer.lr: 0.1}
  stops: {optimizer.lr: 1.0e+30}
  skips: {optimizer.lr: 1.0e+30, nonfinite: skip}
claims:
  - {says: it makes twice the errors, of: stops, to: trains, at_least: 2}
  - {says: it diverges, figure: diverged, of: skips, at_least: 1}
  - {says: the other does not, figure: diverged, of: trains, at_most: 0}
  - {says: nothing is known of its loss, figure: test_loss, of: stops, at_least: 0}
seeds: 1
forms: {tiny: {}}
"""


def test_a_run_that_diverges_is_judged_as_wrong_about_every_sample(tmp_path: Path):
    recipe = tmp_path / "fails.yaml"
    recipe.write_text(FAILS.replace("at_", "scales: [tiny], at_"))
    done = run(tmp_path, str(recipe))
    assert done.returncode == 1, done.stdout + done.stderr
    entry = json.loads((tmp_path / "recipes.json").read_text())["fails (tiny)"]
    assert [verdict["met"] for verdict in entry["verdicts"]] == [True, True, True, False]
    assert "has no figure test_loss (there are: diverged, " in entry["verdicts"][3]["reason"]
    assert entry["means"]["stops"]["test_error"] == 1 > entry["means"]["trains"]["test_error"]
    text = (tmp_path / "recipes.md").read_text()
    assert "Diverged, so wrong about every sample (`test_error` 1): stops, seed 0: rank 0" in text
    assert re.search(r"skips, seed 0: rank 0 at step \d+: .* gradients of 20 steps in a row", text)


def test_three_recipes_train_and_meet_their_claims(tmp_path: Path):
    done = run(tmp_path, "lecun1989", "dropout", "caffe")
    assert done.returncode == 0, done.stdout + done.stderr
    entries = json.loads((tmp_path / "recipes.json").read_text())
    assert sorted(entries) == ["caffe (tiny)", "dropout (tiny)", "lecun1989 (tiny)"]
    assert all(verdict["met"] for entry in entries.values() for verdict in entry["verdicts"])
    # What has finished is not trained again.
    again = run(tmp_path, "lecun1989")
    assert again.returncode == 0 and "seed 0:" not in again.stdout
    # Trainings of another configuration are not taken for these.
    other = run(tmp_path, "lecun1989", "--set", "optimizer.lr=0.2")
    assert other.returncode == 2 and "is of another configuration" in other.stderr


def test_a_recipe_shows_the_same_with_three_workers(tmp_path: Path):
    losses = []
    for workers in ("1", "3"):
        done = run(tmp_path / workers, "caffe", "--workers", workers)
        assert done.returncode == 0, done.stdout + done.stderr
        entries = json.loads((tmp_path / workers / "recipes.json").read_text())
        losses.append(entries["caffe (tiny)"]["means"]["poly"]["test_loss"])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
