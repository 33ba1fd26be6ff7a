"""Tests of training/losses.py: a step's gradient is the global mean's, whatever it is over.

Bugs it catches: a mean of the ranks' means, a mean of the passes' means, ignored targets that
count, a count that forward and ``count`` disagree about, a figure of evaluation weighed by samples.
"""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scaletrain import Loss, config
from scaletrain.errors import UserError
from scaletrain.training import losses, workload
from scaletrain.training.batches import GlobalBatches
from tests.ranks import run_ranks
from tests.training import jobs

TOKENS = {
    "workload": "tests.training.jobs:Tokens",
    "batch_size": 20,
    "steps": 5,
    "optimizer": {"name": "sgd", "lr": 0.5, "momentum": 0.9},
}
IGNORING = {
    "model": "tests.training.jobs:Places",
    "data": "tests.training.jobs:ignoring",
    "batch_size": 16,
    "steps": 5,
    "optimizer": {"name": "sgd", "lr": 0.3},
}


def mean_of_tokens(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return jobs.token_loss(model, batch) / (batch["target"] != jobs.PAD).sum()


def mean_of_places(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    inputs, targets = batch
    total = nn.functional.cross_entropy(
        model(inputs), targets, reduction="sum", ignore_index=jobs.PAD
    )
    return total / (targets != jobs.PAD).sum()


def smoothed(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    inputs, targets = batch
    return nn.functional.cross_entropy(
        model(inputs), targets, ignore_index=jobs.PAD, label_smoothing=0.3
    )


def without_class_2(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    inputs, targets = batch
    return nn.functional.cross_entropy(model(inputs), targets.clamp(min=0), ignore_index=2)


def half_squares(output: torch.Tensor, target: torch.Tensor, *, factor: float = 1.0):
    return factor * (output - nn.functional.one_hot(target, 4)).square().mean()


def tripled(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
    return half_squares(model(batch[0]), batch[1], factor=3.0)


VECTORS = IGNORING | {
    "model": {"name": "mlp", "sizes": [8, 4]},
    "data": "tests.training.jobs:vectors",
}
SMOOTHED = {"name": "cross_entropy", "label_smoothing": 0.3}
CLASS_2 = {"name": "cross_entropy", "ignore_index": 2}
TRIPLED = {"name": "tests.training.test_losses:half_squares", "factor": 3.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tree", "options", "loss"),
    [
        (IGNORING, SMOOTHED, smoothed),
        (VECTORS, CLASS_2, without_class_2),
        (VECTORS, TRIPLED, tripled),
    ],
    ids=["smoothed", "ignore_index", "own"],
)
def test_a_loss_with_options_is_torchs_over_the_whole_batch(
    tree: dict[str, Any], options: dict[str, Any], loss: Any, tmp_path: Path
):
    expected = jobs.train_alone(tree, loss)
    job = tree | {"loss": options, "exchange": "native", "accumulate": 2}
    for result in run_ranks(jobs.train_rank, 3, job, tmp_path):
        for name, value in expected.items():
            torch.testing.assert_close(
                torch.from_numpy(result["state"][name]), value, rtol=1e-4, atol=1e-6
            )


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"label_smothing": 0.1}, "loss.label_smothing.*did you mean 'label_smoothing'"),
        ({"label_smoothing": 1.5}, "loss.label_smoothing: 1.5 is not allowed .allowed: 0 to 1"),
        ({"reduction": "sum"}, "loss.reduction.*allowed: ignore_index, label_smoothing"),
        ({"name": TRIPLED["name"], "factr": 2}, "loss.factr.*did you mean 'factor'"),
        ({"name": "huber_loss", "delta": "wide"}, "loss.delta: 'wide' is not allowed"),
    ],
)
def test_options_of_a_loss_are_checked(options: dict[str, Any], told: str):
    source = str(Path(__file__).parents[2] / "job.yaml")
    with pytest.raises(UserError, match=told):
        config.check(IGNORING | {"loss": options, "source": source})


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("exchange", ["native", "scheduled"])
@pytest.mark.parametrize(
    ("tree", "loss"),
    [(TOKENS, mean_of_tokens), (IGNORING, mean_of_places)],
    ids=["tokens", "ignored"],
)
def test_the_mean_is_over_all_that_counts_on_all_ranks(
    tree: dict[str, Any], loss: Any, exchange: str, accumulate: int, size: int, tmp_path: Path
):
    job = tree | {"exchange": exchange, "accumulate": accumulate}
    results = run_ranks(jobs.train_rank, size, job, tmp_path)
    expected = jobs.train_alone(tree, loss)
    for result in results:
        for name, value in expected.items():
            torch.testing.assert_close(
                torch.from_numpy(result["state"][name]), value, rtol=1e-4, atol=1e-6
            )


def test_the_references_weights_differ_from_those_of_a_mean_of_means(tmp_path: Path):
    """The test above would notice a mean over samples: the counts of the ranks differ enough."""
    run = config.check(IGNORING)
    parts = workload.build(run, torch.device("cpu"))
    batches = GlobalBatches(len(parts.data.train), run.batch_size, run.seed)
    for step in range(5):
        shares = [parts.data.train[batches.share(step, rank, 2)] for rank in (0, 1)]
        counts = [float(parts.count(share)) for share in shares]
        if max(counts) > 1.1 * min(counts):
            return
    raise AssertionError("both ranks have as many targets in every step")


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 5])
def test_figures_of_evaluation_are_over_what_counts(size: int, tmp_path: Path):
    job = TOKENS | {"exchange": "native", "steps": 1}
    job = job | {"workload": {"name": job["workload"], "test_samples": 3}}
    summaries = [result["summary"] for result in run_ranks(jobs.train_rank, size, job, tmp_path)]
    made = jobs.pad([jobs.Sentences(3)[index] for index in range(3)])
    targets = made["target"]
    counted = targets[targets != jobs.PAD]
    for summary in summaries:  # with five workers two of them have no sample
        assert summary["test_odd"] == pytest.approx((counted % 2 == 1).double().mean().item())
        assert summary["test_twice"] == pytest.approx(2 * summary["test_loss"])


