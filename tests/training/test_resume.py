"""Tests of training/resume.py, and of what a run that goes on prints and does.

Bugs it catches: a changed key that is ignored without a word, an option of the optimizer that the
checkpoint overwrites, a traceback where the configuration does not fit.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from scaletrain import config
from scaletrain.training import checkpoint, workload
from scaletrain.training import optimizer as training_optimizer
from scaletrain.training.batches import GlobalBatches
from scaletrain.training.checkpoint import Loaded, State
from scaletrain.training.resume import compare, resume_lines, training_facts
from tests.cluster.commands import scaletrain, summary

JOB: dict[str, Any] = {
    "model": {"name": "digits_cnn", "width": 4},
    "data": "digits",
    "batch_size": 48,
    "steps": 10,
    "optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.0005},
    "seed": 1,
}


def facts(**changes: Any) -> dict[str, Any]:
    run = config.check(JOB | changes)
    made = training_optimizer.build(run, nn.Linear(2, 2))
    size = run.workers if run.batch_mode == "weak" else 1
    steps = run.steps or round((run.epochs or 0) * 1437 / run.batch_size)
    return training_facts(run, made, 1437, run.batch_size * size, steps)


def other_data() -> None:
    """Stand for a person's own data."""


def optimizer(**options: Any) -> dict[str, Any]:
    return JOB["optimizer"] | options


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, []),
        ({"steps": 20}, []),
        ({"steps": None, "epochs": 3}, []),
        ({"workers": 4}, []),
        (
            {"batch_size": 96},
            ["batch_size: 96 now, 48 in the checkpoint: the step's samples change from here on"],
        ),
        (
            {"batch_mode": "weak"},
            ["batch_mode: weak now, strong in the checkpoint: the step's samples change from here on"],
        ),
        (
            {"optimizer": optimizer(weight_decay=0.001)},
            ["optimizer.weight_decay: 0.001 counts, the checkpoint was written with 0.0005"],
        ),
        (
            {"optimizer": {"name": "SGD", "lr": 0.05, "momentum": 0.9}},
            [
                "optimizer.lr: 0.05 counts, the checkpoint was written with 0.1",
                "optimizer.weight_decay: 0 counts, the checkpoint was written with 0.0005",
            ],
        ),
        (
            {"lr_schedule": {"name": "cosine", "warmup_steps": 5}},
            [
                "lr_schedule.name: cosine counts, the checkpoint was written with fixed",
                "lr_schedule.warmup_steps: 5 counts, the checkpoint was written with 0",
            ],
        ),
        (
            {"seed": 2},
            ["seed: 2 now, 1 in the checkpoint: the order of samples changes from here on"],
        ),
        (
            {"exchange": "ring"},
            ["exchange: ring counts, the checkpoint was written with native"],
        ),
        (
            {"data": "tests.training.test_resume:other_data"},
            [
                "data: tests.training.test_resume:other_data now, digits in the checkpoint:"
                " training goes on with other data"
            ],
        ),
        (
            {"model": "digits_cnn"},
            ["model.width: 16 counts, the checkpoint was written with 4"],
        ),
        (
            {"loss": "nll_loss", "accumulate": 2},
            [
                "loss: nll_loss counts, the checkpoint was written with cross_entropy",
                "accumulate: 2 counts, the checkpoint was written with 1",
            ],
        ),
    ],
)  # fmt: skip
def test_every_difference_is_a_line(changes: dict[str, Any], lines: list[str]):
    before = json.loads(json.dumps(facts()))
    assert compare(before, facts(**changes)) == lines


@pytest.mark.parametrize(
    ("schedule", "is_stretched"),
    [("fixed", False), ("exp", False), ("cosine", True), ("poly", True), ("multistep", True)],
)
def test_a_longer_run_is_a_line_where_the_rate_follows_from_its_length(
    schedule: str, is_stretched: bool
):
    line = (
        "steps of the run: 20 now, 10 in the checkpoint: the schedule runs over all of them, so the"
        " learning rate jumps here"
    )
    before, now = facts(lr_schedule=schedule), facts(lr_schedule=schedule, steps=20)
    assert compare(before, now) == [line] * is_stretched
    del before["steps of the run"]  # of an earlier version
    assert compare(before, now) == []


def test_changed_groups_and_options_of_the_loss_are_lines():
    now = facts(
        optimizer=optimizer(groups=[{"match": "bias", "lr": 1}]),
        loss={"name": "cross_entropy", "label_smoothing": 0.1},
    )
    assert compare(facts(), now) == [
        "loss.label_smoothing: 0.1 counts, the checkpoint was written with its default",
        'optimizer.groups: [{"match": ["bias"], "lr": 1.0}] counts, the checkpoint was written'
        " with []",
    ]


