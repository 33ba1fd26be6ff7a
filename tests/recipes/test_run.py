"""Recipes that train: the command, from the file to the page. CI runs three in their tiny form."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def run(out: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scaletrain.cli", "recipes", "run", *arguments]
    command += ["--set", "scale=tiny", "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, timeout=110)


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
