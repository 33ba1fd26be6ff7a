"""Tests of training/precision.py.

Bugs it catches: a scale that differs between ranks or starts anew on a resume, gradients that are
clipped before their scale is taken off, an overflow on one rank that the others do not skip.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scaletrain.errors import UserError
from scaletrain.training.precision import Precision
from tests.ranks import run_ranks
from tests.training import jobs

FIRST_SCALE = 2.0**16  # torch's
JOB: dict[str, Any] = {
    "model": {"name": "mlp", "sizes": [8, 16, 4]},
    "data": "tests.training.jobs:vectors",
    "batch_size": 8,
    "steps": 8,
    "precision": "fp16",
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "checkpoint": {"every_steps": 1, "keep": 20},
}


class Picky(nn.Module):
    """A net whose gradient overflows for inputs of a size that only one sample has."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return Explode.apply(self.net(inputs), inputs.abs().amax(1, keepdim=True) > 100)


class Explode(torch.autograd.Function):
    """Hands its input on, and makes the gradient of some rows large: fp16 holds 65504 at most."""

    @staticmethod
    def forward(ctx: Any, outputs: torch.Tensor, explodes: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(explodes)
        return outputs.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (explodes,) = ctx.saved_tensors
        return gradient * torch.where(explodes, 1e4, 1.0).to(gradient.dtype), None


def scaled_gradient(precision: Precision, model: nn.Module, factor: float) -> None:
    model.zero_grad()
    total = model(torch.ones(2, 3)).sum() * factor
    precision.scaled("model", total).backward()


def test_gradients_get_their_size_back_and_an_overflow_halves_the_scale():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    precision = Precision("fp16", torch.device("cpu"), ["model"])
    scaled_gradient(precision, model, 1.0)
    assert model.weight.grad is not None and (model.weight.grad == 2 * FIRST_SCALE).all()
    assert precision.unscale("model", optimizer)
    assert (model.weight.grad == 2).all() and precision.scale == FIRST_SCALE

    scaled_gradient(precision, model, 1e38)
    assert not precision.unscale("model", optimizer)
    assert precision.scale == FIRST_SCALE / 2

    again = Precision("fp16", torch.device("cpu"), ["model"])
    again.load_state_dict(precision.state_dict())
    assert again.scale == FIRST_SCALE / 2


@pytest.mark.parametrize("name", ["float32", "bf16"])
def test_other_precisions_have_no_scale(name: str):
    model = nn.Linear(3, 1)
    precision = Precision(name, torch.device("cpu"), ["model"])
    scaled_gradient(precision, model, 1.0)
    assert model.weight.grad is not None and (model.weight.grad == 2).all()
    assert precision.scale is None and precision.state_dict() == {}


def test_a_torch_without_it_is_one_line(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.amp.GradScaler, "is_enabled", lambda self: False)
    with pytest.raises(UserError, match="precision: 'fp16' is not available on cpu"):
        Precision("fp16", torch.device("cpu"), ["model"])


@pytest.mark.slow
def test_two_workers_follow_one_in_float32_and_clip_true_gradients(tmp_path: Path):
    job = JOB | {"callbacks": [{"name": "clip", "norm": 0.3}], "exchange": "ring"}
    results = run_ranks(jobs.train_rank, 2, job, tmp_path)

    def clip(model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.3)

    expected = jobs.train_alone(JOB | {"precision": "float32"}, before_update=clip)
    for name, weights in expected.items():
        found = torch.from_numpy(results[0]["state"][name])
        assert (results[0]["state"][name] == results[1]["state"][name]).all()
        assert not torch.equal(found, weights), "it computed in float32"
        torch.testing.assert_close(found, weights, rtol=0.02, atol=0.005)


@pytest.mark.slow
def test_an_overflow_on_one_rank_is_skipped_on_all_and_the_scale_outlives_a_resume(tmp_path: Path):
    data = {"name": "tests.training.jobs:vectors", "bad": 40}
    job = JOB | {"model": f"{__name__}:Picky", "data": data, "exchange": "native"}
    stopped = run_ranks(jobs.train_rank, 2, job, tmp_path, False, 5)
    resumed = run_ranks(jobs.train_rank, 2, job, tmp_path, True)
    records = [stopped[rank]["records"] + resumed[rank]["records"] for rank in (0, 1)]
    skipped = [record.step for record in records[0] if record.skipped]
    assert len(skipped) == 1 and [r.step for r in records[1] if r.skipped] == skipped

    scales = [record.loss_scale for record in records[0]]
    halved = [FIRST_SCALE] * skipped[0] + [FIRST_SCALE / 2] * (8 - skipped[0])
    assert scales == halved and [record.loss_scale for record in records[1]] == scales

    expected = jobs.train_alone(job | {"precision": "float32"}, left_out=skipped)
    for name, weights in expected.items():
        found = torch.from_numpy(resumed[1]["state"][name])
        torch.testing.assert_close(found, weights, rtol=0.02, atol=0.005)
