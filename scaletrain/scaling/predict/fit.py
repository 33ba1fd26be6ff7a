"""Calibrate the models from measurements: computation from ``none``, the network from the others.

The network is fitted to the time that exchanges add. Residuals are kept, so that a reader can judge
the fit.

A handful of steps on two numbers of hosts nearly always has a best network, and rarely tells both
of its figures. So every figure is tested: the interval holds all values with which the best network
of that value explains the measurements hardly worse (a profile likelihood; Venzon and Moolgavkar
1988). A latency is known only if no latency at all explains them clearly worse. The networks at the
ends of the intervals are kept, and a prediction on which they disagree is refused
(``Fit.step_range``).
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from scaletrain import plugins
from scaletrain.collectives.cost import Network
from scaletrain.config.grammar import without_transport
from scaletrain.errors import UserError
from scaletrain.run.atomic import write_json
from scaletrain.scaling.model import Prediction, Report, Row
from scaletrain.scaling.predict import step_time
from scaletrain.scaling.predict.network import Fabric, Servers
from scaletrain.scaling.predict.step_time import ComputeCost, StepModel

FAR = 8  # times the measured workers; a prediction beyond that has to be asked for

# Where the search for a network begins (bytes/s), and where it ends (seconds; bytes/s).
_STARTS = (1e7, 1e8, 1e9, 1e10)
_START_LATENCY_S = 1e-4
_LATENCY_BOUNDS_S = (1e-8, 0.1)  # the least is as good as none
_BANDWIDTH_BOUNDS = (1e4, 1e12)
_LOWEST = np.log([_LATENCY_BOUNDS_S[0], _BANDWIDTH_BOUNDS[0]])
_HIGHEST = np.log([_LATENCY_BOUNDS_S[1], _BANDWIDTH_BOUNDS[1]])
_NORMAL_975 = 1.96  # quantile of the normal distribution
# Residuals beyond 5 % weigh less than their square: an outlier is no reason to miss the others.
_OUTLIER = 0.05
# What a server's process moves is part of the bandwidth that is fitted.
_AS_MEASURED = Servers(bytes_per_s=math.inf)
# By how much, as a standard deviation, the model of an exchange misses a step even if its network
# is right. A few residuals may agree better by luck, and would bound the network too narrowly.
MODEL_ERROR = 0.05
SHARED_ERROR = 0.02  # of that, what all steps share, so that no residual shows it
DECIDES = 1.5  # times from end to end: beyond that, what is not known decides a prediction


class Estimate(NamedTuple):
    """A fitted value with its 95 % interval.

    ``low`` is None if none at all explains the measurements as well, ``high`` if any large value
    does; both are None if there are too few measurements.
    """

    value: float
    low: float | None
    high: float | None

    @property
    def is_identified(self) -> bool:
        """True if the measurements tell the value, at least to a factor of ten each way."""
        # A factor of ten each way is a factor of 100 from end to end.
        return self.low is not None and self.high is not None and self.high <= 100 * self.low


class FittedNetwork(NamedTuple):
    """A network as a fit finds it.

    Attributes:
        latency_s: of each message.
        bandwidth_bytes_per_s: of each host's port.
        plausible: networks at the ends of both intervals, each the best of its latency or
            bandwidth; empty if the measurements are too few to judge.
    """

    latency_s: Estimate
    bandwidth_bytes_per_s: Estimate
    plausible: tuple[Network, ...] = ()

    @property
    def fabric(self) -> Fabric:
        """The network, for predictions."""
        return Fabric(Network(self.latency_s.value, self.bandwidth_bytes_per_s.value), "fitted")


class Fit(NamedTuple):
    """Calibrated models.

    Attributes:
        compute: a worker's computation.
        latency_s: of the network, for each message.
        bandwidth_bytes_per_s: of each host's port.
        overlap: communication hides behind backward.
        residuals: every measurement that was used, beside its prediction.
        max_workers: the largest number of workers in these measurements.
        plausible: networks that explain the measurements about as well (see ``FittedNetwork``).
        spread: how far from the model 95 % of the measured steps lie at most, as logarithms.
    """

    compute: ComputeCost
    latency_s: Estimate
    bandwidth_bytes_per_s: Estimate
    overlap: bool
    residuals: list[Prediction]
    max_workers: int
    plausible: tuple[Network, ...] = ()
    spread: float = _NORMAL_975 * MODEL_ERROR

    @property
    def fabric(self) -> Fabric:
        """The fitted network."""
        return FittedNetwork(self.latency_s, self.bandwidth_bytes_per_s).fabric

    @property
    def unidentified(self) -> list[str]:
        """The figures of the network that the measurements do not tell."""
        figures = {"latency": self.latency_s, "bandwidth": self.bandwidth_bytes_per_s}
        return [name for name, estimate in figures.items() if not estimate.is_identified]

    def fabric_or(self, assumed: Network) -> Fabric:
        """Return the fitted network, with figures of ``assumed`` that no measurement tells."""
        latency_s = self.latency_s.value
        bandwidth = self.bandwidth_bytes_per_s.value
        if not self.latency_s.is_identified:
            latency_s = assumed.latency_s
        if not self.bandwidth_bytes_per_s.is_identified:
            bandwidth = assumed.bandwidth_bytes_per_s
        return Fabric(Network(latency_s, bandwidth), "fitted")

    def step_range(self, step_s: Callable[[Fabric], float]) -> tuple[float, float]:
        """Return the shortest and the longest step that the measurements leave possible.

        Args:
            step_s: predicts a step on a network.
        """
        steps = [step_s(self.fabric)]
        for network in self.plausible:
            steps.append(step_s(Fabric(network, "")))
        return min(steps), max(steps)

    def interval(self, step_s: Callable[[Fabric], float]) -> tuple[float, float]:
        """Return the 95 % interval of a step that is going to be measured.

        It holds what is not known of the network and how far steps are from the model.
        """
        best = step_s(self.fabric)
        low, high = self.step_range(step_s)
        # As errors of the logarithm, independent of each other.
        below = math.hypot(math.log(best / low), self.spread)
        above = math.hypot(math.log(high / best), self.spread)
        return best * math.exp(-below), best * math.exp(above)

    @property
    def error(self) -> float:
        """Root of the mean squared residual, as a fraction."""
        squares = sum(residual.error**2 for residual in self.residuals)
        return math.sqrt(squares / len(self.residuals))

    def check_reach(self, workers: int, far: bool) -> None:
        """Check that so many workers may be predicted.

        Raises:
            UserError: they are more than ``FAR`` times the measured ones, and ``far`` is False.
        """
        if workers > FAR * self.max_workers and not far:
            raise UserError(
                f"--workers: {workers} is more than {FAR} times the {self.max_workers} that were"
                f" measured (allowed: up to {FAR * self.max_workers}, or --far)"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the fit as JSON holds it."""
        return {
            "compute": self.compute._asdict(),
            "latency_s": self.latency_s._asdict(),
            "bandwidth_bytes_per_s": self.bandwidth_bytes_per_s._asdict(),
            "overlap": self.overlap,
            "max_workers": self.max_workers,
            "plausible": [[at.latency_s, at.bandwidth_bytes_per_s] for at in self.plausible],
            "spread": self.spread,
            "residuals": [residual.to_json() for residual in self.residuals],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Fit":
        """Return the fit that ``to_json`` wrote.

        Raises:
            KeyError, TypeError: the value is no fit.
        """
        return cls(
            compute=ComputeCost(**value["compute"]),
            latency_s=Estimate(**value["latency_s"]),
            bandwidth_bytes_per_s=Estimate(**value["bandwidth_bytes_per_s"]),
            overlap=value["overlap"],
            residuals=[Prediction.from_json(residual) for residual in value["residuals"]],
            max_workers=value["max_workers"],
            plausible=tuple(Network(*figures) for figures in value.get("plausible", ())),
            spread=value.get("spread", _NORMAL_975 * MODEL_ERROR),
        )


@dataclasses.dataclass(frozen=True)
class Calibration:
    """A fit and the job that it was made from: the content of ``fit.json``."""

    fit: Fit
    num_bytes: float  # of the gradients
    batch_size: int

    def write(self, path: Path) -> None:
        """Write the calibration as JSON."""
        job = {"num_bytes": self.num_bytes, "batch_size": self.batch_size}
        write_json(path, self.fit.to_json() | job)

    @classmethod
    def read(cls, path: Path) -> "Calibration":
        """Read a file that ``write`` has written.

        Raises:
            UserError: it is some other file.
        """
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            return cls(Fit.from_json(value), value["num_bytes"], value["batch_size"])
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"--fit {path}: no calibration"
                " (allowed: what `scaletrain fit` wrote, such as fit.json)"
            ) from None


