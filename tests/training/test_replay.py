"""Tests of training/replay.py and of ``scaletrain replay``.

Bugs it catches: samples of another step or rank, other seeds than in the run, weights of a later
step, gradients of another mean.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from torch import nn

from scaletrain import Data, Loss, Update, Workload, config
from scaletrain.cli import cli
from scaletrain.config import RunConfig
from scaletrain.errors import UserError
from scaletrain.run.layout import RunDir
from scaletrain.training import workload
from scaletrain.training.batches import GlobalBatches
from scaletrain.training.randomness import seed_forward
from scaletrain.training.replay import replay
from tests.ranks import run_ranks
from tests.training import jobs


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4))


JOB: dict[str, Any] = {
    "model": f"{__name__}:dropping",
    "data": "tests.training.jobs:vectors",
    "batch_size": 9,
    "accumulate": 2,
    "steps": 6,
    "workers": 2,
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "checkpoint": {"every_steps": 2, "keep": 20},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path, list[Any]]:
    run_dir = tmp_path_factory.mktemp("run")
    results = run_ranks(jobs.train_rank, 2, JOB, run_dir)
    checked = config.check(JOB)
    RunDir(run_dir).config.write_text(checked.to_yaml())
    return checked, run_dir, results


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_it_is_what_the_rank_computed(rank: int, run: Any):
    checked, run_dir, results = run
    replayed = replay(checked, run_dir, 2, rank)
    record = results[rank]["records"][2]
    assert replayed.weights_of == 2
    assert replayed.losses["model"].mean == pytest.approx(record.loss, rel=1e-6)
    assert replayed.samples == GlobalBatches(64, 9, 0).share(2, rank, 2).tolist()
    assert replayed.origins == []

    # The gradient of this rank's mean, pass by pass as in the run.
    parts = workload.build(checked, torch.device("cpu"))
    with safe_open(RunDir(run_dir).checkpoint(2), "pt") as file:
        state = {key: file.get_tensor(f"model.{key}") for key in parts.model.state_dict()}
    parts.model.load_state_dict(state)
    seed_forward(torch.device("cpu"), 0, 2, rank)
    samples = GlobalBatches(64, 9, 0).share(2, rank, 2)
    for part in samples.tensor_split(2):
        inputs, targets = parts.data.train[part]  # type: ignore[index]
        total = nn.functional.cross_entropy(parts.model(inputs), targets, reduction="sum")
        (total / len(samples)).backward()
    for name, parameter in parts.model.named_parameters():
        assert parameter.grad is not None
        expected = parameter.grad.norm().item()
        assert replayed.gradients[name] == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_command_says_whose_weights_they_are_and_writes_the_batch(run: Any, tmp_path: Path):
    _, run_dir, _ = run
    out = tmp_path / "batch.safetensors"
    arguments = ["replay", str(run_dir), "--step", "3", "--rank", "1", "--out", str(out)]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    samples = GlobalBatches(64, 9, 0).share(3, 1, 2)
    assert (
        f"step 3, rank 1: training samples {', '.join(map(str, samples.tolist()))}" in done.output
    )
    words = "weights: of the checkpoint after 2 steps, not those that the run had at step 3"
    assert words in done.output
    assert "  0.weight  " in done.output and "every layer's output is finite" in done.output
    inputs, targets = jobs.vectors()[0][samples]
    with safe_open(out, "pt") as file:
        both = [torch.cat([file.get_tensor(f"{n}[{k}]") for n in (0, 1)]) for k in (0, 1)]
        assert file.metadata()["samples"] == ",".join(map(str, samples.tolist()))
    assert torch.equal(both[0], inputs) and torch.equal(both[1], targets)


@pytest.mark.slow
def test_a_step_before_all_checkpoints_has_the_weights_of_the_beginning(run: Any):
    checked, run_dir, results = run
    replayed = replay(checked, run_dir, 0, 0)
    assert replayed.weights_of is None
    assert replayed.losses["model"].mean == pytest.approx(results[0]["records"][0].loss, rel=1e-6)


@pytest.mark.slow
def test_a_step_or_rank_that_is_not_there_is_one_line(run: Any):
    checked, run_dir, _ = run
    with pytest.raises(UserError, match=r"--rank: 2 is not allowed \(allowed: 0 to 1\)"):
        replay(checked, run_dir, 0, 2)
    with pytest.raises(UserError, match=r"--step: 6 is not allowed \(allowed: 0 to 5\)"):
        replay(checked, run_dir, 6, 0)


class Two(Workload):
    """Two models, each with its update."""

    def __init__(self) -> None:
        self.one = nn.Linear(8, 4)
        self.other = nn.Linear(8, 4)
        self.data = Data(*jobs.vectors())
        self.updates = [self._update("one", self.one), self._update("other", self.other)]

    def _update(self, name: str, model: nn.Module) -> Update:
        def forward(batch: Any) -> Loss:
            output = getattr(self, name)(batch[0])
            total = nn.functional.cross_entropy(output, batch[1], reduction="sum")
            return Loss(total, len(batch[1]))

        return Update(name, torch.optim.SGD(model.parameters(), lr=0.1), forward)


def test_each_of_several_updates_is_run(tmp_path: Path):
    checked = config.check({"workload": f"{__name__}:Two", "batch_size": 8, "steps": 2})
    replayed = replay(checked, tmp_path, 1, 0)
    assert set(replayed.losses) == {"one", "other"}
    assert set(replayed.gradients) == {"one.weight", "one.bias", "other.weight", "other.bias"}


def test_a_folder_without_a_run_is_one_line(tmp_path: Path):
    done = CliRunner().invoke(cli, ["replay", str(tmp_path), "--step", "1", "--rank", "0"])
    assert done.exit_code != 0 and "holds no run" in str(done.exception or done.output)
