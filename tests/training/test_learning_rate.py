"""Tests of training/learning_rate.py.

Schedules against Caffe's formulas (caffe.proto, lr_policy), worked by hand.
"""

import math

import pytest
import torch

from scaletrain.config import LrSchedule
from scaletrain.training.learning_rate import describe, learning_rates, scale


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        ({"name": "fixed"}, 70, 0.5),
        ({"name": "step", "gamma": 0.1, "step_size": 30}, 29, 0.5),
        ({"name": "step", "gamma": 0.1, "step_size": 30}, 60, 0.005),
        ({"name": "multistep", "gamma": 0.1, "milestones": [0.5, 0.75]}, 49, 0.5),
        ({"name": "multistep", "gamma": 0.1, "milestones": [0.5, 0.75]}, 75, 0.005),
        ({"name": "exp", "gamma": 0.9}, 10, 0.5 * 0.9**10),
        ({"name": "inv", "gamma": 0.1, "power": 0.75}, 30, 0.5 * 4**-0.75),
        ({"name": "poly", "power": 0.5}, 75, 0.25),
        ({"name": "sigmoid", "gamma": 0.1, "step_size": 40}, 40, 0.25),
        ({"name": "cosine"}, 50, 0.25),
        ({"name": "cosine", "warmup_steps": 10}, 0, 0.05),
        ({"name": "fixed", "warmup_steps": 10}, 4, 0.25),
        ({"name": "fixed", "warmup_steps": 10}, 9, 0.5),
        ({"name": "cosine", "min_lr": 0.1}, 50, 0.3),
        ({"name": "cosine", "min_lr": 0.1}, 100, 0.1),
        ({"name": "poly", "min_lr": 0.1, "power": 2}, 50, 0.2),
        ({"name": "step", "gamma": 0.1, "step_size": 30, "min_lr": 0.02}, 30, 0.05),
        ({"name": "step", "gamma": 0.1, "step_size": 30, "min_lr": 0.02}, 60, 0.02),
        ({"name": "fixed", "min_lr": 0.4, "warmup_steps": 10}, 0, 0.05),
    ],
)
def test_policy(schedule: dict, step: int, expected: float):
    [rate] = learning_rates(LrSchedule(**schedule), [0.5], step, 100)
    assert math.isclose(rate, expected, rel_tol=1e-12)


def test_the_floor_of_each_group_is_in_proportion_to_its_rate():
    schedule = LrSchedule(name="exp", gamma=0.5, min_lr=0.1)
    assert learning_rates(schedule, [0.4, 4.0], 1, 100) == [0.2, 2.0]
    assert learning_rates(schedule, [0.4, 4.0], 50, 100) == [0.1, 1.0]


def test_cosine_with_a_floor_is_that_of_torch():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40, eta_min=0.01)
    schedule = LrSchedule(name="cosine", min_lr=0.01)
    for step in range(40):
        [rate] = learning_rates(schedule, [0.5], step, 40)
        assert math.isclose(rate, optimizer.param_groups[0]["lr"], rel_tol=1e-9)
        optimizer.step()
        torchs.step()


@pytest.mark.parametrize(
    ("scaling", "batch", "factor", "line"),
    [
        (
            {},
            1024,
            4.0,
            "learning rate: 0.4 for 1024 samples = 0.1 x 1024/256 (linear rule), fixed",
        ),
        (
            {"rule": "sqrt", "base_batch": 64},
            1024,
            4.0,
            "learning rate: 0.4 for 1024 samples = 0.1 x sqrt(1024/64) (square-root rule), fixed",
        ),
        ({"base_batch": 64}, 16, 0.25, "0.025 for 16 samples = 0.1 x 16/64 (linear rule)"),
    ],
)
def test_a_rule_scales_the_rate_and_shows_its_arithmetic(
    scaling: dict, batch: int, factor: float, line: str
):
    schedule = LrSchedule(scaling=scaling)
    assert scale(schedule.scaling, batch) == factor
    [said] = describe(schedule, [0.1 * factor], batch, 100)
    assert line in said


def test_without_a_rule_the_rates_of_both_are_shown():
    assert describe(LrSchedule(), [0.1], 64, 100) == [
        "learning rate: 0.1 for 64 samples, fixed; it does not change with the number of workers",
        "scaling rules: 0.1 tuned for 256 samples a step would be 0.025 for 64 by the linear rule,"
        " 0.05 by the square root (lr_schedule.scaling applies one)",
    ]
