import math
import random

import pytest

from scaletrain.scaling.intervals import change, mean, percentiles


def test_t_interval_of_known_values():
    # mean 3, s = 1.5811, t(0.975, 4) = 2.7764: the half width is 2.7764 * 1.5811 / sqrt(5)
    m = mean([1, 2, 3, 4, 5])
    assert m.value == 3
    assert m.ci95 == pytest.approx(2.7764 * 1.5811 / math.sqrt(5), rel=1e-4)


def test_one_repeat_tells_nothing_about_noise():
    assert mean([7.0]).ci95 is None
    assert change(mean([7.0]), mean([1.0, 2.0])) is None


def test_interval_covers_the_truth_95_times_in_100():
    draw = random.Random(1)
    covered = 0
    for _ in range(2000):
        m = mean([draw.gauss(10, 2) for _ in range(3)])
        covered += m.low <= 10 <= m.high
    assert 0.93 < covered / 2000 < 0.97  # 1.96 standard errors would cover only 81 %


def test_percentiles_interpolate():
    assert percentiles([4, 1, 3, 2]) == {10: 1.3, 50: 2.5, 90: pytest.approx(3.7), 95: pytest.approx(3.85)}
    assert percentiles([]) == {10: None, 50: None, 90: None, 95: None}


def test_change_sees_a_real_slowdown_and_no_noise():
    old = mean([100, 101, 99, 100])
    assert change(mean([80, 81, 79, 80]), old).is_lower
    same = change(mean([100.5, 99.5, 101, 99]), old)
    assert not same.is_lower and not same.is_higher