class Timing(NamedTuple):
    """One measured exchange; ``strategy`` as ``step_time.exchange_s`` takes it."""

    strategy: str
    workers: int
    num_bytes: float
    seconds: float


def fit_exchanges(timings: Sequence[Timing]) -> FittedNetwork:
    """Return the network that explains pure exchanges best.

    The sum of the squared differences of the logarithms is least, so a residual is relative.
    """

    def residuals(network: Network) -> list[float]:
        fabric = Fabric(network, "")
        errors = []
        for timing in timings:
            # One worker exchanges nothing: its predicted 0 s has no logarithm.
            if timing.workers > 1:
                predicted_s = step_time.exchange_s(
                    timing.strategy, timing.workers, timing.num_bytes, fabric, _AS_MEASURED
                )
                errors.append(math.log(predicted_s / timing.seconds))
        return errors

    return _least_squares(residuals)


class _ModelError(NamedTuple):
    """How far measured steps are from the model, as a standard deviation of logarithms."""

    deviation: float
    quantile: float  # of the deviations that a 95 % interval reaches to, each way

    @classmethod
    def of(cls, errors: np.ndarray, freedom: int) -> "_ModelError":
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
        by_model = cls(least, _NORMAL_975)
        return max(by_residuals, by_model, key=lambda error: error.deviation * error.quantile)


