"""Tests of training/learning_rate.py.

Schedules against Caffe's formulas (caffe.proto, lr_policy), worked by hand.
"""

import math

import pytest

from scaletrain.config import LrSchedule
from scaletrain.training.learning_rate import learning_rate


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
    ],
)
def test_policy(schedule: dict, step: int, expected: float):
    assert math.isclose(
        learning_rate(LrSchedule(**schedule), 0.5, step, 100), expected, rel_tol=1e-12
    )
