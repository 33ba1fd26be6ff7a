"""Calibrate the models from measurements: computation from ``none``, the network from the others.

The network is fitted to the time that exchanges add (``search``). Residuals are kept, so that a
reader can judge the fit.

Where several workers share a host and some rows lie on several hosts, there are two levels: rows on
one host tell the link between its workers, and the others tell the network. Without rows on one
host, that link may be anything from as fast as a port to infinitely fast. Networks that fit with
either are plausible, and where they disagree about a prediction it is refused.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize

from scaletrain import plugins
from scaletrain.collectives.cost import Link, Network
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
# Links inside hosts that are tried where no row tells: so many times as fast as the port, or ideal.
_FASTER_INSIDE = (2, 4, 16)
_IDEAL_LINK = Link(0.0, 1e15)


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
    per_host: int = 1  # workers; 1 also where all rows lie on one host, which is one level

    @property
    def is_on_one_host(self) -> bool:
        """True if it tells nothing of the network between hosts."""
        return self.per_host >= self.row.workers

    def predicted_s(self, model: StepModel) -> float:
        """Return the step that a model predicts.

        Where the same workers were measured without an exchange, that computation is taken. It
        shows how the workers slow each other down on shared cores, which the model does not know.
        """
        if self.alone is not None:
            model = dataclasses.replace(model, compute=self.alone)
        fabric = dataclasses.replace(model.fabric, workers_per_host=self.per_host)
        model = dataclasses.replace(model, fabric=fabric)
        workers = self.row.workers
        return model.step_s(self.strategy, workers, self.row.batch_size / workers)


def workers_per_host(report: Report) -> list[int]:
    """Return how many workers shared a host in rows on several hosts; [1] if there are none."""
    numbers = set()
    for row in _with_runs([*report.references, *report.rows]):
        hosts = report.hosts(row)
        if len(hosts) > 1:
            numbers.add(max(hosts.values()))
    return sorted(numbers) or [1]


def _exchange_steps(
    report: Report, rows: Sequence[Row], measured: Sequence[Row]
) -> list[_ExchangeStep]:
    """Return the steps of ``rows`` that have a model; ``measured`` may hold their runs alone."""
    has_two_levels = max(workers_per_host(report)) > 1
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
            per_host = 1
            if has_two_levels:
                per_host = max([1, *report.hosts(row).values()])
            steps.append(_ExchangeStep(row, strategy, measured_s, alone.get(_job(row)), per_host))
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
    steps = _exchange_steps(report, used, used)
    if not steps:
        raise UserError(
            "fit: no exchange between several workers in the report has a model"
            " (collectives, native, parameter_server)"
        )
    measured = _Measured(compute, num_bytes, overlap, steps)
    network, local = measured.network()
    fitted = Fit(
        compute=compute,
        latency_s=network.latency_s,
        bandwidth_bytes_per_s=network.bandwidth_bytes_per_s,
        overlap=overlap,
        residuals=[],
        max_workers=max(row.workers for row in used),
        plausible=network.plausible,
        workers_per_host=workers_per_host(report)[-1],
        local=local,
    )
    # Residuals are the finished fit's own predictions, so they come last.
    # The spread is part of their intervals, so it comes before them.
    errors = np.array(measured.residuals(steps, fitted.fabric.network, local))
    # Latency and bandwidth have taken two.
    error = ModelError.of(errors, max(1, len(errors) - 2))
    fitted = fitted._replace(spread=error.quantile * error.deviation)
    return fitted._replace(residuals=_predicted(fitted, steps, num_bytes))


class _Measured(NamedTuple):
    """The steps that a network is fitted to, and what is known about their job."""

    compute: ComputeCost
    num_bytes: float
    overlap: bool
    steps: Sequence[_ExchangeStep]

    def network(self) -> tuple[FittedNetwork, Link | None]:
        """Return the network that explains the steps best, and the link inside its hosts.

        The link is None where every worker has a host of its own, or it is as fast as the port.
        """
        if all(step.per_host == 1 for step in self.steps):
            return self._fitted(self.steps, None), None
        between = [step for step in self.steps if not step.is_on_one_host]
        inside = [step for step in self.steps if step.is_on_one_host]
        if not between:
            raise UserError(
                "fit: rows up to --max-workers lie on one host, which tells nothing of the network"
                " between hosts (allowed: a larger --max-workers)"
            )
        if inside:
            # Nothing leaves these hosts, so that what is fitted is the link inside.
            link = self._fitted(inside, None)
            networks = [link.fabric.network, *link.plausible]
            links = [Link(at.latency_s, at.bandwidth_bytes_per_s) for at in networks]
            return self._on_links(between, links)
        port = self._fitted(between, _IDEAL_LINK).fabric.network
        faster = []
        for factor in _FASTER_INSIDE:
            faster.append(Link(port.latency_s, factor * port.bandwidth_bytes_per_s))
        return self._on_links(between, [None, *faster, _IDEAL_LINK])

    def _on_links(
        self, steps: Sequence[_ExchangeStep], links: Sequence[Link | None]
    ) -> tuple[FittedNetwork, Link | None]:
        """Return the best network, fitted to some steps, and the link of its hosts.

        Links with which a network explains all steps hardly worse are plausible as well.
        """
        fits = [self._fitted(steps, link) for link in links]
        errors = []
        for fitted, link in zip(fits, links, strict=True):
            errors.append(np.array(self.residuals(self.steps, fitted.fabric.network, link)))
        sums = [float(np.square(each).sum()) for each in errors]
        best = sums.index(min(sums))
        model_error = ModelError.of(errors[best], max(1, len(self.steps) - 2))
        limit = sums[best] + (model_error.quantile * model_error.deviation) ** 2
        plausible: dict[Network, None] = {}
        for fitted, link, total in zip(fits, links, sums, strict=True):
            if total <= limit:
                for network in fitted.plausible:
                    plausible[network._replace(local=link)] = None
        return fits[best]._replace(plausible=tuple(plausible)), links[best]

    def residuals(
        self, steps: Sequence[_ExchangeStep], network: Network, local: Link | None
    ) -> list[float]:
        """Return by which logarithms steps on a network are longer than measured.

        Args:
            steps: of these.
            network: between hosts.
            local: inside hosts; None: as fast as the network.
        """
        fabric = Fabric(network, "", local=local, one_level=True)
        model = StepModel(self.num_bytes, self.compute, fabric, self.overlap, servers=_AS_MEASURED)
        # Logarithms of ratios: short steps weigh as much as long ones.
        return [math.log(step.predicted_s(model) / step.measured_s) for step in steps]

    def _fitted(self, steps: Sequence[_ExchangeStep], local: Link | None) -> FittedNetwork:
        return best_network(lambda network: self.residuals(steps, network, local))


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
    for step in _exchange_steps(report, _with_runs(report.rows), []):
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
    steps = _exchange_steps(report, _with_runs(report.rows), measured)
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
