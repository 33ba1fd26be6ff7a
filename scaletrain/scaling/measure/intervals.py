"""Typical values of repeats with their confidence intervals, and ratios of them.

Samples are small: intervals are Student's t, never 1.96 standard deviations.

Some repeats are disturbed: another job wakes up, a disk stalls. Their mean is then a figure that
hardly any repeat has, and its interval does not hold: in 59 % of the samples of five, none of one
run in ten that are slow is there. So the figure of repeats is that of the undisturbed ones
(``typical``), and reports list the others. Coverage, false alarms and power were simulated:
``benchmarks/results/statistics.md``.
"""

import functools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import integrate, stats

ONE_RUN = "single runs: no interval"
MANY = 30  # repeats, more than which no report asks for

# A value further from the median than so many scaled deviations (1.4826 times the median of the
# absolute ones) is outlying, by the number of values. One sample in 100 without any disturbance
# has such a value: the 99 % points of a million normal samples. Fewer values know their scale less.
_OUTLYING = {
    3: 113.0, 4: 16.0, 5: 18.5, 6: 10.1, 7: 10.8, 8: 8.0, 9: 8.3, 10: 6.9, 12: 6.3, 15: 6.0, 20: 5.2, 30: 4.8
}  # fmt: skip
_SCALED = 1.4826  # makes the median deviation of normal values their standard deviation
# A value this near to the median is never outlying, whatever the scale: repeats may agree so well
# that a harmless 1 % looks far away.
_NEAR = 0.03

SESSION = 0.01  # standard deviation of the speed of a machine from one session to another


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


def typical(values: Sequence[float]) -> Mean:
    """Return the mean of the repeats that are not outlying, with its interval.

    This is the metrically trimmed mean (Bickel 1965): without outliers, the mean itself.

    Args:
        values: of the repeats, at least one.

    >>> typical([100.0, 101.0, 99.0, 100.5, 60.0]).value
    100.125
    """
    marks = outlying(values)
    return mean([value for value, out in zip(values, marks, strict=True) if not out])


def outlying(values: Sequence[float]) -> list[bool]:
    """Return for each value whether it is too far from the median to be of the same kind.

    Two values cannot say which of them is the disturbed one.

    >>> outlying([100.0, 101.0, 99.0, 100.5, 60.0])
    [False, False, False, False, True]
    """
    n = len(values)
    if n < 3:
        return [False] * n
    array = np.asarray(values, dtype=float)
    centre = np.median(array)
    distances = np.abs(array - centre)
    limit = _outlying_from(n) * _SCALED * float(np.median(distances))
    limit = max(limit, _NEAR * abs(float(centre)))
    return [bool(distance > limit) for distance in distances]


def _outlying_from(n: int) -> float:
    """Return from how many scaled deviations on one of ``n`` values is outlying."""
    return float(np.interp(n, list(_OUTLYING), list(_OUTLYING.values())))


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
    """Return the ratio of two typical values, with its interval to first order.

    It is the ratio of the means, not the mean of ratios, so that it fits the means beside it.
    Values at the same position were measured close to each other: drifts that they share cancel.
    Where one side has more repeats, they are independent and the relative errors add up as squares.
    """
    our_mean, their_mean = typical(ours), typical(theirs)
    value = our_mean.value / their_mean.value
    if len(ours) == len(theirs):
        # To first order, the error of a / b is (da - a / b * db) / b. Each pair of repeats gives
        # one such error; drifts that both share cancel in it.
        pairs = undisturbed_pairs(ours, theirs)
        if not pairs:
            return Mean(value, None, 0)
        errors = mean([(our - value * their) / their_mean.value for our, their in pairs])
        return Mean(value, errors.ci95, errors.n)
    # Unpaired: the side with fewer repeats limits what the ratio can be trusted with.
    n = min(our_mean.n, their_mean.n)
    if our_mean.ci95 is None or their_mean.ci95 is None:
        return Mean(value, None, n)
    relative = math.hypot(our_mean.ci95 / our_mean.value, their_mean.ci95 / their_mean.value)
    return Mean(value, value * relative, n)


def undisturbed_pairs(ours: Sequence[float], theirs: Sequence[float]) -> list[tuple[float, float]]:
    """Return the pairs of values at the same position of which neither is outlying."""
    pairs = []
    marks = zip(ours, theirs, outlying(ours), outlying(theirs), strict=True)
    for our, their, our_out, their_out in marks:
        if not our_out and not their_out:
            pairs.append((our, their))
    return pairs


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


