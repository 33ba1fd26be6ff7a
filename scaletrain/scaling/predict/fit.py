"""Calibrate the models from measurements: computation from ``none``, the network from the others.

The network is fitted to the time that exchanges add. Residuals are kept, so that a reader can judge
the fit.
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
_LATENCY_BOUNDS_S = (1e-7, 0.1)
_BANDWIDTH_BOUNDS = (1e4, 1e12)
# Residuals beyond 5 % weigh less than their square: an outlier is no reason to miss the others.
_OUTLIER = 0.05
# What a server's process moves is part of the bandwidth that is fitted.
_AS_MEASURED = Servers(bytes_per_s=math.inf)


class Estimate(NamedTuple):
    """A fitted value with its 95 % interval.

    ``low`` and ``high`` are None if there are too few measurements, or if they do not depend on the
    value.
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
    """A network as a fit finds it."""

    latency_s: Estimate
    bandwidth_bytes_per_s: Estimate

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
    """

    compute: ComputeCost
    latency_s: Estimate
    bandwidth_bytes_per_s: Estimate
    overlap: bool
    residuals: list[Prediction]
    max_workers: int

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


def _least_squares(residuals: Callable[[Network], list[float]]) -> FittedNetwork:
    """Fit latency and bandwidth, as logarithms since both are positive.

    Intervals come from the Jacobian where freedom is left. A figure that the measurements do not
    tell (the latency, if all messages are large) ends anywhere or at a bound, and has no interval.
    """

    def vector(logs: np.ndarray) -> np.ndarray:
        latency_s = float(np.exp(logs[0]))
        bandwidth = float(np.exp(logs[1]))
        return np.array(residuals(Network(latency_s, bandwidth)))

    lowest = [math.log(_LATENCY_BOUNDS_S[0]), math.log(_BANDWIDTH_BOUNDS[0])]
    highest = [math.log(_LATENCY_BOUNDS_S[1]), math.log(_BANDWIDTH_BOUNDS[1])]
    # A search may end in a local minimum: it begins at several bandwidths, the best counts.
    results = []
    for start in _STARTS:
        results.append(
            optimize.least_squares(
                vector,
                [math.log(_START_LATENCY_S), math.log(start)],
                bounds=(lowest, highest),
                loss="soft_l1",
                f_scale=_OUTLIER,
            )
        )
    best = min(results, key=lambda result: result.cost)
    estimates = estimates_of(best.x, best.jac, vector(best.x))
    to_nearest_bound = np.minimum(best.x - lowest, highest - best.x)
    for index, distance in enumerate(to_nearest_bound):
        # In logarithms, so within 1 % of a bound: the bound has decided, not the measurements.
        if distance < 0.01:
            estimates[index] = Estimate(estimates[index].value, None, None)
    return FittedNetwork(*estimates)


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
    )
    # Residuals are the finished fit's own predictions, so they come last.
    return fitted._replace(residuals=_predicted(fitted, steps, num_bytes))


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


def _predicted(fitted: Fit, steps: Sequence[_ExchangeStep], num_bytes: float) -> list[Prediction]:
    model = StepModel(
        num_bytes, fitted.compute, fitted.fabric, fitted.overlap, servers=_AS_MEASURED
    )
    results = []
    for step in steps:
        results.append(
            Prediction(
                exchange=step.row.exchange,
                workers=step.row.workers,
                measured_s=step.measured_s,
                predicted_s=step.predicted_s(model),
                in_fit=step.row.workers <= fitted.max_workers,
            )
        )
    return results
