"""Tests of training/finite.py and of the trainer's policies for values that are not finite."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from torch import nn

from scaletrain.cli import cli
from scaletrain.run.layout import RunDir
from scaletrain.run.records import read_records
from scaletrain.training import finite, workload
from scaletrain.training.batches import GlobalBatches
from tests.ranks import run_ranks
from tests.training import jobs

BAD = 40  # the sample that overflows
JOB = {
    "model": "tests.training.jobs:exponential",
    "data": {"name": "tests.training.jobs:vectors", "bad": BAD},
    "batch_size": 8,
    "steps": 8,
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "checkpoint": {"every_steps": 1, "keep": 20},
}


def step_of_bad_sample() -> tuple[int, int]:
    """The step and, with two workers, the rank that get the bad sample."""
    batches = GlobalBatches(64, 8, 0)
    for step in range(8):
        for rank in (0, 1):
            if BAD in batches.share(step, rank, 2).tolist():
                return step, rank
    raise AssertionError("an epoch holds every sample")


def test_all_finite():
    assert finite.all_finite([torch.ones(3), None, torch.zeros(2, 2)])
    assert not finite.all_finite([torch.ones(3), torch.tensor([1.0, torch.inf])])
    assert not finite.all_finite([torch.tensor([torch.nan])])
    assert finite.all_finite([None])


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        ("weight", "weight 1.weight is not finite, since the update of an earlier step"),
        ("input", r"the input has values that are not finite \(training samples 11\)"),
        ("layer", r"layer 2 \(Log\) is the first that is not finite \(training samples 10, 12\)"),
        ("none", "^$"),
    ],
)
def test_the_first_place_is_named(harm: str, told: str):
    class Log(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs.log()

    inputs = torch.rand(3, 4) + 0.5
    model = nn.Sequential(nn.Identity(), nn.Linear(4, 4), Log() if harm == "layer" else nn.ReLU())
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(4))
        model[1].bias.zero_()
        if harm == "weight":
            model[1].weight[0, 0] = torch.nan
        if harm == "input":
            inputs[1, 2] = torch.inf
        if harm == "layer":
            inputs[0] = -1
            inputs[2] = -1
    data = workload.Data([], [])
    parts = workload.Supervised(model, nn.functional.mse_loss, data)
    found = finite.explain(parts, (inputs, torch.ones(3, 4)), [10, 11, 12])
    assert re.search(told, found), found
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.slow
def test_a_run_stops_at_the_step_and_names_rank_layer_and_sample(tmp_path: Path):
    step, rank = step_of_bad_sample()
    job = tmp_path / "job.json"  # JSON is YAML
    job.write_text(json.dumps(JOB))
    run_dir = tmp_path / "run"
    command = [sys.executable, "-m", "scaletrain.cli", "train", str(job), "--workers", "2"]
    done = subprocess.run(
        [*command, "--run-dir", str(run_dir)],
        capture_output=True, text=True, timeout=100, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 1
    told = done.stderr + done.stdout
    assert f"step {step}, rank {rank}: the loss is" in told
    assert f"layer 0 (Exp) is the first that is not finite (training samples {BAD})" in told
    assert "Traceback" not in told
    assert not RunDir(run_dir).summary.exists()
    command_line = f"scaletrain replay {run_dir} --step {step} --rank {rank}"
    assert command_line in told

    again = CliRunner().invoke(cli, command_line.split()[1:])
    assert again.exit_code == 0, again.output
    # A busy disk may have put off the last one before the step.
    newest, _ = RunDir(run_dir).checkpoints()[-1]
    assert f"weights: of the checkpoint after {newest} steps" in again.output
    assert f"layer 0 (Exp) is the first that is not finite (training samples {BAD})" in again.output
    for number, path in RunDir(run_dir).checkpoints():
        assert number <= step
        for tensor in load_file(path).values():
            assert torch.isfinite(tensor).all()


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_skip_leaves_the_step_out_on_all_ranks(size: int, tmp_path: Path):
    tree = JOB | {"nonfinite": "skip", "exchange": "native"}
    results = run_ranks(jobs.train_rank, size, tree, tmp_path)
    bad_step, _ = step_of_bad_sample()

    expected = jobs.train_alone(JOB, left_out=[bad_step])
    for result in results:
        assert result["summary"]["skipped_steps"] == 1 and result["summary"]["finished"]
        for name, value in expected.items():
            torch.testing.assert_close(
                torch.from_numpy(result["state"][name]), value, rtol=1e-4, atol=1e-6
            )
    for rank in range(size):
        records = list(read_records(RunDir(tmp_path).records(rank)))
        assert [record.step for record in records if record.skipped] == [bad_step]


@pytest.mark.slow
@pytest.mark.parametrize("every", [3, 100])
def test_roll_back_goes_on_from_the_newest_checkpoint(every: int, tmp_path: Path):
    """As if the steps since that checkpoint had not been; without one, as ``skip`` does."""
    bad = GlobalBatches(64, 8, 0).indices(4)[5].item()  # of step 4, after the checkpoint of step 3
    job = JOB | {"data": {"name": "tests.training.jobs:vectors", "bad": bad}}
    checkpoints = {"every_steps": every, "keep": 2}
    tree = job | {"nonfinite": "roll_back", "exchange": "ring", "checkpoint": checkpoints}
    results = run_ranks(jobs.train_rank, 2, tree, tmp_path)

    expected = jobs.train_alone(job, left_out=[3, 4] if every == 3 else [4])
    for result in results:
        assert result["summary"]["rollbacks"] == (1 if every == 3 else 0)
        for name, value in expected.items():
            torch.testing.assert_close(
                torch.from_numpy(result["state"][name]), value, rtol=1e-4, atol=1e-6
            )


@pytest.mark.slow
def test_a_run_that_never_recovers_ends(tmp_path: Path):
    tree = JOB | {"nonfinite": "skip", "exchange": "native", "steps": 60, "batch_size": 64}
    with pytest.raises(AssertionError, match="gradients of 20 steps in a row are not finite"):
        run_ranks(jobs.train_rank, 1, tree, tmp_path)
