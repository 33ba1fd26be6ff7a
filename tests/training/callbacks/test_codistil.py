"""Tests of groups of workers that learn from each other, against one process that trains all."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import default_collate

from scaletrain import config
from scaletrain.errors import UserError
from scaletrain.run.layout import RunDir
from scaletrain.training import checkpoint, workload
from scaletrain.training.batches import GlobalBatches, cut
from tests.ranks import run_ranks
from tests.training import jobs

GROUPS = 2
EVERY, BURN_IN, WEIGHT = 2, 3, 0.7
JOB: dict[str, Any] = {
    "model": {"name": "mlp", "sizes": [8, 6, 4]},
    "data": "tests.training.jobs:vectors",
    "batch_size": 16,
    "steps": 10,
    "optimizer": {"name": "sgd", "lr": 0.2, "momentum": 0.9},
    "exchange": {"name": "native", "groups": GROUPS},
    "callbacks": [{"name": "codistil", "every": EVERY, "weight": WEIGHT, "burn_in": BURN_IN}],
}


def train_in_one_process(tree: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Train a model a group by loops of torch alone; return their weights, and test figures."""
    run = config.check(tree | {"workers": GROUPS})
    jobs_of = [workload.build(run, torch.device("cpu"), group) for group in range(GROUPS)]
    train, test = jobs_of[0].data.train, jobs_of[0].data.test
    batches = GlobalBatches(len(train), run.batch_size, run.seed)  # type: ignore[arg-type]
    others: list[nn.Module] = []  # as of the last exchange
    for step in range(run.steps or 0):
        indices = batches.indices(step)
        for group, job in enumerate(jobs_of):
            own = indices[cut(len(indices), group, GROUPS)].tolist()
            inputs, targets = default_collate([train[index] for index in own])
            output = job.model(inputs)
            loss = functional.cross_entropy(output, targets)
            if others:
                said = others[1 - group](inputs).softmax(1).detach()
                loss = loss - WEIGHT * (said * output.log_softmax(1)).sum(1).mean()
            job.optimizer.zero_grad()
            loss.backward()
            job.optimizer.step()
        done = step + 1
        if done >= BURN_IN and (done - BURN_IN) % EVERY == 0:
            others = [copy.deepcopy(job.model) for job in jobs_of]
    inputs, targets = default_collate([test[index] for index in range(len(test))])
    losses = [functional.cross_entropy(job.model(inputs), targets).item() for job in jobs_of]
    right = [(job.model(inputs).argmax(1) == targets).float().mean().item() for job in jobs_of]
    weights = [dict(job.model.state_dict()) for job in jobs_of]
    return weights, {"test_loss": sum(losses) / GROUPS, "test_accuracy": sum(right) / GROUPS}


@pytest.mark.slow
@pytest.mark.parametrize(("exchange", "workers"), [("native", 2), ("scheduled", 2), ("ring", 4)])
def test_groups_train_as_one_process_would_train_their_models(
    exchange: str, workers: int, tmp_path: Path
):
    tree = JOB | {"exchange": {"name": exchange, "groups": GROUPS}}
    expected, figures = train_in_one_process(tree)
    ranks = run_ranks(jobs.train_rank, workers, tree, tmp_path)
    for rank, trained in enumerate(ranks):
        group = rank * GROUPS // workers
        for name, weight in trained["state"].items():
            np.testing.assert_allclose(weight, expected[group][name], rtol=1e-4, atol=1e-6)
        # Figures are means over the groups, the same on every rank: a callback may stop by them.
        for figure, value in figures.items():
            assert trained["summary"][figure] == pytest.approx(value, rel=1e-4)
    last = ranks[0]["records"][-1]
    assert last.loss == pytest.approx(last.parts["labels"] + last.parts["codistillation"])
    weights = [next(iter(trained["state"].values())) for trained in ranks]
    assert not np.allclose(weights[0], weights[-1])


@pytest.mark.slow
def test_the_term_counts_the_targets_that_are_not_ignored(tmp_path: Path):
    """Counts of the groups differ: each group's mean is over its own."""
    tree = JOB | {
        "model": "tests.training.jobs:Places",
        "data": "tests.training.jobs:ignoring",
        "steps": BURN_IN + 1,
    }
    ranks = run_ranks(jobs.train_rank, 2, tree, tmp_path)
    run = config.check(tree | {"workers": GROUPS})
    models = [workload.build(run, torch.device("cpu"), group).model for group in range(GROUPS)]
    # A worker alone with a group's half of each batch, up to the exchange, is that group.
    train, _ = jobs.ignoring()
    batches = GlobalBatches(len(train), 16, run.seed)  # type: ignore[arg-type]
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9) for model in models]
    for step in range(BURN_IN + 1):
        stale = copy.deepcopy(models)
        for group in range(GROUPS):
            own = batches.indices(step)[cut(16, group, GROUPS)].tolist()
            inputs, targets = default_collate([train[index] for index in own])
            output = models[group](inputs)
            kept = targets != jobs.PAD
            losses = functional.cross_entropy(output, targets, reduction="none")
            if step == BURN_IN:
                said = stale[1 - group](inputs).softmax(1).detach()
                losses = losses - WEIGHT * (said * output.log_softmax(1)).sum(1)
            optimizers[group].zero_grad()
            losses[kept].mean().backward()
            optimizers[group].step()
    for rank, trained in enumerate(ranks):
        for name, weight in models[rank].state_dict().items():
            np.testing.assert_allclose(trained["state"][name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 4])
