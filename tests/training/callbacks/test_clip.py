"""Tests of training/callbacks/clip.py: N workers clip as one worker of torch alone does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import default_collate

from scaletrain import Callback, config
from scaletrain.errors import UserError
from scaletrain.parameter_server.protocol.settings import settings_from_options
from scaletrain.training import workload
from scaletrain.training.batches import GlobalBatches
from scaletrain.training.trainer import Trainer
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


def by_servers(
    size: int, options: dict[str, Any], clipped: dict[str, float], run_dir: Path, **keys: Any
) -> list[dict[str, torch.Tensor]]:
    """Train with a parameter server; return the weights that each worker has in the end."""
    options = options | {"placement": "dedicated"}
    tree = JOB | keys | {"exchange": {"name": "parameter_server"} | options}
    if clipped:
        tree["callbacks"] = [{"name": "clip"} | clipped]
    with job.servers(settings_from_options(options, size, 20.0), run_dir):
        results = run_ranks(jobs.train_rank, size, tree, run_dir)
    states = []
    for result in results:
        states.append({name: torch.from_numpy(each) for name, each in result["state"].items()})
    return states


@pytest.mark.slow
@pytest.mark.parametrize("clipped", [{"norm": 0.2}, {"value": 0.01}, {"norm": 0.3, "value": 0.02}])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (1, {}),
        (3, {"block_mb": 0.0002}),
        (2, {"servers": 2, "link": "tcp", "block_mb": 0.0002}),
    ],
    ids=["one worker", "three workers", "two servers"],
)
def test_servers_clip_the_mean_of_all_workers(
    size: int, options: dict[str, Any], clipped: dict[str, float], tmp_path: Path
):
    """In mode sync, as torch alone clips the gradient of the whole batch."""
    expected = by_torch_alone(clipped)
    unclipped = by_torch_alone({})
    for state in by_servers(size, options, clipped, tmp_path):
        for name, value in expected.items():
            assert not torch.allclose(value, unclipped[name], rtol=1e-3), "clipping must matter"
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["async", "bounded", "local_sgd", "post_local"])
def test_servers_get_clipped_gradients(mode: str, tmp_path: Path):
    """One worker, whose every gradient is an update: as torch alone."""
    options: dict[str, Any] = {"mode": mode}
    if mode in ("local_sgd", "post_local"):
        options |= {"local_steps": 1}
    if mode == "post_local":
        options |= {"local_after": 2}
    clipped = {"norm": 0.3, "value": 0.02}
    [state] = by_servers(1, options, clipped, tmp_path)
    expected = by_torch_alone(clipped)
    unclipped = by_torch_alone({})
    for name, value in expected.items():
        assert not torch.allclose(value, unclipped[name], rtol=1e-3)
        torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["async", "bounded"])
def test_each_of_several_workers_clips_its_own_gradient(mode: str, tmp_path: Path):
    """No update moves the weights further than the clipped norm, whatever came before it."""
    optimizer = {"name": "sgd", "lr": 0.5}
    start = workload.build(config.check(JOB), torch.device("cpu")).model.state_dict()

    def way(clipped: dict[str, float], run_dir: Path) -> float:
        run_dir.mkdir()
        [state, _] = by_servers(2, {"mode": mode}, clipped, run_dir, optimizer=optimizer)
        parts = [(state[name] - value).reshape(-1) for name, value in start.items()]
        return float(torch.cat(parts).norm())

    norm = 0.05
    # Each of two workers takes half of the rate.
    most = norm * optimizer["lr"] * JOB["steps"]  # type: ignore[operator]
    assert 0 < way({"norm": norm}, tmp_path / "clipped") <= most * 1.001
    assert way({}, tmp_path / "unclipped") > 2 * most


@pytest.mark.slow
def test_local_steps_are_clipped_by_each_worker(tmp_path: Path):
    """The mean of two workers' clipped steps, each of its own half of the batch."""
    norm = 0.2
    tree = JOB | {"optimizer": {"name": "sgd", "lr": 0.5}}
    run = config.check(tree)
    parts = workload.build(run, torch.device("cpu"))
    train = parts.data.train
    batches = GlobalBatches(len(train), run.batch_size, run.seed)  # type: ignore[arg-type]
    parameters = [*parts.model.parameters()]
    for step in range(run.steps or 0):
        indices = batches.indices(step).tolist()
        half = len(indices) // 2
        steps: list[list[torch.Tensor]] = []
        for share in (indices[:half], indices[half:]):
            inputs, targets = default_collate([train[index] for index in share])
            parts.optimizer.zero_grad()
            nn.functional.cross_entropy(parts.model(inputs), targets).backward()
            nn.utils.clip_grad_norm_(parameters, norm)
            steps.append([each.grad.clone() for each in parameters])  # type: ignore[union-attr]
        with torch.no_grad():
            for parameter, *gradients in zip(parameters, *steps, strict=True):
                parameter -= 0.5 * sum(gradients) / 2
    options = {"mode": "local_sgd", "local_steps": 1}
    optimizer = tree["optimizer"]
    for state in by_servers(2, options, {"norm": norm}, tmp_path, optimizer=optimizer):
        for name, value in parts.model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("callbacks", "told"),
    [
        (
            [{"name": "tests.training.callbacks.test_clip:zero"}],
            "zero changes gradients: exchange.mode: sync takes the mean of all workers' gradients",
        ),
        (
            [{"name": "clip", "norm": 1.0}, {"name": "clip", "value": 1.0}],
            "clip: exchange: the servers clip gradients already",
        ),
    ],
)
def test_what_cannot_be_changed_is_told(callbacks: list[Any], told: str, tmp_path: Path):
    with pytest.raises(AssertionError, match=told):
        run_ranks(
            jobs.train_rank,
            2,
            JOB | {"exchange": "parameter_server", "callbacks": callbacks},
            tmp_path,
        )


class Zero(Callback):
    changes_gradients = True


def zero(trainer: Trainer) -> Callback:
    return Zero()


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