def test_more_workers_change_a_weak_batch():
    before = facts(batch_mode="weak", workers=2)
    assert compare(before, facts(batch_mode="weak", workers=4)) == [
        "global batch: 192 now, 96 in the checkpoint: the step's samples change from here on"
    ]


def test_tuples_and_lists_are_equal():
    adam = {"name": "adam", "betas": [0.9, 0.95]}
    assert compare(json.loads(json.dumps(facts(optimizer=adam))), facts(optimizer=adam)) == []


def test_a_fallback_is_a_line():
    loaded = Loaded(3, Path("step-3.safetensors"), facts(), ["step-4.safetensors: damaged (...)"])
    assert resume_lines(loaded, facts()) == [
        "step-4.safetensors: damaged (...): left out, step-3.safetensors is loaded instead"
    ]


def trained_by_torch_alone(first: config.RunConfig, second: config.RunConfig) -> nn.Module:
    """Half of the steps with the first configuration's options, the rest with the second's."""
    parts = workload.build(first, torch.device("cpu"))
    model, optimizer = parts.model, parts.optimizer
    samples = GlobalBatches(len(parts.data.train), 48, 1)  # type: ignore[arg-type]
    for step in range(20):
        if step == 10:
            for group in optimizer.param_groups:
                group["weight_decay"] = second.optimizer.options["weight_decay"]
                group["lr"] = second.optimizer.options["lr"]
        inputs, targets = parts.data.train[samples.indices(step)]
        model.zero_grad()
        parts.loss(model(inputs), targets).backward()
        optimizer.step()
    return model


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_that_goes_on_with_other_options_is_that_of_torch_alone(tmp_path: Path):
    """Bit for bit, and every line is printed once; then what does not fit, and what is damaged."""
    torch.set_num_threads(1)
    first_file, second_file = tmp_path / "first.yaml", tmp_path / "second.yaml"
    first = config.check(JOB | {"exchange": "none", "threads": 1})
    second = config.check(
        JOB
        | {"exchange": "none", "threads": 1, "steps": 20}
        | {"optimizer": optimizer(weight_decay=0.3, lr=0.01)}
    )
    first_file.write_text(first.to_yaml())
    second_file.write_text(second.to_yaml())
    run_dir = tmp_path / "run"
    done = scaletrain("train", str(first_file), "--run-dir", str(run_dir), timeout=80)
    assert done.returncode == 0, done.stdout + done.stderr

    goes_on = ("train", str(second_file), "--run-dir", str(run_dir), "--resume")
    done = scaletrain(*goes_on, timeout=80)
    assert done.returncode == 0, done.stdout + done.stderr
    for line in (
        "optimizer.lr: 0.01 counts, the checkpoint was written with 0.1",
        "optimizer.weight_decay: 0.3 counts, the checkpoint was written with 0.0005",
    ):
        assert done.stdout.count(line) == 1, done.stdout
    assert "steps:" not in done.stdout.split("resumed at step 10")[0]
    expected = trained_by_torch_alone(first, second)
    parts = workload.build(second, torch.device("cpu"))
    loaded = checkpoint.load_latest(run_dir, State(parts.model, parts.optimizer))
    assert loaded is not None and loaded.step == 20
    for first_value, other in zip(expected.parameters(), parts.model.parameters(), strict=True):
        assert torch.equal(first_value, other)

    other_optimizer = (*goes_on, "--set", "optimizer={name: adam, lr: 0.01}", "--set", "steps=30")
    done = scaletrain(*other_optimizer, timeout=80)
    output = done.stdout + done.stderr
    assert done.returncode == 2 and "Adam cannot go on with the state of SGD" in output, output
    assert "Traceback" not in output

    newest = run_dir / "step-20.safetensors"
    content = bytearray(newest.read_bytes())
    content[-5] ^= 4
    newest.write_bytes(content)
    done = scaletrain(*goes_on, timeout=80)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(f"{newest}: damaged checkpoint (tensor ") == 1, done.stdout
    assert "step-10.safetensors is loaded instead" in done.stdout
    assert "resumed at step 10" in done.stdout and summary(run_dir)["steps"] == 20
    again = checkpoint.load_latest(run_dir, State(parts.model, parts.optimizer))
    assert again is not None and again.step == 20 and again.damaged == []
