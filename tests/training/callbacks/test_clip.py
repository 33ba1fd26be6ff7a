"""Tests of training/callbacks/clip.py: N workers clip as one worker of torch alone does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scaletrain import config
from scaletrain.errors import UserError
from scaletrain.parameter_server.protocol.settings import settings_from_options
from scaletrain.training import workload
from tests.parameter_server import job
from tests.ranks import run_ranks
from tests.training import jobs

JOB = {
    "model": {"name": "mlp", "sizes": [8, 16, 4]},
    "data": "tests.training.jobs:vectors",
    "batch_size": 16,
    "steps": 6,
    "optimizer": {"name": "sgd", "lr": 0.5, "momentum": 0.9},
}


def by_torch_alone(options: dict[str, float]) -> dict[str, torch.Tensor]:
    def clip(model: nn.Module) -> None:
        if "norm" in options:
            nn.utils.clip_grad_norm_(model.parameters(), options["norm"])
        if "value" in options:
            nn.utils.clip_grad_value_(model.parameters(), options["value"])

    return jobs.train_alone(JOB, before_update=clip)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"norm": 0.2}, {"value": 0.01}, {"norm": 0.3, "value": 0.02}])
@pytest.mark.parametrize(("exchange", "size"), [("native", 3), ("ring@gloo", 2), ("none", 1)])
def test_gradients_are_clipped_over_all_ranks(
    exchange: str, size: int, options: dict[str, Any], tmp_path: Path
):
    tree = JOB | {"exchange": exchange, "callbacks": [{"name": "clip"} | options]}
    results = run_ranks(jobs.train_rank, size, tree, tmp_path)
    expected = by_torch_alone(options)
    unclipped = by_torch_alone({})
    for name, value in expected.items():
        assert not torch.allclose(value, unclipped[name], rtol=1e-3), "clipping must matter"
        for result in results:
            torch.testing.assert_close(
                torch.from_numpy(result["state"][name]), value, rtol=1e-4, atol=1e-6
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "told"),
    [
        (
            {"callbacks": [{"name": "clip", "norm": 1.0}], "exchange": "parameter_server"},
            "clip changes gradients: exchange.mode: sync takes the mean of all workers' gradients",
        ),
    ],
)
def test_what_cannot_be_clipped_is_told(keys: dict[str, Any], told: str, tmp_path: Path):
    with pytest.raises(AssertionError, match=told):
        run_ranks(jobs.train_rank, 2, JOB | {"exchange": "none"} | keys, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sync", "async", "local_sgd"])
def test_servers_get_clipped_gradients(mode: str, tmp_path: Path):
    """One worker, whose every gradient is an update: as torch alone."""
    options: dict[str, Any] = {"mode": mode, "placement": "dedicated"}
    if mode == "local_sgd":
        options["local_steps"] = 1
    clipped = {"norm": 0.3, "value": 0.02}
    tree = JOB | {
        "exchange": {"name": "parameter_server"} | options,
        "callbacks": [{"name": "clip"} | clipped],
    }
    with job.servers(settings_from_options(options, 1, 20.0), tmp_path):
        [result] = run_ranks(jobs.train_rank, 1, tree, tmp_path)
    expected = by_torch_alone(clipped)
    unclipped = by_torch_alone({})
    for name, value in expected.items():
        assert not torch.allclose(value, unclipped[name], rtol=1e-3)
        torch.testing.assert_close(
            torch.from_numpy(result["state"][name]), value, rtol=1e-4, atol=1e-6
        )


@pytest.mark.slow
def test_a_callback_of_ones_own(tmp_path: Path):
    (tmp_path / "own_callback.py").write_text(
        "from scaletrain import Callback\n"
        "class Zero(Callback):\n"
        "    changes_gradients = True\n"
        "    def __init__(self, module): self.module = module\n"
        "    def after_backward(self):\n"
        "        for parameter in self.module.parameters(): parameter.grad.zero_()\n"
        "def zero(trainer, *, unused: int = 3): return Zero(trainer.module)\n"
    )
    own = {"callbacks": [{"name": "own_callback:zero", "unused": 4}]}
    tree = JOB | {"exchange": "native", "source": str(tmp_path / "job.yaml")} | own
    [result] = run_ranks(jobs.train_rank, 1, tree, tmp_path)
    untrained = workload.build(config.check(JOB), torch.device("cpu")).model.state_dict()
    for name, value in untrained.items():
        assert torch.equal(torch.from_numpy(result["state"][name]), value)
    with pytest.raises(UserError, match="did you mean 'unused'"):
        config.check(tree | {"callbacks": [{"name": "own_callback:zero", "unsued": 4}]})


@pytest.mark.parametrize(
    ("callbacks", "told"),
    [
        (["clop"], r"callbacks\[0\]: 'clop' is not known; did you mean 'clip'"),
        ([{"name": "clip", "norm": 0}], r"callbacks\[0\].norm: 0 is not allowed"),
        ([{"name": "clip", "nrom": 1}], "did you mean 'norm'"),
    ],
)
def test_names_and_options_are_checked(callbacks: list[Any], told: str):
    with pytest.raises(UserError, match=told):
        config.check(JOB | {"callbacks": callbacks})
