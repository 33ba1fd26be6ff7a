"""Tests of run/time_left.py: made-up runs, whose true length is known."""

import random
from collections.abc import Callable, Iterator

import pytest

from scaletrain.run.records import StepRecord
from scaletrain.run.time_left import TimeLeft


def record(step: int, time: float, step_s: float, forward_s: float = 0.0) -> StepRecord:
    return StepRecord(
        step=step,
        rank=0,
        time=time,
        loss=1.0,
        samples=8,
        lr=0.1,
        step_s=step_s,
        input_s=0.0,
        forward_s=forward_s,
        backward_s=0.0,
        update_s=0.0,
    )


def played(
    num_steps: int, step_s: Callable[[int], float], pause_s: Callable[[int], float]
) -> Iterator[tuple[StepRecord, float]]:
    """Yield each record with the seconds that are truly left after its step."""
    total = sum(step_s(step) + pause_s(step + 1) for step in range(num_steps))
    now = 0.0
    for step in range(num_steps):
        yield record(step, 1e9 + now, step_s(step), step_s(step) / 2), total - now - step_s(step)
        now += step_s(step) + pause_s(step + 1)


def error_after(fraction: float, num_steps: int, estimate: TimeLeft, run: Iterator) -> float:
    for made_up, left_s in run:
        estimate.add(made_up)
        if made_up.step + 1 >= fraction * num_steps:
            return abs(estimate.seconds() / left_s - 1)
    raise AssertionError("unreachable")


@pytest.mark.parametrize("fraction", [0.05, 0.06, 0.3, 0.55, 0.9])
def test_steps_that_vary_with_evaluations_and_checkpoints_between(fraction: float):
    """Evaluations are half of the time, and the first steps take a hundred times as long."""
    draw = random.Random(4)
    lengths = [draw.uniform(0.05, 0.15) for _ in range(2000)]
    lengths[:3] = [10.0, 10.0, 10.0]

    def pause_s(done: int) -> float:
        # Not due at the end: both are done there in any case.
        evaluates = done % 40 == 0 or done == 2000
        saves = done % 100 == 0 or done == 2000
        return evaluates * 4.0 + saves * 0.5 + 0.001

    estimate = TimeLeft(2000, 40, 100, test_samples=0)
    run = played(2000, lengths.__getitem__, pause_s)
    assert error_after(fraction, 2000, estimate, run) < 0.1


def test_evaluations_count_before_the_first_one():
    """Of 100 steps a second, one evaluation of 200 samples takes as long as their forward."""

    def pause_s(done: int) -> float:
        return 200 * 0.1 / 2 / 8 if done % 250 == 0 else 0.0

    estimate = TimeLeft(1000, 250, None, test_samples=200)
    run = played(1000, lambda step: 0.1, pause_s)
    assert error_after(0.05, 1000, estimate, run) < 0.02


def test_a_machine_that_gets_slower_is_followed():
    estimate = TimeLeft(20_000, None, None, test_samples=0)
    run = played(20_000, lambda step: 0.1 if step < 10_000 else 0.3, lambda done: 0.0)
    assert error_after(0.56, 20_000, estimate, run) < 0.01


def test_a_rank_that_leaves_steps_out_gets_on_faster():
    estimate = TimeLeft(1000, None, None, test_samples=0)
    for index in range(50):
        estimate.add(record(2 * index, 1e9 + 0.1 * index, 0.1))
    assert estimate.seconds() == pytest.approx((1000 - 99) * 0.05, rel=0.03)


def test_a_clock_that_is_put_back_takes_nothing_off():
    estimate = TimeLeft(100, None, None, test_samples=0)
    assert estimate.seconds() is None
    for step in range(10):
        put_back_s = 3600.0 if step >= 5 else 0.0
        estimate.add(record(step, 1e9 + 0.1 * step - put_back_s, 0.1))
    assert estimate.seconds() == pytest.approx(9.0)


def test_the_first_steps_count_only_while_there_are_no_others():
    estimate = TimeLeft(10, None, None, test_samples=0)
    estimate.add(record(0, 0.0, 5.0))
    assert estimate.seconds() == pytest.approx(45.0)
    for step in range(1, 8):
        estimate.add(record(step, 5.0 * min(step, 3) + max(0, step - 3), 5.0 if step < 3 else 1.0))
    assert estimate.seconds() == pytest.approx(2.0)