_Vector = Callable[[np.ndarray], np.ndarray]  # logarithms of latency and bandwidth -> residuals


def _least_squares(residuals: Callable[[Network], list[float]]) -> FittedNetwork:
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
    error = _ModelError.of(vector(best.x), freedom)
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


def fit_compute(rows: Sequence[Row]) -> ComputeCost:
    """Return the computation of one worker, from its runs with ``none``.

    Two or more batch sizes tell the seconds a sample and a step. One batch size tells only their
    sum, which then counts as seconds a sample.

    Raises:
        UserError: there are no rows.
    """
    if not rows:
        raise UserError(
            "fit: the report has no run of one worker with the exchange none"
            " (measure none, or with --split)"
        )
    batch_sizes = [row.batch_size for row in rows]
    passes_s = [
        _figure(row.forward_s) + _figure(row.backward_s) + _figure(row.input_s) for row in rows
    ]
    update_s = float(np.mean([_figure(row.update_s) for row in rows]))
    if len(set(batch_sizes)) == 1:
        return ComputeCost(passes_s[0] / batch_sizes[0], 0.0, update_s)
    # Least squares of passes_s = sample_s * batch_size + fixed_s.
    lines = np.column_stack([batch_sizes, np.ones(len(batch_sizes))])
    (sample_s, fixed_s), _ = optimize.nnls(lines, np.array(passes_s))  # neither is negative
    return ComputeCost(float(sample_s), float(fixed_s), update_s)


def _figure(value: float | None) -> float:
    """Return a figure of a row that has runs, where it is known."""
    assert value is not None
    return value


def strategy_of(exchange: str) -> str | None:
    """Return the strategy that models an exchange; None if no model does.

    >>> strategy_of("ring@gloo"), strategy_of("native"), strategy_of("parameter_server:async")
    ('ring', 'ring', None)

    Args:
        exchange: the label of an exchange, as in a row of a report.
    """
    name = without_transport(exchange)
    if name in ("native", "horovod", "scheduled"):
        return "ring"
    if name in ("parameter_server", "parameter_server:sync"):
        return "server"
    return name if name in plugins.names("collective") else None


class _ExchangeStep(NamedTuple):
    """A measured step of several workers, whose exchange has a model."""

    row: Row
    strategy: str
    measured_s: float
    alone: ComputeCost | None  # of the same workers without an exchange; None: not measured

    def predicted_s(self, model: StepModel) -> float:
        """Return the step that a model predicts.

        Where the same workers were measured without an exchange, that computation is taken. It
        shows how the workers slow each other down on shared cores, which the model does not know.
        """
        if self.alone is not None:
            model = dataclasses.replace(model, compute=self.alone)
        workers = self.row.workers
        return model.step_s(self.strategy, workers, self.row.batch_size / workers)


def _exchange_steps(rows: Sequence[Row], measured: Sequence[Row]) -> list[_ExchangeStep]:
    """Return the steps of ``rows`` that have a model; ``measured`` may hold their runs alone."""
    alone = {}
    for row in measured:
        if row.exchange == "none":
            update_s = _figure(row.update_s)
            # All of it fixed: the key has the batch, so it is used for this batch only.
            alone[_job(row)] = ComputeCost(0.0, _figure(row.step_s_mean) - update_s, update_s)
    steps = []
    for row in rows:
        strategy = strategy_of(row.exchange)
        if row.workers > 1 and strategy:
            measured_s = _figure(row.step_s_mean)
            steps.append(_ExchangeStep(row, strategy, measured_s, alone.get(_job(row))))
    return steps


def _job(row: Row) -> tuple[str, int, int, str]:
    """Return a key of the rows that differ from each other in their exchange only."""
    return row.config, row.workers, row.batch_size, str(row.variant)


def _with_runs(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row.runs]


