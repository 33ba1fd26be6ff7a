"""Tests of training/trainer.py.

N workers train as one worker does on the same global batch, for every synchronous exchange.

Bugs it catches: a gradient averaged with the wrong weight when shares are uneven, an accumulation
that exchanges too often or too early, an exchange that loses or doubles a contribution (every
rank's share is different), an evaluation that counts a sample twice.
"""

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from scaletrain import Mean
from scaletrain.run.layout import RunDir
from scaletrain.run.records import read_records
from scaletrain.training import workload
from tests.ranks import run_ranks
from tests.training import jobs

JOB = {
    "model": {"name": "digits_cnn", "width": 4},
    "data": "digits",
    "batch_size": 50,
    "steps": 6,
    "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
    "lr_schedule": {"name": "cosine", "warmup_steps": 2},
}
SYNCHRONOUS = ["native", "ring@gloo", "tree@gloo", "star@gloo", "scheduled"]


def train(
    rank: int,
    size: int,
    tree: dict[str, Any],
    run_dir: Path,
    resume: bool = False,
    stop_at: int | None = None,
) -> dict[str, Any]:
    result = jobs.train_rank(rank, size, tree, run_dir, resume, stop_at)
    return {
        "summary": result["summary"],
        "weights": np.concatenate([value.ravel() for value in result["state"].values()]),
        "losses": [record.loss * record.samples for record in result["records"]],
    }


def losses(results: list[dict[str, Any]], batch: int) -> torch.Tensor:
    """The loss of every step over the whole global batch."""
    return torch.tensor([result["losses"] for result in results]).sum(0) / batch


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_ranks(train, 1, JOB | {"exchange": "none"}, tmp_path_factory.mktemp("alone"))[0]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("exchange", SYNCHRONOUS)
def test_the_trajectory_is_that_of_one_worker(
    exchange: str, size: int, alone: dict[str, Any], tmp_path: Path
):
    results = run_ranks(train, size, JOB | {"exchange": exchange}, tmp_path)
    torch.testing.assert_close(losses(results, 50), losses([alone], 50), rtol=1e-4, atol=1e-5)
    for result in results:
        assert (result["weights"] == results[0]["weights"]).all(), "replicas are bitwise equal"
        torch.testing.assert_close(
            torch.from_numpy(result["weights"]),
            torch.from_numpy(alone["weights"]),
            rtol=1e-3,
            atol=1e-5,
        )
        assert result["summary"]["test_accuracy"] == pytest.approx(
            alone["summary"]["test_accuracy"], abs=1 / 360 + 1e-9
        )
        assert result["summary"]["final_loss"] == pytest.approx(
            alone["summary"]["final_loss"], abs=1e-4
        )


@pytest.mark.slow
def test_accumulation_changes_nothing_but_memory(alone: dict[str, Any], tmp_path: Path):
    results = run_ranks(train, 3, JOB | {"exchange": "native", "accumulate": 4}, tmp_path)
    torch.testing.assert_close(losses(results, 50), losses([alone], 50), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_no_exchange_drifts_apart_and_weak_scaling_grows_the_batch(tmp_path: Path):
    results = run_ranks(train, 2, JOB | {"exchange": "none", "batch_mode": "weak"}, tmp_path)
    assert (results[0]["weights"] != results[1]["weights"]).any()
    assert [result["summary"]["batch_size"] for result in results] == [100, 100]
    assert all(
        record.samples == 50
        for rank in (0, 1)
        for record in read_records(RunDir(tmp_path).records(rank))
    )


@pytest.mark.slow
def test_resume_goes_on_as_if_never_stopped_with_another_number_of_workers(
    alone: dict[str, Any], tmp_path: Path
):
    tree = JOB | {"exchange": "native", "checkpoint": {"every_steps": 1, "keep": 1}}
    stopped = run_ranks(train, 2, tree, tmp_path, False, 4)
    assert stopped[0]["summary"]["finished"] is False
    results = run_ranks(train, 3, tree, tmp_path, True)
    torch.testing.assert_close(losses(results, 50), losses([alone], 50)[4:], rtol=1e-4, atol=1e-5)
    assert [record.step for record in read_records(RunDir(tmp_path).records(0))] == list(range(6))
    assert [record.step for record in read_records(RunDir(tmp_path).records(2))] == [4, 5]


def _one_is_late(rank: int, size: int, exchange: str, run_dir: Path) -> None:
    make = workload.build

    def late(*arguments: Any) -> workload.Workload:
        made = make(*arguments)
        next(iter(made.model.parameters())).requires_grad_(
            False
        )  # frozen ones make no gradients to wait for

        forward = made.forward

        def slow_forward(batch: Any) -> workload.Loss:
            time.sleep(0.2 * rank)
            return forward(batch)

        made.forward = slow_forward
        return made

    workload.build = late
    train(rank, size, JOB | {"exchange": exchange}, run_dir)


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["native", "scheduled"])
def test_who_is_early_records_how_long_it_waited_for_gradients(exchange: str, tmp_path: Path):
    run_ranks(_one_is_late, 2, exchange, tmp_path)
    early, late = (list(read_records(RunDir(tmp_path).records(rank)))[2:] for rank in (0, 1))
    for record in early:
        assert 0.1 < record.exchange["wait_in_backward_s"] < record.backward_s
    for record in late:
        assert record.exchange["wait_in_backward_s"] < 0.1


