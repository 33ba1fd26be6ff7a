"""Tests of ``scaling/measure/intervals.py``: intervals cover the truth as often as they say."""

import math
import random

import pytest

from scaletrain.scaling.measure.intervals import change, enough, mean, percentiles, ratio


def test_t_interval_of_known_values():
    # mean 3, s = 1.5811, t(0.975, 4) = 2.7764: the half width is 2.7764 * 1.5811 / sqrt(5)
    m = mean([1, 2, 3, 4, 5])
    assert m.value == 3
    assert m.ci95 == pytest.approx(2.7764 * 1.5811 / math.sqrt(5), rel=1e-4)


def test_one_repeat_tells_nothing_about_noise():
    assert mean([7.0]).ci95 is None
    assert change(mean([7.0]), mean([1.0, 2.0])) is None


def test_enough_repeats_bring_the_interval_down_to_what_is_wanted():
    # t(0.975, n - 1) / sqrt(n): 2.484 at 3, 1.241 at 5, 0.715 at 10
    assert enough(3, 1.0, 0.5) == 5 and enough(3, 1.0, 0.49) == 6
    assert enough(3, 1.0, 0.29) == 10 and enough(3, 1.0, 0.01) is None


def test_interval_covers_the_truth_95_times_in_100():
    draw = random.Random(1)
    covered = 0
    for _ in range(2000):
        m = mean([draw.gauss(10, 2) for _ in range(3)])
        covered += m.low <= 10 <= m.high
    assert 0.93 < covered / 2000 < 0.97  # 1.96 standard errors would cover only 81 %


def test_percentiles_interpolate():
    assert percentiles([4, 1, 3, 2]) == {
        10: 1.3,
        50: 2.5,
        90: pytest.approx(3.7),
        95: pytest.approx(3.85),
    }
    assert percentiles([]) == {10: None, 50: None, 90: None, 95: None}


def test_change_sees_a_real_slowdown_and_no_noise():
    old = mean([100, 101, 99, 100])
    assert change(mean([80, 81, 79, 80]), old).is_lower
    same = change(mean([100.5, 99.5, 101, 99]), old)
    assert not same.is_lower and not same.is_higher


def test_a_ratio_fits_the_means_beside_it_and_what_repeats_share_cancels():
    ours, theirs = [110.0, 220.0, 150.0], [100.0, 200.0, 50.0]
    assert ratio(ours, theirs).value == pytest.approx(mean(ours).value / mean(theirs).value)
    assert ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0]).ci95 == pytest.approx(0, abs=1e-12)
    assert ratio([2.0], [1.0]).ci95 is None and ratio([2.0, 2.1], [1.0]).ci95 is None
    assert ratio([2.0, 2.1, 1.9], [1.0, 1.1]).ci95 > 0


def test_the_interval_of_a_ratio_covers_the_truth():
    draw = random.Random(2)
    covered = 0
    for _ in range(2000):
        drift = [draw.gauss(10, 1) for _ in range(4)]
        r = ratio(
            [2 * d + draw.gauss(0, 0.4) for d in drift], [d + draw.gauss(0, 0.2) for d in drift]
        )
        covered += r.low <= 2 <= r.high
    assert 0.93 < covered / 2000 < 0.97