def fit_report(
    report: Report, num_bytes: float, overlap: bool = True, max_workers: int | None = None
) -> Fit:
    """Calibrate from a scaling report.

    Args:
        report: rows and short references.
        num_bytes: size of the gradients.
        overlap: whether communication hides behind backward.
        max_workers: use only rows up to there, so that the others test the prediction.

    Raises:
        UserError: the report holds nothing to calibrate from.
    """
    # References first: in ``_exchange_steps``, the long row of a job replaces the short one.
    used = _with_runs([*report.references, *report.rows])
    if max_workers is not None:
        used = [row for row in used if row.workers <= max_workers]
    compute = fit_compute([row for row in used if row.exchange == "none" and row.workers == 1])
    steps = _exchange_steps(used, used)
    if not steps:
        raise UserError(
            "fit: no exchange between several workers in the report has a model"
            " (collectives, native, parameter_server)"
        )

    def residuals(network: Network) -> list[float]:
        model = StepModel(num_bytes, compute, Fabric(network, ""), overlap, servers=_AS_MEASURED)
        # Logarithms of ratios: short steps weigh as much as long ones.
        return [math.log(step.predicted_s(model) / step.measured_s) for step in steps]

    network = _least_squares(residuals)
    fitted = Fit(
        compute=compute,
        latency_s=network.latency_s,
        bandwidth_bytes_per_s=network.bandwidth_bytes_per_s,
        overlap=overlap,
        residuals=[],
        max_workers=max(row.workers for row in used),
        plausible=network.plausible,
    )
    # Residuals are the finished fit's own predictions, so they come last.
    # The spread is part of their intervals, so it comes before them.
    errors = np.array(residuals(fitted.fabric.network))
    # Latency and bandwidth have taken two.
    error = _ModelError.of(errors, max(1, len(errors) - 2))
    fitted = fitted._replace(spread=error.quantile * error.deviation)
    return fitted._replace(residuals=_predicted(fitted, steps, num_bytes))


def best_fit(report: Report, num_bytes: float, max_workers: int | None = None) -> Fit:
    """Calibrate once as if communication hid behind backward, once as if it did not.

    The measurements tell which of the two it was: the better fit is returned. Arguments and errors
    are those of ``fit_report``.
    """
    hidden = fit_report(report, num_bytes, overlap=True, max_workers=max_workers)
    exposed = fit_report(report, num_bytes, overlap=False, max_workers=max_workers)
    return min(hidden, exposed, key=lambda fit: fit.error)


def for_other_workers(fitted: Fit, report: Report, num_bytes: float) -> Fit:
    """Return a fit whose intervals hold for numbers of workers that were not measured.

    A measured row is predicted from the computation of the same workers without an exchange. For
    other workers there is none, and the computation of one worker has to do. What that misses at
    the measured rows becomes part of the spread: cores that workers share, for example.

    Args:
        fitted: the calibrated models.
        report: rows of several workers.
        num_bytes: size of the gradients.
    """
    model = step_model(fitted, num_bytes, fitted.fabric)
    errors = []
    # Without runs of the workers alone, their computation is the model's.
    for step in _exchange_steps(_with_runs(report.rows), []):
        errors.append(math.log(step.predicted_s(model) / step.measured_s))
    error = _ModelError.of(np.array(errors), max(1, len(errors) - 2))
    return fitted._replace(spread=max(fitted.spread, error.quantile * error.deviation))


def alike_but_for_exchange(rows: Sequence[Row]) -> bool:
    """Return True if one calibration can hold for all rows.

    They are then of one job on one network: of one config, one variant and one model.
    """
    jobs = {(row.config, str(row.variant), row.gradient_bytes) for row in rows}
    return len(jobs) == 1


def predictions(fitted: Fit, report: Report, num_bytes: float) -> list[Prediction]:
    """Return measured and predicted steps of every row of several workers that has a model.

    Args:
        fitted: the calibrated models.
        report: rows, and references for the computation of the same workers.
        num_bytes: size of the gradients.
    """
    measured = _with_runs([*report.references, *report.rows])
    steps = _exchange_steps(_with_runs(report.rows), measured)
    return _predicted(fitted, steps, num_bytes)


def step_model(fitted: Fit, num_bytes: float, fabric: Fabric) -> StepModel:
    """Return the model of a step on a network, which may be one of the plausible ones."""
    return StepModel(num_bytes, fitted.compute, fabric, fitted.overlap, servers=_AS_MEASURED)


def _predicted(fitted: Fit, steps: Sequence[_ExchangeStep], num_bytes: float) -> list[Prediction]:
    return [_prediction(fitted, step, num_bytes) for step in steps]


def _prediction(fitted: Fit, step: _ExchangeStep, num_bytes: float) -> Prediction:
    def step_s(fabric: Fabric) -> float:
        return step.predicted_s(step_model(fitted, num_bytes, fabric))

    low_s, high_s = fitted.interval(step_s)
    return Prediction(
        exchange=step.row.exchange,
        workers=step.row.workers,
        measured_s=step.measured_s,
        predicted_s=step_s(fitted.fabric),
        in_fit=step.row.workers <= fitted.max_workers,
        low_s=low_s,
        high_s=high_s,
    )
