"""Tests of training/statistics.py: what is evaluated is what the checkpoint holds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from scaletrain.parameter_server.protocol.settings import settings_from_options
from scaletrain.run.layout import RunDir
from scaletrain.training import statistics
from tests.parameter_server import job
from tests.ranks import run_ranks
from tests.training import jobs

NORMALISED = {
    "model": "tests.training.jobs:normalised",
    "data": "tests.training.jobs:vectors",
    "batch_size": 16,
    "steps": 6,
    "optimizer": {"name": "sgd", "lr": 0.05},
}


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["native", "ring@gloo", "none"])
def test_the_checkpoint_is_what_was_evaluated(exchange: str, tmp_path: Path):
    results = run_ranks(jobs.train_rank, 2, NORMALISED | {"exchange": exchange}, tmp_path)
    [(_, path)] = RunDir(tmp_path).checkpoints()
    state = {}
    for key, tensor in load_file(path).items():
        if key.startswith("model."):
            state[key.removeprefix("model.")] = tensor
    model = jobs.normalised()
    model.load_state_dict(state)
    model.eval()
    _, test = jobs.vectors()
    inputs, targets = test[:]
    loss = nn.functional.cross_entropy(model(inputs), targets).item()
    if exchange != "none":  # there each rank evaluates weights of its own
        assert results[0]["summary"]["test_loss"] == pytest.approx(loss, rel=1e-5)
    for name in ("1.running_mean", "1.running_var"):
        ours, theirs = (torch.from_numpy(result["state"][name]) for result in results)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        torch.testing.assert_close(state[name], ours, rtol=0, atol=0)


@pytest.mark.slow
def test_statistics_come_from_all_ranks_samples(tmp_path: Path):
    """With one step, the mean of both ranks' statistics is that of both halves of the batch."""
    tree = NORMALISED | {"exchange": "none", "steps": 1, "optimizer": {"name": "sgd", "lr": 0.0}}
    both = run_ranks(jobs.train_rank, 2, tree, tmp_path)[0]["state"]["1.running_mean"]
    alone = tmp_path / "alone"
    alone.mkdir()
    [one] = run_ranks(jobs.train_rank, 1, tree, alone)
    torch.testing.assert_close(
        torch.from_numpy(both), torch.from_numpy(one["state"]["1.running_mean"])
    )


def train_and_note(rank: int, size: int, tree: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Train as a rank, and note its own statistics whenever they are averaged."""
    noted = []
    average = statistics.average

    def note(module: nn.Module, exchange: Any) -> None:
        noted.append(module[1].running_mean.numpy().copy())
        average(module, exchange)

    statistics.average = note
    return jobs.train_rank(rank, size, tree, run_dir) | {"noted": noted}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"mode": "sync"},
        {"mode": "sync", "backup_workers": 1},
        {"mode": "async"},
        {"mode": "bounded"},
        {"mode": "local_sgd", "local_steps": 2},
        {"mode": "post_local", "local_steps": 2, "local_after": 2},
    ],
    ids=lambda options: " ".join(str(value) for value in options.values()),
)
def test_servers_let_all_ranks_average_before_each_checkpoint(
    options: dict[str, Any], tmp_path: Path
):
    size = 2 + options.get("backup_workers", 0)
    options = options | {"placement": "dedicated"}
    keys = {
        "exchange": {"name": "parameter_server"} | options,
        "checkpoint": {"every_steps": 3},
    }
    with job.servers(settings_from_options(options, size, 20.0), tmp_path):
        results = run_ranks(train_and_note, size, NORMALISED | keys, tmp_path)
    checkpoints = RunDir(tmp_path).checkpoints()
    assert [step for step, _ in checkpoints] == [3, 6]
    for number, (_, path) in enumerate(checkpoints):
        saved = load_file(path)["model.1.running_mean"]
        own = [torch.from_numpy(result["noted"][number]) for result in results]
        assert not torch.allclose(own[0], own[1], rtol=1e-3)
        torch.testing.assert_close(saved, torch.stack(own).mean(0))
    for result in results:
        assert torch.equal(torch.from_numpy(result["state"]["1.running_mean"]), saved)
