"""Tests ``worker/local_steps.py``: when workers of the local modes synchronise."""

import pytest

from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.worker.local_steps import Rounds


def test_rounds_come_after_each_step_and_later_after_several():
    rounds = Rounds(local_steps=4, single_steps=2)
    ends = [steps for steps in range(1, 15) if rounds.after(steps) > rounds.after(steps - 1)]
    assert ends == [1, 2, 6, 10, 14]


@pytest.mark.parametrize("single_steps", [0, 1, 5])
@pytest.mark.parametrize("local_steps", [1, 3, 16])
def test_a_worker_that_joins_begins_after_the_rounds_that_are_complete(local_steps, single_steps):
    rounds = Rounds(local_steps, single_steps)
    for number in range(20):
        steps = rounds.steps_before(number)
        assert rounds.after(steps) == number
        assert steps == 0 or rounds.after(steps - 1) == number - 1


def test_only_post_local_begins_with_single_steps():
    local = Settings(2, mode="local_sgd", local_steps=8, local_after=5)
    assert Rounds.of(local) == (8, 0)
    post_local = Settings(2, mode="post_local", local_steps=8, local_after=5)
    assert Rounds.of(post_local) == (8, 5)