def test_records_add_up(tmp_path: Path):
    run_ranks(train, 1, JOB | {"exchange": "none"}, tmp_path)
    records = list(read_records(RunDir(tmp_path).records(0)))
    assert len(records) == 6
    for record in records:
        assert record.step_s == pytest.approx(
            record.input_s + record.forward_s + record.backward_s + record.update_s, rel=1e-6
        )
        assert (
            record.samples == 50
            and record.step_s > 0
            and record.forward_s > 0
            and record.backward_s > 0
        )
    text = (tmp_path / "rank-0.jsonl").read_text()
    (tmp_path / "rank-0.jsonl").write_text(text + json.dumps({"step": 6})[:5])
    assert len(list(read_records(RunDir(tmp_path).records(0)))) == 6, (
        "a line that was cut is left out"
    )


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_bf16_computes_in_bfloat16_and_keeps_float32_weights(
    size: int, alone: dict[str, Any], tmp_path: Path
):
    tree = JOB | {"exchange": "native", "precision": "bf16"}
    results = run_ranks(train, size, tree, tmp_path)
    for result in results:
        assert result["weights"].dtype == alone["weights"].dtype
        assert (result["weights"] == results[0]["weights"]).all()
        off = abs(result["weights"] - alone["weights"]).max()
        assert 1e-6 < off < 1e-2  # bfloat16 has 8 bits
        assert result["summary"]["final_loss"] == pytest.approx(
            alone["summary"]["final_loss"], rel=0.01
        )


@pytest.mark.slow
@pytest.mark.parametrize("exchange", ["native", "scheduled"])
def test_parameters_that_a_step_does_not_use_are_left_alone(exchange: str, tmp_path: Path):
    tree = {"model": "tests.training.jobs:Branches", "data": "tests.training.jobs:vectors"}
    tree |= {"batch_size": 16, "steps": 4, "optimizer": {"name": "sgd", "lr": 0.1}}
    tree["exchange"] = {"name": exchange, "find_unused_parameters": True}
    results = run_ranks(train, 2, tree, tmp_path)

    expected = jobs.train_alone(tree)
    weights = torch.cat([value.flatten() for value in expected.values()])
    for result in results:
        torch.testing.assert_close(torch.from_numpy(result["weights"]), weights)


class Misjudged(jobs.Tokens):
    """A job that trains well, and whose evaluation is wrong."""

    def __init__(self, *, fault: str = ""):
        super().__init__()
        self._fault = fault

    def evaluate(self, batch: Any) -> dict[str, Mean]:
        if self._fault:
            raise RuntimeError(self._fault)
        return super().evaluate(batch)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workload": {"name": f"{__name__}:Misjudged", "fault": "no labels"}}, "no labels"),
        (
            {"workload": f"{__name__}:Misjudged", "target_accuracy": 0.9},
            r"evaluation has no figure accuracy, so it is never reached \(there are: loss, twice, odd",
        ),
    ],
)
def test_a_fault_in_evaluation_shows_before_the_first_step(
    changes: dict[str, Any], message: str, tmp_path: Path
):
    tree = {"batch_size": 16, "steps": 4, "exchange": "native", "optimizer": "sgd"} | changes
    with pytest.raises(AssertionError, match=message):
        run_ranks(jobs.train_rank, 2, tree, tmp_path)
    assert not RunDir(tmp_path).records(0).exists()
