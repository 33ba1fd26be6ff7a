"""Tests of training/statistics.py: what is evaluated is what the checkpoint holds."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from scaletrain.run.layout import RunDir
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
