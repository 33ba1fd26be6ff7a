"""Tests of training/callbacks/ema.py against averages that a plain loop of torch keeps."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from scaletrain import config
from scaletrain.run.layout import RunDir
from scaletrain.training import checkpoint, workload
from tests.ranks import run_ranks
from tests.training import jobs

DECAY = 0.7
JOB = {
    "model": "tests.training.jobs:normalised",
    "data": "tests.training.jobs:vectors",
    "batch_size": 16,
    "steps": 6,
    "optimizer": {"name": "sgd", "lr": 0.2, "momentum": 0.9},
    "exchange": "native",
    "evaluate_every": 2,
    "callbacks": [{"name": "ema", "decay": DECAY}],
}


def averages_alone() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights after a run, and their averages."""
    average: dict[str, torch.Tensor] = {}

    def add(model: nn.Module) -> None:
        for name, value in model.named_parameters():
            before = average.get(name, value.detach())
            average[name] = DECAY * before + (1 - DECAY) * value.detach()

    steps = []

    def before_update(model: nn.Module) -> None:
        if steps:  # the weights after the step before
            add(model)
        steps.append(model)

    weights = jobs.train_alone(JOB, before_update=before_update)
    add(steps[-1])
    return weights, average


@pytest.mark.slow
def test_averages_are_evaluated_saved_and_training_goes_on_without_them(tmp_path: Path):
    weights, average = averages_alone()
    # Two workers share batches, so batch statistics, and with them the weights, would differ from
    # those of one: a batch is one worker's here.
    alone = jobs.train_rank(0, 1, JOB | {"exchange": "none"}, tmp_path)
    for name, value in alone["state"].items():
        torch.testing.assert_close(torch.from_numpy(value), weights[name])

    content = checkpoint.read(RunDir(tmp_path).checkpoint(6))
    saved = checkpoint.part_states(content)["callbacks.ema"]["weights"]
    for name, value in average.items():
        torch.testing.assert_close(saved[name], value)
    assert not torch.allclose(average["3.weight"], weights["3.weight"], rtol=1e-3)

    # The evaluation is that of the averages.
    parts = workload.build(config.check(JOB), torch.device("cpu"))
    parts.model.load_state_dict(saved)
    parts.model.eval()
    inputs, targets = parts.data.test[:]  # type: ignore[index]
    loss = nn.functional.cross_entropy(parts.model(inputs), targets).item()
    assert alone["summary"]["test_loss"] == pytest.approx(loss, rel=1e-5)

    # Ranks hold the same averages, those of running statistics too.
    several = tmp_path / "several"
    several.mkdir()
    first, second = run_ranks(_averages, 2, JOB, several)
    assert first.keys() == second.keys() and "1.running_var" in first
    for name in first:
        assert (first[name] == second[name]).all(), name


def _averages(rank: int, size: int, tree: dict, run_dir: Path) -> dict[str, np.ndarray]:
    """Train; return this rank's averages after the last evaluation."""
    kept = []
    add = jobs.Trainer._add_callback

    def noted(trainer: jobs.Trainer, named: config.schema.Named) -> None:
        add(trainer, named)
        kept.append(trainer._callbacks[-1])

    jobs.Trainer._add_callback = noted  # type: ignore[method-assign]
    jobs.train_rank(rank, size, tree, run_dir)
    weights = kept[0].state_dict()["weights"]
    return {name: value.numpy() for name, value in weights.items()}


def test_tied_weights_are_averaged_and_put_back_once(tmp_path: Path):
    tree = JOB | {"model": "tests.training.callbacks.test_ema:tied", "exchange": "none"}
    with_average = jobs.train_rank(0, 1, tree, tmp_path)
    plain = jobs.train_rank(0, 1, tree | {"callbacks": []}, tmp_path)
    assert with_average["summary"]["test_loss"] != plain["summary"]["test_loss"]
    for name, value in plain["state"].items():
        assert value.tobytes() == with_average["state"][name].tobytes()


def tied() -> nn.Module:
    first, second = nn.Linear(8, 8), nn.Linear(8, 8)
    second.weight = first.weight
    return nn.Sequential(first, nn.ReLU(), second, nn.Linear(8, 4))