def test_a_resumed_run_is_the_undisturbed_one_bit_for_bit(workers: int, tmp_path: Path):
    # Every part that groups have of their own: running statistics, a moving average, momentum.
    tree = JOB | {
        "model": "tests.training.jobs:normalised",
        "checkpoint": {"every_steps": 3},
        "callbacks": [
            *JOB["callbacks"],
            {"name": "ema", "decay": 0.8},
            {"name": "drift", "every": 1},
        ],
    }
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    for folder in (undisturbed, stopped):
        folder.mkdir()
    expected = run_ranks(jobs.train_rank, workers, tree, undisturbed)
    # Between two exchanges: the copies are older than the weights.
    run_ranks(jobs.train_rank, workers, tree, stopped, False, BURN_IN + EVERY + 1)
    resumed = run_ranks(jobs.train_rank, workers, tree, stopped, True)
    for before, after in zip(expected, resumed, strict=True):
        assert len(after["records"]) == 10 - (BURN_IN + EVERY + 1)
        for name, weight in before["state"].items():
            np.testing.assert_array_equal(after["state"][name], weight)
        assert after["summary"]["test_loss"] == before["summary"]["test_loss"]


def _rate(rank: int, size: int, tree: dict[str, Any], folder: Path) -> float:
    return jobs.train_rank(rank, size, tree, folder)["records"][0].lr


@pytest.mark.slow
def test_a_rate_is_scaled_by_the_batch_that_a_model_learns_from(tmp_path: Path):
    scaling = {"lr_schedule": {"name": "fixed", "scaling": {"rule": "linear", "base_batch": 32}}}
    assert run_ranks(_rate, 2, JOB | scaling, tmp_path) == [0.2 * 8 / 32] * 2


@pytest.mark.slow
def test_groups_go_on_from_the_newest_step_that_all_have_saved(tmp_path: Path):
    tree = JOB | {"checkpoint": {"every_steps": 4, "keep": 3}}
    (tmp_path / "a").mkdir()
    expected = run_ranks(jobs.train_rank, 2, tree, tmp_path / "a")
    # The second group's last one is damaged, as if it had been killed before the first group.
    RunDir(RunDir(tmp_path / "a").group(1)).checkpoint(10).write_bytes(b"half")
    resumed = run_ranks(jobs.train_rank, 2, tree, tmp_path / "a", True)
    for before, after in zip(expected, resumed, strict=True):
        assert [record.step for record in after["records"]] == [8, 9]
        for name, weight in before["state"].items():
            np.testing.assert_array_equal(after["state"][name], weight)


@pytest.mark.slow
def test_each_group_keeps_its_own_model_in_its_checkpoints(tmp_path: Path):
    ranks = run_ranks(jobs.train_rank, 2, JOB, tmp_path)
    for group, trained in enumerate(ranks):
        found = checkpoint.newest(RunDir(tmp_path).group(group))
        assert found is not None
        for name, weight in checkpoint.model_state(found.content).items():
            np.testing.assert_array_equal(weight, trained["state"][name])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"workers": 3}, "2 groups need equal parts of workers: 3"),
        ({"workers": 2, "batch_size": 15}, "2 groups need equal parts of batch_size: 15"),
        ({"workers": 2, "bad_samples": {"skip": 3}}, "bad_samples.skip: is not allowed beside"),
        ({"workers": 2, "checkpoint": {"keep": 1}}, "checkpoint.keep: is not allowed beside"),
        (
            {"workers": 2, "nonfinite": "roll_back", "checkpoint": {"every_steps": 2}},
            "nonfinite: is not allowed beside exchange.groups: 2",
        ),
    ],
)
def test_groups_that_make_no_sense_are_refused(change: dict[str, Any], reason: str):
    with pytest.raises(UserError, match=reason):
        config.check(JOB | change)


def test_a_batch_a_worker_suits_any_number_of_groups():
    config.check(JOB | {"workers": 2, "batch_size": 15, "batch_mode": "weak"})


def _refused(rank: int, size: int, tree: dict[str, Any], folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        jobs.train_rank(rank, size, tree, folder)
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"exchange": "native"}, "there is one group of workers"),
        ({"exchange": "none"}, "there is one group of workers"),
        ({"loss": "multi_margin_loss"}, "the loss is multi_margin_loss"),
    ],
)
def test_predictions_that_cannot_be_compared_are_refused(
    change: dict[str, Any], reason: str, tmp_path: Path
):
    for text in run_ranks(_refused, 2, JOB | change, tmp_path):
        assert reason in text
