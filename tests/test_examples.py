"""Examples in docstrings run, and say what they print; examples of jobs train."""

import doctest
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scaletrain.run.layout import RunDir

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "scaletrain"


def modules_with_examples() -> list[str]:
    names = []
    for path in sorted(PACKAGE.rglob("*.py")):
        lines = path.read_text(encoding="utf-8").splitlines()
        if any(">>> " in line and "doctest: +SKIP" not in line for line in lines):
            parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
            names.append(".".join(part for part in parts if part != "__init__"))
    return names


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_in_docstrings(name: str):
    results = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert results.attempted > 0 and results.failed == 0


def test_examples_are_found():
    assert {"scaletrain.units", "scaletrain.errors", "scaletrain.world"} <= set(
        modules_with_examples()
    )


def train(example: str, run_dir: Path, *settings: str) -> dict[str, Any]:
    """Train an example on two workers; return its summary."""
    changes = [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "scaletrain.cli", "train", ROOT / "examples" / example / "job.yaml",
         "--workers", "2", "--run-dir", run_dir, *changes],
        capture_output=True, text=True, timeout=100, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(RunDir(run_dir).summary.read_text())


@pytest.mark.slow
def test_shapes_are_told_apart_in_a_folder_of_pictures(tmp_path: Path):
    pictures = tmp_path / "pictures"
    subprocess.run(
        [sys.executable, ROOT / "examples/shapes/pictures.py", pictures], check=True, timeout=60
    )
    # One that cannot be read is left out of each epoch.
    (pictures / "train" / "cross" / "0000.png").write_bytes(b"")
    summary = train(
        "shapes",
        tmp_path / "run",
        f"data.folder={pictures}/train",
        f"data.test_folder={pictures}/test",
        "bad_samples.skip=6",
    )
    assert summary["test_accuracy"] > 0.9
    assert 4 <= summary["bad_samples"] <= 6  # an epoch leaves out 32 of 800 samples at its end


@pytest.mark.slow
def test_a_stream_of_text_is_learned(tmp_path: Path):
    summary = train("stream", tmp_path / "run", "steps=120", "exchange=ring")
    assert summary["steps"] == 120
    # Guessing by the frequency of characters alone gives 3.2.
    assert summary["test_loss"] < 2.9
