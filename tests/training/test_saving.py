"""Tests of training/saving.py and best.py: which checkpoints stay, and what they bring back.

Bugs it catches: a best checkpoint that a worse one replaces after a resume, one of the weights of
another step, a count of a callback that begins again, averaged weights that training goes on with.
"""

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from scaletrain.errors import UserError
from scaletrain.run.layout import RunDir
from scaletrain.training import checkpoint, tensor_file
from scaletrain.training.callbacks import Callback
from scaletrain.training.checkpoint import State
from scaletrain.training.checkpoint_writer import CheckpointWriter
from scaletrain.training.evaluation import Evaluation
from tests.ranks import run_ranks
from tests.training import jobs

JOB = {
    "model": {"name": "mlp", "sizes": [8, 16, 4]},
    "data": "tests.training.jobs:vectors",
    "batch_size": 16,
    "steps": 10,
    "evaluate_every": 2,
    "exchange": "none",
}


def evaluate_as(monkeypatch: pytest.MonkeyPatch, accuracies: list[float | None]) -> None:
    """Let evaluations return these accuracies, one after the other."""
    coming = iter(accuracies)
    monkeypatch.setattr(Evaluation, "run", lambda self: {"test_accuracy": next(coming)})


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """A run that is refused leaves its process group."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no checkpoint be put off."""
    is_writing = CheckpointWriter.is_writing
    monkeypatch.setattr(
        CheckpointWriter, "is_writing", lambda self, patience_s=0.0: is_writing(self, 30.0)
    )


def best_steps(run_dir: Path) -> list[int]:
    return [step for step, _ in RunDir(run_dir).best_checkpoints()]


@pytest.mark.usefixtures("fast_disk")
def test_the_best_stays_apart_from_the_last_also_after_a_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    settings = {"every_steps": 1, "keep": 1, "keep_every": 4, "best": "test_accuracy"}
    tree = JOB | {"checkpoint": settings}
    evaluate_as(monkeypatch, [0.3, 0.5, None, 0.4, 0.5])
    ran = jobs.train_rank(0, 1, tree, tmp_path)
    assert ran["summary"]["best"] == {"figure": "test_accuracy", "value": 0.5, "step": 4}
    assert best_steps(tmp_path) == [4]
    assert [step for step, _ in RunDir(tmp_path).checkpoints()] == [4, 8, 10]
    # The same weights as those of the step, and the figure with them.
    best = checkpoint.read(RunDir(tmp_path).best_checkpoint(4))
    assert best.state["best"] == {"figure": "test_accuracy", "value": 0.5}
    of_step = checkpoint.model_state(checkpoint.read(RunDir(tmp_path).checkpoint(4)))
    for name, tensor in checkpoint.model_state(best).items():
        assert torch.equal(tensor, of_step[name])

    evaluate_as(monkeypatch, [0.5, 0.2])
    again = jobs.train_rank(0, 1, tree | {"steps": 13}, tmp_path, resume=True)
    assert again["summary"]["best"]["step"] == 4 and best_steps(tmp_path) == [4]
    assert [step for step, _ in RunDir(tmp_path).checkpoints()] == [4, 8, 12, 13]
    evaluate_as(monkeypatch, [0.6, 0.1])
    again = jobs.train_rank(0, 1, tree | {"steps": 16}, tmp_path, resume=True)
    assert again["summary"]["best"]["step"] == 14 and best_steps(tmp_path) == [14]


def test_a_lower_loss_is_better(tmp_path: Path):
    tree = JOB | {"checkpoint": {"best": "test_loss"}, "optimizer": {"name": "sgd", "lr": 0.01}}
    ran = jobs.train_rank(0, 1, tree, tmp_path)
    assert ran["summary"]["best"] == {
        "figure": "test_loss",
        "value": ran["summary"]["test_loss"],
        "step": 10,
    }


def test_a_figure_that_is_not_there_is_said_before_training(tmp_path: Path):
    tree = JOB | {"checkpoint": {"best": "test_f1"}}
    allowed = r"checkpoint.best: 'test_f1' is not allowed \(allowed: test_loss, test_accuracy\)"
    with pytest.raises(UserError, match=allowed):
        jobs.train_rank(0, 1, tree, tmp_path)


