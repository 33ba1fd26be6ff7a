"""Means with their confidence intervals, and ratios of them.

Samples are small: intervals are Student's t, never 1.96 standard deviations.
"""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

ONE_RUN = "single runs: no interval"
MANY = 30  # repeats, more than which no report asks for


class Mean(NamedTuple):
    """The mean of independent repeats."""

    value: float
    ci95: float | None  # half the width of its 95 % interval; None: one repeat shows no noise
    n: int  # repeats

    @property
    def low(self) -> float:
        return self.value - (self.ci95 or 0.0)

    @property
    def high(self) -> float:
        return self.value + (self.ci95 or 0.0)


def mean(values: Sequence[float]) -> Mean:
    """Return the mean of repeats with its interval, t(0.975, n - 1) s / sqrt(n).

    Args:
        values: of the repeats, at least one.

    >>> mean([4.0])
    Mean(value=4.0, ci95=None, n=1)
    """
    n = len(values)
    if n < 2:
        return Mean(float(values[0]), None, n)
    return Mean(statistics.fmean(values), _half_width(n) * statistics.stdev(values), n)


def _half_width(n: int) -> float:
    """Return half the width of the interval of a mean of ``n``, in their standard deviations."""
    return _t(0.975, n - 1) / math.sqrt(n)


def _t(probability: float, freedom: float) -> float:
    """Return a quantile of Student's t distribution."""
    return float(stats.t.ppf(probability, freedom))


def enough(n: int, ci95: float, wanted: float) -> int | None:
    """Return how many repeats narrow an interval to ``wanted``, if they scatter as these did.

    Args:
        n: the repeats so far, at least 2.
        ci95: half the width of their interval.
        wanted: half the width that is wanted.

    Returns:
        The number of repeats; None if it is more than ``MANY``.
    """
    # The interval was the deviation times this factor: dividing gives the deviation back.
    deviation = ci95 / _half_width(n)
    for repeats in range(n + 1, MANY + 1):
        if deviation * _half_width(repeats) <= wanted:
            return repeats
    return None


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Mean:
    """Return the ratio of two means, with its interval to first order.

    It is the ratio of the means, not the mean of ratios, so that it fits the means beside it.
    Values at the same position were measured close to each other: drifts that they share cancel.
    Where one side has more repeats, they are independent and the relative errors add up as squares.
    """
    our_mean, their_mean = mean(ours), mean(theirs)
    value = our_mean.value / their_mean.value
    if len(ours) == len(theirs):
        # To first order, the error of a / b is (da - a / b * db) / b. Each pair of repeats gives
        # one such error; drifts that both share cancel in it.
        residuals = np.array(ours) - value * np.array(theirs)
        errors = mean((residuals / their_mean.value).tolist())
        return Mean(value, errors.ci95, errors.n)
    # Unpaired: the side with fewer repeats limits what the ratio can be trusted with.
    n = min(our_mean.n, their_mean.n)
    if our_mean.ci95 is None or their_mean.ci95 is None:
        return Mean(value, None, n)
    relative = math.hypot(our_mean.ci95 / our_mean.value, their_mean.ci95 / their_mean.value)
    return Mean(value, value * relative, n)


def percentiles(
    values: Sequence[float] | np.ndarray, percents: Sequence[int] = (10, 50, 90, 95)
) -> dict[int, float | None]:
    """Return percentiles with linear interpolation; all None if there are no values.

    >>> percentiles([1, 2, 3], [50])
    {50: 2.0}
    """
    if len(values) == 0:
        return dict.fromkeys(percents)
    at_percent = np.percentile(values, percents)
    return dict(zip(percents, at_percent.tolist(), strict=True))


class Change(NamedTuple):
    """The change of a mean, as a fraction of its earlier value."""

    ratio: float  # new / old
    low: float  # of the 95 % interval of the ratio
    high: float

    @property
    def is_lower(self) -> bool:
        return self.high < 1.0

    @property
    def is_higher(self) -> bool:
        return self.low > 1.0


def change(new: Mean, old: Mean, together: int = 1) -> Change | None:
    """Return new / old of two independent means.

    The interval is Welch's t on the first-order errors of the logarithms.

    Args:
        new: the mean now.
        old: the mean before.
        together: how many changes are looked at, whose intervals shall all hold with 95 %
            (Bonferroni).

    Returns:
        The change; None if one of the means has a single repeat, which says nothing about noise.
    """
    if new.ci95 is None or old.ci95 is None or new.value <= 0 or old.value <= 0:
        return None
    new_variance = _relative_error(new) ** 2
    old_variance = _relative_error(old) ** 2
    variance = new_variance + old_variance
    ratio = new.value / old.value
    # Repeats without any scatter: the formula below would divide 0 by 0.
    if variance == 0:
        return Change(ratio, ratio, ratio)
    # Welch and Satterthwaite: the side with the larger error decides the degrees of freedom.
    freedom = variance**2 / (new_variance**2 / (new.n - 1) + old_variance**2 / (old.n - 1))
    # 2.5 % on each side, divided by the number of changes (Bonferroni).
    half_width = _t(1 - 0.025 / together, freedom) * math.sqrt(variance)
    # Back from logarithms, in which half as fast and twice as fast are equally far from 1.
    return Change(ratio, ratio * math.exp(-half_width), ratio * math.exp(half_width))


def _relative_error(mean: Mean) -> float:
    """Return the standard error of a mean as a fraction of it."""
    assert mean.ci95 is not None
    # This undoes the factor by which ``mean`` widens a standard error to an interval.
    return mean.ci95 / _t(0.975, mean.n - 1) / mean.value
