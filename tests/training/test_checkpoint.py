"""Tests of training/checkpoint.py.

Checkpoints give back weights and optimizer state bit for bit; damaged and foreign files are
refused in one line.
"""

from pathlib import Path

import pytest
import torch
from torch import nn

from scaletrain.errors import UserError
from scaletrain.training import checkpoint


def job(kind: str = "Adam", width: int = 5) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Linear(width, 2))
    options = {"momentum": 0.9} if kind == "SGD" else {}
    return model, getattr(torch.optim, kind)(model.parameters(), lr=0.1, **options)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        model.zero_grad()
        model(
            torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        ).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad"])
def test_resumed_training_equals_uninterrupted_training(kind: str, tmp_path: Path):
    model, optimizer = job(kind)
    train(model, optimizer, range(5))
    checkpoint.save(tmp_path, 5, model, optimizer, keep=2)
    train(model, optimizer, range(5, 9))
    again, optimizer_again = job(kind)
    assert checkpoint.load_latest(tmp_path, again, optimizer_again) == 5
    train(again, optimizer_again, range(5, 9))
    for (name, value), other in zip(
        model.state_dict().items(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(value, other), name


def test_only_the_newest_stay_and_numbers_sort_as_numbers(tmp_path: Path):
    model, optimizer = job()
    for step in (8, 9, 10, 100):
        checkpoint.save(tmp_path, step, model, optimizer, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step-10.safetensors",
        "step-100.safetensors",
    ]
    assert checkpoint.load_latest(tmp_path, model, optimizer) == 100


def test_nothing_to_load(tmp_path: Path):
    assert checkpoint.load_latest(tmp_path, *job()) is None


@pytest.mark.parametrize(
    "damage",
    [lambda b: b[:100], lambda b: b[: len(b) - 7], lambda b: b"", lambda b: b"\xff" * 64 + b[64:]],
)
def test_a_damaged_file_is_refused(damage, tmp_path: Path):
    path = checkpoint.save(tmp_path, 1, *job(), keep=1)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"step-1\.safetensors: damaged checkpoint"):
        checkpoint.load_latest(tmp_path, *job())


def test_another_models_file_is_refused(tmp_path: Path):
    checkpoint.save(tmp_path, 1, *job(), keep=1)
    with pytest.raises(UserError, match="another model or optimizer"):
        checkpoint.load_latest(tmp_path, *job(width=6))


def test_a_failed_write_leaves_the_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model, optimizer = job()
    checkpoint.save(tmp_path, 1, model, optimizer, keep=1)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.save(tmp_path, 2, model, optimizer, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1.safetensors"]