def test_a_best_that_comes_while_the_disk_is_busy_has_the_weights_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    may_write = threading.Event()
    write = tensor_file.write

    def late(*arguments: Any) -> None:
        assert may_write.wait(30)
        write(*arguments)

    monkeypatch.setattr(tensor_file, "write", late)
    model = nn.Linear(3, 3)
    state = State(model, torch.optim.SGD(model.parameters(), lr=0.1))
    settings = jobs.config.check(JOB).checkpoint
    writer = CheckpointWriter(tmp_path, settings, lambda doing: None)
    for step in range(3):
        nn.init.constant_(model.bias, step)
        if step == 0:
            writer.save(step, state)
        else:
            writer.save_best(step, state, {"value": step})
    nn.init.constant_(model.bias, 9)
    may_write.set()
    writer.wait()
    assert best_steps(tmp_path) == [2]
    content = checkpoint.read(RunDir(tmp_path).best_checkpoint(2))
    assert (checkpoint.model_state(content)["bias"] == 2).all()


class Counting(Callback):
    """Counts steps, also over resumes."""

    def __init__(self) -> None:
        self.steps = torch.zeros(2)

    def after_step(self, record: Any) -> None:
        self.steps += 1

    def state_dict(self) -> Mapping[str, Any]:
        return {"steps": self.steps, "of": ["steps"]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert state["of"] == ["steps"]
        self.steps = state["steps"].clone()


def counting(trainer: Any) -> Callback:
    return Counting()


def _counted(rank: int, size: int, *arguments: Any) -> tuple[list[str], list[float]]:
    """Train; return the lines of the resume, and the counts that this rank ends with."""
    trainers = []
    make = jobs.Trainer

    def noted(*inner: Any) -> Any:
        trainers.append(make(*inner))
        return trainers[-1]

    jobs.Trainer = noted  # type: ignore[misc,assignment]
    try:
        jobs.train_rank(rank, size, *arguments)
    finally:
        jobs.Trainer = make  # type: ignore[misc]
    counts = [callback.steps[0].item() for callback in trainers[0]._callbacks]
    return trainers[0].resume_lines, counts


@pytest.mark.slow
def test_a_callbacks_state_comes_back_on_every_rank(tmp_path: Path):
    counter = "tests.training.test_saving:counting"
    tree = JOB | {"callbacks": [counter, counter], "exchange": "native"}
    assert run_ranks(_counted, 2, tree, tmp_path) == [([], [10, 10])] * 2
    # One more and one less than the checkpoint holds.
    tree = tree | {"steps": 12, "callbacks": [counter, counter, counter]}
    for lines, counts in run_ranks(_counted, 2, tree, tmp_path, True):
        assert counts == [12, 12, 2]
        assert (
            f"callbacks.{counter}++: begins anew: step-10.safetensors holds no state" in lines[-1]
        )
    lines, counts = _counted(0, 1, JOB | {"steps": 12, "callbacks": [counter]}, tmp_path, True)
    assert counts == [12]
    assert [line for line in lines if "is left out" in line and f"{counter}+:" in line]


def _stopping(rank: int, size: int, *arguments: Any) -> dict[str, Any]:
    """Train; the loss is best after step 4."""
    losses = {2: 0.9, 4: 0.5, 6: 0.7, 8: 0.45, 10: 0.1}
    resumes = len(arguments) == 3
    steps = iter([8, 10] if resumes else [2, 4, 6, 8, 10])
    Evaluation.run = lambda self: {"test_loss": losses[next(steps)]}  # type: ignore[method-assign]
    return jobs.train_rank(rank, size, *arguments)["summary"]


@pytest.mark.slow
@pytest.mark.usefixtures("fast_disk")
def test_all_ranks_stop_early_at_the_same_step_also_after_a_resume(tmp_path: Path):
    stop = {"name": "early_stop", "patience": 2, "min_delta": 0.1}
    tree = JOB | {"steps": 40, "callbacks": [stop], "exchange": "native"}
    tree["checkpoint"] = {"every_steps": 2}
    told = "early_stop: test_loss has not improved for 2 evaluations (best: 0.5 after step 4)"
    undisturbed, interrupted = tmp_path / "undisturbed", tmp_path / "interrupted"
    undisturbed.mkdir()
    interrupted.mkdir()
    for summary in run_ranks(_stopping, 2, tree, undisturbed):
        assert summary["steps"] == 8 and summary["finished"] and summary["stopped"] == told
    for summary in run_ranks(_stopping, 2, tree, interrupted, False, 6):
        assert summary["steps"] == 6 and not summary["finished"]
    for summary in run_ranks(_stopping, 2, tree, interrupted, True):
        assert summary["steps"] == 8 and summary["stopped"] == told
