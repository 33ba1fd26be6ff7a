"""Tests of ``scaling/measure/intervals.py``: intervals cover the truth as often as they say."""

import math
import random

import pytest

from scaletrain.scaling.measure.intervals import (
    SESSION,
    chance_to_see,
    change,
    enough,
    luck,
    mean,
    outlying,
    paired_change,
    percentiles,
    ratio,
    repeats_to_see,
    typical,
)


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


def test_one_slow_repeat_is_found_and_left_out():
    values = [100.0, 101.0, 99.5, 100.5, 61.0]
    assert outlying(values) == [False, False, False, False, True]
    assert typical(values) == mean(values[:4])
    # Two cannot say which of them is wrong, and repeats that agree to 2 % are all right.
    assert outlying([100.0, 50.0]) == [False, False]
    assert outlying([100.0, 100.0, 100.001, 98.0]) == [False] * 4


@pytest.mark.parametrize("slow", [0.0, 0.1])
@pytest.mark.parametrize("repeats", [3, 5, 10])
def test_the_interval_of_the_typical_repeat_holds_where_one_in_ten_is_slow(slow, repeats):
    draw = random.Random(3)
    covered, widths, plain = 0, [], []
    for _ in range(2000):
        rates = [draw.gauss(100, 1) for _ in range(repeats)]
        rates = [rate * draw.uniform(0.5, 0.9) if draw.random() < slow else rate for rate in rates]
        found = typical(rates)
        covered += found.low <= 100 <= found.high
        widths.append(found.ci95)
        plain.append(mean(rates).ci95)
    assert 0.93 < covered / 2000 < 0.965
    if slow and repeats > 3:
        # The plain mean's interval holds as well, but says next to nothing.
        assert sum(widths) < 0.5 * sum(plain)


def test_a_slow_repeat_takes_its_partner_out_of_a_ratio():
    theirs = [10.0, 10.1, 9.9, 10.0, 10.05]
    ours = [2 * value for value in theirs]
    assert ratio([*ours[:4], 6.0], theirs).ci95 == pytest.approx(0, abs=0.02)


def test_sessions_that_differ_raise_no_alarms_and_turns_need_no_allowance():
    draw = random.Random(4)
    between = in_turns = 0
    for _ in range(2000):
        old_session, new_session = draw.gauss(100, SESSION * 100), draw.gauss(100, SESSION * 100)
        old = [draw.gauss(old_session, 0.3) for _ in range(10)]
        new = [draw.gauss(new_session, 0.3) for _ in range(10)]
        found = change(mean(new), mean(old), session=SESSION)
        between += found.is_lower or found.is_higher
        # In turns, whatever the machine does to one it does to the other.
        pace = [draw.gauss(1, 0.05) for _ in range(5)]
        pair = paired_change(
            [draw.gauss(100, 0.3) * p for p in pace], [draw.gauss(100, 0.3) * p for p in pace]
        )
        in_turns += pair.is_lower or pair.is_higher
        assert pair.high / pair.low < 1.1
    assert 0.03 < between / 2000 < 0.07 and 0.03 < in_turns / 2000 < 0.07


@pytest.mark.parametrize("session", [None, SESSION])
def test_as_many_changes_are_seen_as_promised(session):
    draw = random.Random(5)
    seen = 0
    for _ in range(2000):
        shifts = [1.0, 1.0] if session is None else [draw.gauss(1, session) for _ in range(2)]
        old = [draw.gauss(100, 1) * shifts[0] for _ in range(6)]
        new = [draw.gauss(96, 0.96) * shifts[1] for _ in range(6)]
        if session is None:
            found = paired_change(new, old)
        else:
            found = change(mean(new), mean(old), session=session)
        seen += found.is_lower
    assert seen / 2000 == pytest.approx(chance_to_see(0.04, 0.01, 6, session=session), abs=0.04)


def test_how_many_repeats_a_change_needs_is_known_beforehand():
    assert repeats_to_see(0.05, 0.01) == 3 and repeats_to_see(0.02, 0.01) == 7
    assert repeats_to_see(0.02, 0.01, together=12) > 7  # all intervals hold together
    # A change that is smaller than what sessions differ by is seen in turns alone.
    assert repeats_to_see(0.02, 0.005, session=SESSION) is None
    assert repeats_to_see(0.02, 0.005) == 4


def test_the_luck_of_a_winner_is_what_it_exceeds_the_truth_by():
    """Four equal rivals, five repeats of 1 %: the largest mean is 0.46 % too large."""
    draw = random.Random(5)
    excess = []
    told = []
    for _ in range(1000):
        means = [mean([draw.gauss(100, 1) for _ in range(5)]) for _ in range(4)]
        excess.append(max(m.value for m in means) / 100 - 1)
        told.append(luck(means))
    expected = 1.0294 * 0.01 / math.sqrt(5)  # the largest of four normal values
    assert sum(excess) / 1000 == pytest.approx(expected, rel=0.1)
    assert sum(told) / 1000 == pytest.approx(expected, rel=0.1)
    assert luck([mean([1.0, 1.1]), mean([1.0])]) == 0  # nothing is known of a single repeat
