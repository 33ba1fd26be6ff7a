"""Examples in docstrings run, and say what they print; examples of jobs train."""

import doctest
import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from scaletrain.run.layout import RunDir
from scaletrain.run.records import read_records
from scaletrain.training import checkpoint

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


# Reads what ``scaletrain export`` wrote as a person does who has torch alone.
LOAD = """
import sys
import torch  # before the next line: torch loads the backends that are installed
sys.modules["scaletrain"] = None
from torch import nn
from safetensors.torch import load_file

model = nn.Module()
model.features = nn.Sequential(
    nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()
)
model.head = nn.Linear(512, 6)
read = load_file if sys.argv[1].endswith(".safetensors") else torch.load
model.load_state_dict(read(sys.argv[1]))
print(model.head.weight.sum().item())
"""


def _exported(*arguments: str) -> tuple[str, float]:
    """Export a run's weights; return what it says, and the sum of the head's weights."""
    said = _succeed(sys.executable, "-m", "scaletrain.cli", "export", *arguments)
    loaded = _succeed(sys.executable, "-c", LOAD, arguments[2])
    return said, float(loaded)


def _succeed(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_fine_tuning_and_export(tmp_path: Path):
    train = (sys.executable, "-m", "scaletrain.cli", "train")
    pretrained, tuned = tmp_path / "pretrained", tmp_path / "tuned"
    _succeed(*train, "examples/finetune/pretrain.yaml", "--run-dir", str(pretrained))
    job = ("examples/finetune/job.yaml", "--set", f"init_from.path={pretrained}")
    said = _succeed(*train, *job, "--workers", "2", "--run-dir", str(tuned))
    assert "init_from: 4 of 6 tensors of the model from" in said
    assert "of another shape" in said and "head.weight ([6, 512], not [4, 512])" in said
    summary = json.loads((tuned / "summary.json").read_text())
    assert summary["test_accuracy"] > 0.9

    def features(run_dir: Path) -> dict[str, torch.Tensor]:
        found = checkpoint.newest(run_dir)
        assert found is not None
        weights = checkpoint.model_state(found.content)
        return {name: value for name, value in weights.items() if name.startswith("features")}

    before, after = features(pretrained), features(tuned)
    assert len(before) == 4
    for name, value in before.items():
        assert torch.equal(value, after[name]), f"{name} was frozen"

    # Weights, averages and the best averages differ; each is a plain state dict.
    newest = _exported(str(pretrained), "--out", str(tmp_path / "newest.safetensors"))
    averages = _exported(str(pretrained), "--out", str(tmp_path / "averages.pt"), "--ema")
    best = _exported(str(pretrained), "--out", str(tmp_path / "best.safetensors"), "--best")
    assert "test_accuracy" in best[0] and "--ema exports those" in best[0]
    assert newest[1] != averages[1]
    content = checkpoint.newest(pretrained).content  # type: ignore[union-attr]
    averaged = checkpoint.part_states(content)["callbacks.ema"]["weights"]["head.weight"]
    assert averages[1] == averaged.sum().item()


@pytest.mark.slow
def test_boxes_are_found_in_pictures_with_different_numbers_of_them(tmp_path: Path):
    summary = train("boxes", tmp_path / "run", "steps=150", "exchange=ring")
    assert summary["test_found"] > 0.3  # at the beginning it finds none
    records = [*read_records(RunDir(tmp_path / "run").records(1))]
    assert len({record.count for record in records}) > 20
    last = records[-1]
    assert set(last.parts) == {"there", "where", "colour"}
    assert sum(last.parts.values()) == pytest.approx(last.loss)


@pytest.mark.slow
def test_two_halves_are_judged_together(tmp_path: Path):
    summary = train("halves", tmp_path / "run", "steps=400", "precision=bf16")
    assert summary["test_accuracy"] > 0.7  # of which digit the upper half is
    assert summary["test_belongs"] > 0.6  # guessing is right in one of two
    last = [*read_records(RunDir(tmp_path / "run").records(0))][-1]
    assert set(last.parts) == {"digit", "belongs"}
