"""Tests of the workload distillation against the paper's formulas."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from scaletrain import config
from scaletrain.training import workload
from tests.ranks import run_ranks
from tests.training import jobs

TEACHER: dict[str, Any] = {
    "model": {"name": "mlp", "sizes": [8, 30, 4]},
    "data": "tests.training.jobs:vectors",
    "batch_size": 16,
    "steps": 3,
    "exchange": "none",
    "optimizer": {"name": "sgd", "lr": 0.2},
}
LEFT_OUT = 2


def student(teacher: Path, **options: Any) -> dict[str, Any]:
    return {
        "workload": {
            "name": "scaletrain.training.workloads.distillation:Distillation",
            "student": {"name": "mlp", "sizes": [8, 5, 4]},
            "teacher": {"name": "mlp", "sizes": [8, 30, 4], "run": str(teacher)},
            "dataset": {"name": "tests.training.jobs:vectors"},
            **options,
        },
        "batch_size": 16,
        "steps": 4,
        "optimizer": {"name": "sgd", "lr": 0.2},
        "exchange": "native",
    }


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher")
    jobs.train_rank(0, 1, TEACHER, folder)
    return folder


@pytest.mark.parametrize("temperature", [1.0, 5.0])
def test_the_loss_is_the_papers(temperature: float, teacher: Path):
    tree = student(teacher, temperature=temperature, soft=0.7)
    job: Any = workload.build(config.check(tree), torch.device("cpu"))
    inputs, targets = next(iter(torch.utils.data.DataLoader(job.data.train, 10)))
    found = job.forward((inputs, targets))
    own, other = job.model(inputs).detach(), job.teacher(inputs)
    soft = 0.0
    for row, said in zip(own / temperature, other / temperature, strict=True):
        soft -= float((said.exp() / said.exp().sum()) @ (row - row.exp().sum().log()))
    hard = functional.cross_entropy(own, targets, reduction="sum").item()
    assert found.count == 10
    assert found.total.item() == pytest.approx(0.7 * temperature**2 * soft + 0.3 * hard, rel=1e-5)


def test_soft_gradients_keep_their_size_at_any_temperature(teacher: Path):
    """Bug it catches: without T^2, a high temperature lets labels alone decide."""
    sizes = []
    for temperature in (10.0, 40.0):
        tree = student(teacher, temperature=temperature, soft=1.0)
        job: Any = workload.build(config.check(tree), torch.device("cpu"))
        inputs, targets = next(iter(torch.utils.data.DataLoader(job.data.train, 10)))
        job.forward((inputs, targets)).total.backward()
        sizes.append(torch.cat([each.grad.flatten() for each in job.model.parameters()]).norm())
    assert sizes[1] / sizes[0] == pytest.approx(1, rel=0.05)


def test_a_class_that_is_left_out_is_never_seen_and_shifted(teacher: Path):
    tree = student(teacher, soft=1.0, left_out={"class": LEFT_OUT, "shift": 1e6})
    job: Any = workload.build(config.check(tree), torch.device("cpu"))
    assert {int(target) for _, target in job.data.train} == {0, 1, 3}
    inputs, targets = job.data.test[:]
    figures = job.evaluate((inputs, targets))
    share = (targets == LEFT_OUT).float().mean().item()
    assert figures["accuracy"].total / figures["accuracy"].count == pytest.approx(share)
    assert figures["left_out_accuracy"].total == figures["left_out_accuracy"].count


def test_students_on_any_number_of_workers_are_one(teacher: Path, tmp_path: Path):
    tree = student(teacher, samples=48)
    (alone,) = run_ranks(jobs.train_rank, 1, tree, tmp_path)
    for rank in run_ranks(jobs.train_rank, 3, tree, tmp_path):
        for name, value in alone["state"].items():
            assert "teacher" not in name
            np.testing.assert_allclose(rank["state"][name], value, rtol=1e-4, atol=1e-6)
