"""Means with their confidence intervals, and ratios of them. Small samples: Student's t, never 1.96 standard deviations."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

ONE_RUN = "single runs: no interval"
MANY = 30  # repeats, beyond which nobody is asked to go


class Mean(NamedTuple):
    """The mean of independent repeats and half the width of its 95 % confidence interval (None: one repeat tells nothing)."""

    value: float
    ci95: float | None
    n: int

    @property
    def low(self) -> float:
        return self.value - (self.ci95 or 0.0)

    @property
    def high(self) -> float:
        return self.value + (self.ci95 or 0.0)


def mean(values: Sequence[float]) -> Mean:
    """The t-interval of the mean over repeats: t(0.975, n - 1) s / sqrt(n). ``values`` must not be empty."""
    n = len(values)
    if n < 2:
        return Mean(float(values[0]), None, n)
    return Mean(statistics.fmean(values), _half_width(n) * statistics.stdev(values), n)


def _half_width(n: int) -> float:
    """Of the interval of a mean of ``n`` values, in their standard deviations."""
    return float(stats.t.ppf(0.975, n - 1)) / math.sqrt(n)


def enough(n: int, ci95: float, wanted: float) -> int | None:
    """How many repeats bring an interval of ``n`` (at least 2) down to ``wanted``, if they scatter as these did; None: more than ``MANY``."""
    return next(
        (m for m in range(n + 1, MANY + 1) if ci95 * _half_width(m) <= wanted * _half_width(n)),
        None,
    )


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Mean:
    """The ratio of two means, so that it fits the means it stands beside, with its 95 % interval to first order.

    Values at the same place belong together (they were measured close to each other): what they share cancels. Where one side has
    more repeats they are independent, and the relative errors add up as squares.
    """
    value = statistics.fmean(ours) / statistics.fmean(theirs)
    if len(ours) == len(theirs):
        rest = mean(
            [(a - value * b) / statistics.fmean(theirs) for a, b in zip(ours, theirs, strict=True)]
        )
        return Mean(value, rest.ci95, rest.n)
    a, b = mean(ours), mean(theirs)
    ci95 = (
        None
        if a.ci95 is None or b.ci95 is None
        else value * math.hypot(a.ci95 / a.value, b.ci95 / b.value)
    )
    return Mean(value, ci95, min(a.n, b.n))


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
    """By how much a mean changed, as a fraction of what it was, with the 95 % interval of that fraction."""

    ratio: float  # new / old
    low: float
    high: float

    @property
    def is_lower(self) -> bool:
        return self.high < 1.0

    @property
    def is_higher(self) -> bool:
        return self.low > 1.0


def change(new: Mean, old: Mean, together: int = 1) -> Change | None:
    """new / old of two independent means, by Welch's t on the logarithms' first-order errors. ``together``: of so many changes that are
    looked at, whose intervals shall all hold with 95 % (Bonferroni).

    None when one of them has a single repeat: nothing can then be said about noise.
    """
    if new.ci95 is None or old.ci95 is None or new.value <= 0 or old.value <= 0:
        return None
    errors = [m.ci95 / float(stats.t.ppf(0.975, m.n - 1)) / m.value for m in (new, old)]  # type: ignore[operator]
    variance = errors[0] ** 2 + errors[1] ** 2
    ratio = new.value / old.value
    if variance == 0:
        return Change(ratio, ratio, ratio)
    freedom = variance**2 / (errors[0] ** 4 / (new.n - 1) + errors[1] ** 4 / (old.n - 1))
    half = float(stats.t.ppf(1 - 0.025 / together, freedom)) * math.sqrt(variance)
    return Change(ratio, ratio * math.exp(-half), ratio * math.exp(half))