@pytest.mark.slow
def test_an_ignored_target_is_neither_right_nor_wrong(tmp_path: Path):
    [result] = run_ranks(jobs.train_rank, 1, IGNORING | {"exchange": "none"}, tmp_path)
    model = jobs.Places()
    model.load_state_dict({name: torch.from_numpy(v) for name, v in result["state"].items()})
    _, test = jobs.ignoring()
    inputs, targets = test[:]
    right = model(inputs).argmax(1)[targets != jobs.PAD] == targets[targets != jobs.PAD]
    assert result["summary"]["test_accuracy"] == pytest.approx(right.double().mean().item())


@pytest.mark.slow
def test_a_forward_that_counts_otherwise_than_count_is_told(tmp_path: Path):
    job = TOKENS | {"exchange": "none"}
    job = job | {"workload": {"name": job["workload"], "lies": True}}
    with pytest.raises(AssertionError, match=r"forward counted \d+ where count\(batch\)"):
        run_ranks(jobs.train_rank, 1, job, tmp_path)


@pytest.mark.parametrize(
    ("returned", "told"),
    [
        (torch.ones(()), "forward returned a Tensor (allowed: scaletrain.Loss"),
        (Loss(3.0, 2), "is a float (allowed: a scalar tensor with a gradient"),
        (Loss(torch.ones(4, requires_grad=True), 4), "is a tensor of shape (4,) with a gradient"),
        (Loss(torch.ones(()), 4), "is a tensor of shape () without a gradient"),
        (Loss(torch.ones((), requires_grad=True), torch.ones(3)), "is a tensor of shape (3,)"),
        (Loss(torch.ones((), requires_grad=True), "4"), "is a str (allowed: a number"),
    ],
)
def test_a_loss_of_another_form_is_told_in_one_line(returned: Any, told: str):
    with pytest.raises(UserError, match=re.escape(told)):
        losses.checked(returned)


