"""The search for the latency and bandwidth that explain measurements, and for how well they do.

A handful of steps on two numbers of hosts nearly always has a best network, and rarely tells both
of its figures. So every figure is tested: the interval holds all values with which the best network
of that value explains the measurements hardly worse (a profile likelihood; Venzon and Moolgavkar
1988). A latency is known only if no latency at all explains them clearly worse.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from scaletrain.collectives.cost import Network
from scaletrain.scaling.predict.calibration import (
    MODEL_ERROR,
    NORMAL_975,
    Estimate,
    FittedNetwork,
)

# Where the search for a network begins (bytes/s), and where it ends (seconds; bytes/s).
_STARTS = (1e7, 1e8, 1e9, 1e10)
_START_LATENCY_S = 1e-4
_LATENCY_BOUNDS_S = (1e-8, 0.1)  # the least is as good as none
_BANDWIDTH_BOUNDS = (1e4, 1e12)
_LOWEST = np.log([_LATENCY_BOUNDS_S[0], _BANDWIDTH_BOUNDS[0]])
_HIGHEST = np.log([_LATENCY_BOUNDS_S[1], _BANDWIDTH_BOUNDS[1]])
# Residuals beyond 5 % weigh less than their square: an outlier is no reason to miss the others.
_OUTLIER = 0.05
SHARED_ERROR = 0.02  # of MODEL_ERROR, what all steps share, so that no residual shows it


class ModelError(NamedTuple):
    """How far measured steps are from the model, as a standard deviation of logarithms."""

    deviation: float
    quantile: float  # of the deviations that a 95 % interval reaches to, each way

    @classmethod
    def of(cls, errors: np.ndarray, freedom: int) -> "ModelError":
        """Return the error that residuals show, but no less than what they may hide.

        Args:
            errors: the residuals, logarithms.
            freedom: their number less that of the fitted figures.
        """
        shown = math.sqrt(float(np.square(errors).sum()) / freedom)
        # The deviation below which such residuals would be luck of one case in 20.
        possible = shown * math.sqrt(freedom / float(stats.chi2.ppf(0.05, freedom)))
        least = min(MODEL_ERROR, max(SHARED_ERROR, possible))
        by_residuals = cls(shown, float(stats.t.ppf(0.975, freedom)))
        by_model = cls(least, NORMAL_975)
        return max(by_residuals, by_model, key=lambda error: error.deviation * error.quantile)


_Vector = Callable[[np.ndarray], np.ndarray]  # logarithms of latency and bandwidth -> residuals


def best_network(residuals: Callable[[Network], list[float]]) -> FittedNetwork:
    """Fit latency and bandwidth, as logarithms since both are positive."""

    def vector(logs: np.ndarray) -> np.ndarray:
        return np.array(residuals(_network(logs)))

    # A search may end in a local minimum: it begins at several bandwidths, the best counts.
    results = []
    for start in _STARTS:
        begin = np.log([_START_LATENCY_S, start])
        results.append(_search(vector, begin))
    best = min(results, key=lambda result: result.cost)
    values = _network(best.x)
    freedom = len(best.fun) - len(best.x)
    # As many unknowns as measurements: the fit is exact and leaves no error to judge by.
    if freedom <= 0:
        return FittedNetwork(
            Estimate(values.latency_s, None, None),
            Estimate(values.bandwidth_bytes_per_s, None, None),
        )
    error = ModelError.of(vector(best.x), freedom)
    worse = (error.quantile * error.deviation) ** 2
    profile = _Profile(vector, best.x, 2 * best.cost + worse)
    ends = [profile.ends(0), profile.ends(1)]
    (least_latency, most_latency), (least_bandwidth, most_bandwidth) = ends
    plausible = [_network(end.logs) for pair in ends for end in pair]
    return FittedNetwork(
        Estimate(values.latency_s, least_latency.bound, most_latency.bound),
        Estimate(values.bandwidth_bytes_per_s, least_bandwidth.bound, most_bandwidth.bound),
        tuple(dict.fromkeys(plausible)),
    )


def _network(logs: np.ndarray) -> Network:
    """Return the network of the logarithms of its latency and bandwidth."""
    return Network(math.exp(logs[0]), math.exp(logs[1]))


def _search(vector: _Vector, begin: np.ndarray, fixed: int | None = None) -> Any:
    """Return the result of a least-squares search; its ``x`` holds both logarithms.

    Args:
        vector: the residuals.
        begin: where the search begins.
        fixed: the index of a logarithm that keeps its value; None: both are free.
    """
    free = [index for index in range(len(begin)) if index != fixed]

    def of_free(values: np.ndarray) -> np.ndarray:
        logs = begin.copy()
        logs[free] = values
        return vector(logs)

    result = optimize.least_squares(
        of_free,
        np.clip(begin[free], _LOWEST[free], _HIGHEST[free]),
        bounds=(_LOWEST[free], _HIGHEST[free]),
        loss="soft_l1",
        f_scale=_OUTLIER,
    )
    logs = begin.copy()
    logs[free] = result.x
    result.x = logs
    return result


class _End(NamedTuple):
    """An end of an interval."""

    bound: float | None  # the value there; None: the interval has no end on this side
    logs: np.ndarray  # of the network there


class _Profile:
    """The values of one figure that explain the measurements hardly worse than the best.

    Args:
        vector: the residuals.
        best: the logarithms that fit best.
        limit: the sum of squares beyond which an explanation is clearly worse.
    """

    def __init__(self, vector: _Vector, best: np.ndarray, limit: float):
        self._vector = vector
        self._best = best
        self._limit = limit

    def ends(self, index: int) -> tuple[_End, _End]:
        """Return both ends of the interval of one figure."""
        return self._end(index, _LOWEST[index]), self._end(index, _HIGHEST[index])

    def _end(self, index: int, bound: float) -> _End:
        """Return the end of the interval towards a bound of the search."""
        outermost = self._at(index, bound, self._best)
        if 2 * outermost.cost <= self._limit:
            return _End(None, outermost.x)
        # The end lies between the last value that is good enough and the first that is not. Steps
        # grow from 1 % on, then halve the distance.
        inside, outside = self._best, bound
        step = math.copysign(0.01, bound - self._best[index])
        while abs(outside - inside[index]) > max(
            0.01, 0.05 * abs(inside[index] - self._best[index])
        ):
            value = inside[index] + step
            if abs(value - inside[index]) >= abs(outside - inside[index]):
                value = (inside[index] + outside) / 2
            found = self._at(index, value, inside)
            if 2 * found.cost <= self._limit:
                inside = found.x
                step *= 2
            else:
                outside = value
        return _End(math.exp(inside[index]), inside)

    def _at(self, index: int, value: float, near: np.ndarray) -> Any:
        """Return the best fit with one logarithm fixed, searched from a point nearby."""
        begin = near.copy()
        begin[index] = value
        return _search(self._vector, begin, fixed=index)


def estimates_of(logs: np.ndarray, jacobian: np.ndarray, errors: np.ndarray) -> list[Estimate]:
    """Return fitted logarithms as values with their 95 % intervals.

    Args:
        logs: the fitted logarithms, shape (values,).
        jacobian: of the residuals, shape (measurements, values).
        errors: the residuals, shape (measurements,).
    """
    estimates = []
    for log, width in zip(logs, _half_widths(jacobian, errors), strict=True):
        if width is None or width > 50:  # exp(50) is 5e21: nothing is known
            estimates.append(Estimate(math.exp(log), None, None))
        else:
            estimates.append(Estimate(math.exp(log), math.exp(log - width), math.exp(log + width)))
    return estimates


def _half_widths(jacobian: np.ndarray, errors: np.ndarray) -> list[float | None]:
    """Return half of each logarithm's interval; None: the measurements do not tell the value."""
    measurements, values = jacobian.shape
    freedom = measurements - values
    # As many unknowns as measurements: the fit is exact and leaves no error to judge by.
    if freedom <= 0:
        return [None] * values
    variance = float(errors @ errors) / freedom
    with np.errstate(all="ignore"):
        # Not ``inv``: the matrix is singular where nothing depends on a value.
        covariance = np.linalg.pinv(jacobian.T @ jacobian) * variance
    quantile = float(stats.t.ppf(0.975, freedom))
    sensitivity = np.abs(jacobian).max(axis=0)
    widths: list[float | None] = []
    for index in range(values):
        # Where nothing depends on a value, ``pinv`` gives a variance of 0, as if it were certain.
        # Rounding may leave a variance just below 0.
        if sensitivity[index] > 1e-6:
            widths.append(quantile * math.sqrt(max(0.0, covariance[index, index])))
        else:
            widths.append(None)
    return widths