def change(new: Mean, old: Mean, together: int = 1, session: float = 0.0) -> Change | None:
    """Return new / old of two independent means.

    The interval is Welch's t on the first-order errors of the logarithms.

    Args:
        new: the mean now.
        old: the mean before.
        together: how many changes are looked at, whose intervals shall all hold with 95 %
            (Bonferroni).
        session: the standard deviation, as a fraction, by which a machine is faster or slower in
            one session than in another. No number of repeats within a session shows it.

    Returns:
        The change; None if one of the means has a single repeat, which says nothing about noise.
    """
    if new.ci95 is None or old.ci95 is None or new.value <= 0 or old.value <= 0:
        return None
    new_variance = _relative_error(new) ** 2
    old_variance = _relative_error(old) ** 2
    variance = new_variance + old_variance + 2 * session**2
    ratio = new.value / old.value
    # Repeats without any scatter: the formula below would divide 0 by 0.
    if new_variance + old_variance == 0:
        freedom = math.inf
    else:
        # Welch and Satterthwaite: the side with the larger error decides the degrees of freedom.
        # The sessions' part is known, and takes none.
        freedom = variance**2 / (new_variance**2 / (new.n - 1) + old_variance**2 / (old.n - 1))
    return _change(ratio, math.sqrt(variance), freedom, together)


def paired_change(new: Sequence[float], old: Sequence[float], together: int = 1) -> Change | None:
    """Return new / old of repeats that ran in turns.

    Repeats at the same position ran one after the other, so what the machine did to both cancels.

    Args:
        new: values now.
        old: values before, as many.
        together: as for ``change``.

    Returns:
        The change; None if fewer than two pairs are undisturbed.
    """
    logs = [math.log(ours / theirs) for ours, theirs in undisturbed_pairs(new, old)]
    if len(logs) < 2:
        return None
    error = statistics.stdev(logs) / math.sqrt(len(logs))
    return _change(math.exp(statistics.fmean(logs)), error, len(logs) - 1, together)


def _change(ratio: float, error: float, freedom: float, together: int) -> Change:
    """Return a ratio with its interval.

    Args:
        ratio: new / old.
        error: the standard error of its logarithm.
        freedom: the degrees of freedom that the error is known with.
        together: how many changes shall hold together.
    """
    # 2.5 % on each side, divided by the number of changes (Bonferroni).
    half_width = _t(1 - 0.025 / together, freedom) * error
    # Back from logarithms, in which half as fast and twice as fast are equally far from 1.
    return Change(ratio, ratio * math.exp(-half_width), ratio * math.exp(half_width))


POWER = 0.8  # the share of the comparisons in which a change shall be seen


def repeats_to_see(
    amount: float, deviation: float, *, together: int = 1, session: float | None = None
) -> int | None:
    """Return how many repeats of each side show a slowdown in ``POWER`` of the comparisons.

    Args:
        amount: the slowdown as a fraction, such as 0.02.
        deviation: the standard deviation of a repeat, as a fraction of the mean.
        together: how many cells are compared (see ``change``).
        session: as for ``change``. None: both sides run in turns (``paired_change``).

    Returns:
        The number of repeats; None if it is more than ``MANY``.
    """
    for repeats in range(2, MANY + 1):
        if chance_to_see(amount, deviation, repeats, together=together, session=session) >= POWER:
            return repeats
    return None


def chance_to_see(
    amount: float,
    deviation: float,
    repeats: int,
    *,
    together: int = 1,
    session: float | None = None,
) -> float:
    """Return the probability that a slowdown is seen, by the noncentral t distribution.

    Args:
        amount: the slowdown as a fraction.
        deviation: the standard deviation of a repeat, as a fraction of the mean.
        repeats: of each side.
        together: how many cells are compared.
        session: as for ``repeats_to_see``.
    """
    noise = 2 * deviation**2 / repeats
    freedom: float = repeats - 1
    variance = noise
    if session is not None:
        variance = noise + 2 * session**2
        # As in ``change``: each side has half of the noise.
        freedom = 2 * (repeats - 1) * (variance / max(noise, 1e-300)) ** 2
    if variance == 0:
        return 1.0
    needed = _t(1 - 0.025 / together, freedom)
    shift = -math.log1p(-amount) / math.sqrt(variance)
    return float(stats.nct.sf(needed, min(freedom, 1e6), shift))


def luck(means: Sequence[Mean]) -> float:
    """Return by which part the largest of some means is too large, if all are really equal.

    Whoever is fastest of several that cannot be told apart was also lucky: its mean exceeds the
    true value by the expected maximum of as many standard errors.

    Args:
        means: of the largest and its rivals; those of single repeats do not count.
    """
    errors = [_relative_error(each) for each in means if each.ci95 is not None]
    if len(errors) < 2:
        return 0.0
    return _expected_maximum(len(errors)) * math.sqrt(statistics.fmean(e * e for e in errors))


@functools.cache
def _expected_maximum(n: int) -> float:
    """Return the mean of the largest of ``n`` standard normal values."""

    def density(x: float) -> float:
        return float(x * n * stats.norm.pdf(x) * stats.norm.cdf(x) ** (n - 1))

    return float(integrate.quad(density, -10, 10)[0])


def _relative_error(mean: Mean) -> float:
    """Return the standard error of a mean as a fraction of it."""
    return relative_deviation(mean) / math.sqrt(mean.n)


def relative_deviation(mean: Mean) -> float:
    """Return the standard deviation of the repeats behind a mean, as a fraction of it.

    Args:
        mean: of at least two repeats.
    """
    assert mean.ci95 is not None
    # The interval was the deviation times this factor: dividing gives the deviation back.
    return mean.ci95 / _half_width(mean.n) / mean.value
