"""Tests of training/compiling.py, and of keys that change how a model computes, all together.

Bugs it catches: a key that changes what is trained, a compiled model's names in checkpoints, a
compiler's failure that is a page long.
"""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from scaletrain import config
from scaletrain.config.schema import Compilation
from scaletrain.errors import UserError
from scaletrain.training import workload
from scaletrain.training.compiling import compile_in_place, explained
from tests.ranks import run_ranks
from tests.training import jobs


class Net(nn.Module):
    """A net that notes how it is called."""

    seen: ClassVar[list[bool]] = []  # of each call as it is written: were the channels last?

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.block = nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3))
        self.last = nn.Linear(4, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            Net.seen.append(images.is_contiguous(memory_format=torch.channels_last))
        return self.last(self.block(self.first(images)).mean((2, 3)))


def images() -> tuple[Dataset, Dataset]:
    random = torch.Generator().manual_seed(5)
    inputs = torch.randn(60, 3, 8, 8, generator=random)
    inputs *= torch.linspace(0.1, 3, 60)[:, None, None, None]
    targets = torch.randint(4, (60,), generator=random)
    return TensorDataset(inputs[:50], targets[:50]), TensorDataset(inputs[50:], targets[50:])


JOB: dict[str, Any] = {
    "model": f"{__name__}:Net",
    "data": f"{__name__}:images",
    "batch_size": 9,
    "steps": 4,
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
}


def train_noting(rank: int, size: int, tree: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    return jobs.train_rank(rank, size, tree, run_dir) | {"seen": Net.seen}


@pytest.mark.slow
def test_two_workers_with_every_key_train_as_one_without(tmp_path: Path):
    job = JOB | {
        "exchange": "ring",
        "compile": {"backend": "aot_eager"},
        "channels_last": True,
        "recompute": ["block"],
        "sync_batchnorm": True,
    }
    results = run_ranks(train_noting, 2, job, tmp_path)
    expected = jobs.train_alone(JOB)
    saved = load_file(tmp_path / "step-4.safetensors")
    for name, value in expected.items():
        for result in results:
            found = torch.from_numpy(result["state"][name])
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)
        assert f"model.{name}" in saved
    for result in results:
        assert result["seen"] == [], "it ran compiled"


@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_come_last(channels_last: bool):
    run = config.check(JOB | {"channels_last": channels_last})
    parts = workload.build(run, torch.device("cpu"))
    assert isinstance(parts.model, Net)
    Net.seen.clear()
    parts.evaluate(parts.data.train[:4])  # type: ignore[index]
    assert Net.seen == [channels_last]
    weights = parts.model.first.weight
    assert weights.is_contiguous(memory_format=torch.channels_last) == channels_last


def failing(graph: Any, inputs: Any) -> Any:
    raise ValueError("no luck\nand a second line")


def test_a_compiler_that_fails_is_one_line():
    with pytest.raises(UserError, match=r"^compile: .* InvalidBackend: .*'nonsense'.*$"):
        compile_in_place(nn.Linear(2, 2), Compilation(backend="nonsense"))
    # A name is all that a configuration has: the function stands for a backend that is installed.
    model = torch.compile(nn.Linear(2, 2), backend=failing)
    with pytest.raises(UserError) as told, explained():
        model(torch.ones(1, 2))
    assert str(told.value).startswith("compile: the compiler has failed: ValueError: no luck (")


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError), explained():
        raise ZeroDivisionError
