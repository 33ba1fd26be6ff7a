"""Tests of training/weights.py: weights from files of other programs, and freeze.

Bugs it catches: weights that stay random without a word, a file whose loading runs code, a frozen
layer that is trained. Whole commands, with export: tests/test_commands.py.
"""

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from scaletrain import config
from scaletrain.config.schema import InitFrom
from scaletrain.errors import UserError
from scaletrain.training import checkpoint, weights, workload
from scaletrain.training.checkpoint import State
from tests.training import jobs


def network(classes: int = 3) -> nn.Module:
    model = nn.Sequential()
    model.add_module("features", nn.Linear(4, 5))
    model.add_module("head", nn.Linear(5, classes))
    return model


def write(path: Path, entries: dict[str, Any]) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(entries, path)
    else:
        torch.save(entries, path)
    return path


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "nested.pt", "run"])
def test_weights_come_from_any_kind_of_file(name: str, tmp_path: Path):
    source, model = network(), network()
    path = tmp_path / name
    if name == "run":
        path.mkdir()
        state = State(source, torch.optim.SGD(source.parameters(), lr=0.1))
        checkpoint.save(path, 3, state, keep=1)
    elif name == "nested.pt":
        write(path, {"epoch": 3, "state_dict": source.state_dict()})
    else:
        write(path, source.state_dict())
    lines = weights.load(InitFrom(path=str(path)), model)
    for key, value in source.state_dict().items():
        assert torch.equal(model.state_dict()[key], value)
    assert len(lines) == 1 and "4 of 4 tensors" in lines[0]


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({}, "missing in FILE: features.weight, features.bias (allow it with init_from.allow_missing"),
        ({"prefix": {"backbone.": "features."}}, "of another shape in FILE: head.weight ([7, 5], not [3, 5])"),
        ({"allow_missing": ["head", "features"]}, "in FILE alone: backbone.weight, backbone.bias"),
        ({"prefix": {"backbone.": "", "head.": ""}}, "two weights of the file become"),
        ({"path": "nowhere.pt"}, "there is no nowhere.pt"),
        ({"ema": True}, "only checkpoints of this program hold averages"),
    ],
)  # fmt: skip
def test_what_differs_is_refused_in_one_line(settings: dict, line: str, tmp_path: Path):
    entries = {
        "backbone.weight": torch.ones(5, 4),
        "backbone.bias": torch.ones(5),
        "head.weight": torch.ones(7, 5),
        "head.bias": torch.ones(7),
    }
    path = write(tmp_path / "model.pt", entries)
    with pytest.raises(UserError) as error:
        weights.load(InitFrom(**({"path": str(path)} | settings)), network())
    assert line.replace("FILE", str(path)) in str(error.value) and "\n" not in str(error.value)


def test_allowed_differences_are_lines(tmp_path: Path):
    entries = {"backbone.weight": torch.ones(5, 4), "head.weight": torch.ones(7, 5)}
    path = write(tmp_path / "model.safetensors", entries | {"old.scale": torch.ones(1)})
    model = network()
    before = model.head.weight.detach().clone()
    settings = InitFrom(
        path=str(path),
        prefix={"backbone.": "features."},
        allow_missing=["head", "*.bias"],
        allow_unexpected=["old.*"],
    )
    assert weights.load(settings, model) == [
        f"init_from: 1 of 4 tensors of the model from {path}",
        f"init_from: missing in {path}: features.bias, head.bias: these keep their initial values",
        f"init_from: of another shape in {path}: head.weight ([7, 5], not [3, 5]): these keep their"
        " initial values",
        f"init_from: in {path} alone: old.scale: these are left out",
    ]
    assert (model.features.weight == 1).all() and torch.equal(model.head.weight, before)


class Malice:
    def __reduce__(self) -> tuple:
        return os.mkdir, (os.environ["MALICE"],)


@pytest.mark.parametrize("way", ["torch", "pickle"])
def test_a_file_that_would_run_code_is_refused(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    made = tmp_path / "made"
    monkeypatch.setenv("MALICE", str(made))
    path = tmp_path / "model.pt"
    if way == "torch":
        torch.save({"weight": Malice()}, path)
    else:
        path.write_bytes(pickle.dumps({"weight": Malice()}, protocol=2))
    with pytest.raises(UserError, match="could run code") as error:
        weights.load(InitFrom(path=str(path)), network())
    assert "\n" not in str(error.value) and not made.exists()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 no archive"])
def test_a_damaged_file_is_one_line(content: bytes, tmp_path: Path):
    for name in ("model.pt", "model.safetensors"):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            weights.load(InitFrom(path=str(path)), network())
        assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_weights_below_another_key_are_not_guessed(tmp_path: Path):
    path = tmp_path / "all.pt"
    torch.save({"net": network().state_dict(), "step": 3}, path)
    with pytest.raises(UserError, match=r"no tensors, but net, step \(allowed: a state dict"):
        weights.load(InitFrom(path=str(path)), network())


def test_frozen_parameters_stay_and_the_others_follow_plain_torch(tmp_path: Path):
    tree = {
        "model": {"name": "mlp", "sizes": [8, 16, 4]},
        "data": "tests.training.jobs:vectors",
        "batch_size": 16,
        "steps": 4,
        "optimizer": {"name": "adamw", "lr": 0.1, "weight_decay": 0.5},
        "exchange": "none",
    }
    frozen = tree | {"freeze": ["1.*"]}
    before = workload.build(config.check(tree), torch.device("cpu")).model.state_dict()
    ran = jobs.train_rank(0, 1, frozen, tmp_path)["state"]
    alone = jobs.train_alone(frozen)
    assert [name for name in before if (ran[name] == before[name].numpy()).all()] == [
        "1.weight",
        "1.bias",
    ]
    for name, value in alone.items():
        torch.testing.assert_close(torch.from_numpy(ran[name]), value)
    with pytest.raises(UserError, match=r"freeze: 'conv\*' matches no parameter"):
        workload.build(config.check(tree | {"freeze": ["conv*"]}), torch.device("cpu"))