@pytest.mark.parametrize("figures", [None, {"loss": 1.0}, [("loss", 1.0)]])
def test_figures_of_another_form_are_told_in_one_line(figures: Any):
    with pytest.raises(UserError, match="evaluate returned something else than a dict of means"):
        losses.checked_figures(figures)


@pytest.mark.slow
def test_parts_and_counts_are_recorded(tmp_path: Path):
    results = run_ranks(jobs.train_rank, 2, TOKENS | {"exchange": "native"}, tmp_path)
    for result in results:
        for record in result["records"]:
            assert record.parts["twice"] == pytest.approx(2 * record.loss, rel=1e-5)
            assert record.count > record.samples  # tokens
    last = [result["records"][-1] for result in results]
    mean = sum(record.loss * record.count for record in last) / sum(r.count for r in last)
    assert results[0]["summary"]["final_loss"] == pytest.approx(mean)


@pytest.mark.slow
def test_each_group_keeps_its_own_rate(tmp_path: Path):
    job = {"workload": "tests.training.jobs:Groups", "batch_size": 16, "steps": 4}
    job |= {"lr_schedule": {"name": "cosine"}, "exchange": "native"}
    [result] = run_ranks(jobs.train_rank, 1, job, tmp_path)
    parts = jobs.Groups()
    torch.manual_seed(0)
    parts.model.reset_parameters()
    batches = GlobalBatches(64, 16, 0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(parts.optimizer, 4)
    for step in range(4):
        parts.optimizer.zero_grad()
        loss = parts.forward(parts.data.train[batches.indices(step)])
        (loss.total / loss.count).backward()
        parts.optimizer.step()
        schedule.step()
    for name, value in parts.model.state_dict().items():
        torch.testing.assert_close(torch.from_numpy(result["state"][name]), value)


@pytest.mark.parametrize(
    ("whole", "halves", "is_refused"),
    [
        ((6.0, 4), ((2.0, 2), (4.0, 2)), False),  # a sum
        ((3.0, 4), ((2.0, 2), (4.0, 2)), True),  # a mean over samples
        ((3.5, 4), ((2.0, 1), (4.0, 3)), True),  # over tokens
        ((2.0, 4), ((2.0, 2), (2.0, 2)), True),
        ((-3.2, 4), ((-2.0, 2), (-4.0, 2)), True),  # over tokens and over samples, added
        ((5.0, 4), ((2.0, 2), (4.0, 2)), False),  # something that depends on the whole batch
        ((4.1, 4), ((0.1, 2), (4.0, 2)), False),  # a half with next to no loss
        ((1.0, 4), ((-2.0, 2), (4.0, 2)), False),
        ((0.0, 4), ((0.0, 2), (0.0, 2)), False),
        ((3.0, 1), ((2.0, 1), (4.0, 1)), False),  # counts that are no sum, either
    ],
)
def test_mean_in_place_of_a_total_is_refused(whole: tuple, halves: tuple, is_refused: bool):
    def loss(values: tuple) -> Loss:
        return Loss(torch.tensor(values[0]), values[1])

    def check() -> None:
        losses.check_is_sum(loss(whole), [loss(half) for half in halves])

    if not is_refused:
        check()
        return
    with pytest.raises(UserError, match=r"looks like a mean: .*allowed: the sum over the batch"):
        check()


class MeanLoss(jobs.Tokens):
    """Forgets that a total is a sum."""

    def forward(self, batch: Any) -> Loss:
        loss = super().forward(batch)
        return Loss(loss.total / loss.count, loss.count)


def test_mean_in_place_of_a_total_is_refused_before_training(tmp_path: Path):
    tree = TOKENS | {"workload": "tests.training.test_losses:MeanLoss", "exchange": "none"}
    with pytest.raises(UserError, match="looks like a mean"):
        jobs.train_rank(0, 1, tree, tmp_path)
