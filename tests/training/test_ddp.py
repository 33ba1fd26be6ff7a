"""Tests of training/ddp.py: one exchange a process, of one model or several.

What it averages: test_trainer.py, test_updates.py.
"""

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scaletrain import plugins
from scaletrain.errors import UserError
from scaletrain.timeouts import Timeouts
from scaletrain.training.ddp import Gradients
from scaletrain.training.exchange import Setup
from scaletrain.world import World
from tests.ranks import run_ranks


def _join_twice(rank: int, size: int, folder: Path) -> int:
    store = dist.FileStore(str(folder / "store"), size)
    setup = Setup(store, torch.device("cpu"), Timeouts(20.0), folder)
    native = plugins.load("exchange", "native")
    joined = native(World(rank, size, rank, size), setup)
    with pytest.raises(UserError, match="has a default process group already"):
        native(World(rank, size, rank, size), setup)
    total = int(joined.begin_sum(torch.tensor([float(rank + 1)]))())
    joined.close()
    return total


@pytest.mark.slow
def test_a_second_exchange_is_refused_and_the_first_goes_on(tmp_path: Path):
    assert run_ranks(_join_twice, 2, tmp_path) == [3, 3]


@pytest.mark.parametrize("varies", [False, True])
def test_the_last_gradient_is_timed_and_the_others_soon_cost_nothing(varies: bool):
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(5)))
    calls: list[int] = []

    class Counted(Gradients):
        def _note(self, number: int, parameter: torch.Tensor) -> None:
            calls.append(number)
            super()._note(number, parameter)

    gradients = Counted(model, timed=True, varies=varies)
    for step in range(3):
        calls.clear()
        began = time.perf_counter()
        model(torch.ones(2, 4)).sum().backward()
        assert gradients.last_at is not None
        assert began < gradients.last_at < time.perf_counter()
        gradients.last_at = None
        gradients.end_step()
        assert len(calls) == (10 if varies or step == 0 else 1)
        assert calls[-1] == gradients.order[-1]
    assert sorted(gradients.order) == [*range(10)]


def _two_models(rank: int, size: int, folder: Path) -> list[float]:
    """Step the second of two models alone; return both weights."""
    store = dist.FileStore(str(folder / "store"), size)
    setup = Setup(store, torch.device("cpu"), Timeouts(20.0), folder)
    joined = plugins.load("exchange", "native")(World(rank, size, rank, size), setup)
    models = [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
    attached = []
    for model in models:
        model.weight.data.fill_(1.0 + rank)  # rank 0's counts
        attached.append(joined.attach(model, torch.optim.SGD(model.parameters(), lr=1.0)))
    attached[1](torch.tensor([[float(rank)]])).sum().backward()
    with pytest.raises(UserError, match="2 models are attached"):
        joined.step()
    joined.step(attached[1])
    joined.close()
    return [model.weight.item() for model in models]


@pytest.mark.slow
def test_one_of_several_models_is_stepped_by_name(tmp_path: Path):
    # The mean gradient over the ranks is (0 + 1) / 2.
    assert run_ranks(_two_models, 2, tmp_path) == [[1.0, 0.5], [1.0, 0.5]]


def _one_head_of_two(rank: int, size: int, folder: Path) -> str:
    """Train one of two heads for two steps; return the error of the second one."""
    store = dist.FileStore(str(folder / "store"), size)
    setup = Setup(store, torch.device("cpu"), Timeouts(20.0), folder)
    joined = plugins.load("exchange", "native")(World(rank, size, rank, size), setup)
    heads = torch.nn.ModuleDict({"used": torch.nn.Linear(1, 1), "left": torch.nn.Linear(1, 1)})
    model = torch.nn.Sequential()
    model.add_module("heads", heads)
    model.forward = lambda inputs: heads["used"](inputs)  # type: ignore[method-assign]
    attached = joined.attach(model, torch.optim.SGD(model.parameters(), lr=1.0))
    attached(torch.ones(1, 1)).sum().backward()
    joined.step()
    with pytest.raises(UserError) as caught:
        attached(torch.ones(1, 1))
    joined.close()
    return str(caught.value)


@pytest.mark.slow
def test_parameters_without_a_gradient_are_named(tmp_path: Path):
    (text,) = run_ranks(_one_head_of_two, 1, tmp_path)
    assert "gave no gradient to heads.left.weight, heads.left.bias (allowed: " in text
    assert "exchange.find_unused_parameters=true" in text
