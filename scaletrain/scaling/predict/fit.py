"""Calibrate the models from measurements: computation from ``none``, the network from the others.

The network is fitted to the time that exchanges add (``search``). Residuals are kept, so that a
reader can judge the fit.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize

from scaletrain import plugins
from scaletrain.collectives.cost import Network
from scaletrain.config.grammar import without_transport
from scaletrain.errors import UserError
from scaletrain.scaling.model import Prediction, Report, Row
from scaletrain.scaling.predict import step_time
from scaletrain.scaling.predict.calibration import Fit, FittedNetwork
from scaletrain.scaling.predict.network import Fabric, Servers
from scaletrain.scaling.predict.search import ModelError, best_network
from scaletrain.scaling.predict.step_time import ComputeCost, StepModel

# What a server's process moves is part of the bandwidth that is fitted.
_AS_MEASURED = Servers(bytes_per_s=math.inf)


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

    return best_network(residuals)


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

    network = best_network(residuals)
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
    error = ModelError.of(errors, max(1, len(errors) - 2))
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
    error = ModelError.of(np.array(errors), max(1, len(errors) - 2))
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
