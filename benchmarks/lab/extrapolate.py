"""Predictions of measurements that the models were not fitted to: more hosts, other batch sizes."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.lab import emulated
from scaletrain.collectives.traffic import bytes_moved
from scaletrain.scaling.model import Report, Row
from scaletrain.scaling.predict import step_time
from scaletrain.scaling.predict.calibration import Estimate, Fit
from scaletrain.scaling.predict.fit import (
    Timing,
    fit_exchanges,
    fit_report,
    strategy_of,
)
from scaletrain.scaling.predict.network import Fabric
from scaletrain.scaling.predict.step_time import ComputeCost, StepModel


@dataclasses.dataclass(frozen=True)
class HostsPoint:
    """One exchange at a number of hosts that no model was fitted to, in seconds.

    Attributes:
        exchange: the strategy.
        workers: number of hosts.
        measured_s: the median.
        predicted_s: by the model of emulated links, or else by that of real networks.
        plain_s: by the model of real networks.
        links_s: of the prediction, the time that the links take.
        machine_s: of the prediction, the time that the machine's cores take.
        cores_busy: measured share, 0 to 1, of the cores' time.
    """

    exchange: str
    workers: int
    measured_s: float
    predicted_s: float
    plain_s: float
    links_s: float | None = None
    machine_s: float | None = None
    cores_busy: float | None = None

    @property
    def needs_cores(self) -> bool:
        """True if the cores are predicted to need longer than the links."""
        return (self.machine_s or 0.0) > (self.links_s or 0.0)

    @property
    def error(self) -> float:
        """By which part the prediction is wrong."""
        return abs(self.predicted_s / self.measured_s - 1)

    @property
    def plain_error(self) -> float:
        """By which part the prediction by the model of real networks is wrong."""
        return abs(self.plain_s / self.measured_s - 1)

    def to_json(self) -> dict[str, Any]:
        """Return the figures that are known."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value is not None}


@dataclasses.dataclass(frozen=True)
class Extrapolation:
    """A fit to few hosts, held against more hosts.

    Attributes:
        estimates: the fitted figures by name.
        points: every measurement of more hosts.
        rounds: how often everything was measured; None: not in rounds.
    """

    estimates: Mapping[str, Estimate]
    points: list[HostsPoint]
    rounds: int | None = None

    @property
    def errors(self) -> dict[str, float]:
        """Mean error of each exchange's predictions, as a fraction."""
        return _means((point.exchange, point.error) for point in self.points)

    @property
    def plain_errors(self) -> dict[str, float]:
        """The same of the model of real networks."""
        return _means((point.exchange, point.plain_error) for point in self.points)

    def at(self, exchange: str, workers: int) -> HostsPoint | None:
        """Return one point; None: it was not measured."""
        for point in self.points:
            if (point.exchange, point.workers) == (exchange, workers):
                return point
        return None

    def to_json(self) -> dict[str, Any]:
        """Return the result as prediction.json holds it."""
        value = {
            "parameters": {name: figure._asdict() for name, figure in self.estimates.items()},
            "emulated": True,
            "points": [point.to_json() for point in self.points],
            "errors": self.errors,
            "plain_errors": self.plain_errors,
        }
        if self.rounds is not None:
            value["rounds"] = self.rounds
        return value


def _means(named: Any) -> dict[str, float]:
    """Return the mean of each name's values, from pairs (name, value)."""
    values: dict[str, list[float]] = {}
    for name, value in named:
        values.setdefault(name, []).append(value)
    return {name: float(np.mean(of_name)) for name, of_name in values.items()}


class MeasuredExchanges(NamedTuple):
    """What one run of ``benchmarks/suites/time_exchanges.py`` wrote."""

    workers: int
    num_bytes: float
    seconds: dict[str, list[float]]  # collective -> seconds of each exchange
    busy_s: dict[str, list[float]]  # collective -> core-seconds of each exchange

    @classmethod
    def read(cls, path: Path) -> "MeasuredExchanges":
        """Read the file that the script wrote."""
        return cls(**json.loads(path.read_text(encoding="utf-8")))

    @property
    def timings(self) -> list[Timing]:
        """The seconds of every exchange."""
        return self._as_timings(self.seconds)

    @property
    def busy(self) -> list[Timing]:
        """The core-seconds of every exchange."""
        return self._as_timings(self.busy_s)

    def _as_timings(self, by_collective: Mapping[str, Sequence[float]]) -> list[Timing]:
        timings = []
        for collective, all_seconds in by_collective.items():
            for seconds in all_seconds:
                timings.append(Timing(collective, self.workers, self.num_bytes, seconds))
        return timings


def medians(timings: Sequence[Timing]) -> list[Timing]:
    """Return one timing for each collective, number of workers and size: the median."""
    seconds: dict[tuple[str, int, float], list[float]] = {}
    for timing in timings:
        measured = (timing.strategy, timing.workers, timing.num_bytes)
        seconds.setdefault(measured, []).append(timing.seconds)
    return [Timing(*measured, float(np.median(times))) for measured, times in seconds.items()]


def extrapolate(
    timings: Sequence[Timing],
    fitted_to: int,
    known: emulated.EmulatedLinks,
    busy: Sequence[Timing] = (),
) -> Extrapolation:
    """Fit emulated links to few hosts, and predict more.

    A byte is taken to need as much of the cores with many hosts as with the most hosts that are
    fitted. The prediction is no less than the cores need for all bytes.

    Args:
        timings: exchanges on few and on more hosts.
        fitted_to: the most hosts that are fitted.
        known: token buckets and cores, which are not fitted.
        busy: core-seconds of the same exchanges.
    """
    few = [timing for timing in timings if timing.workers <= fitted_to]
    links, estimates = emulated.fit(few, known)
    most = max(timing.workers for timing in few)
    core_s_per_byte = {}  # by strategy
    core_s = {}  # by strategy and workers
    for timing in busy:
        core_s[timing.strategy, timing.workers] = timing.seconds
        if timing.workers == most:
            core_s_per_byte[timing.strategy] = timing.seconds / _bytes_moved(timing)
    points = []
    for plain, timing in _beyond(fitted_to, timings):
        links_s = emulated.allreduce_s(timing.strategy, timing.workers, timing.num_bytes, links)
        machine_s = core_s_per_byte.get(timing.strategy, 0.0) * _bytes_moved(timing) / known.cores
        cores_busy = None
        worked_s = core_s.get((timing.strategy, timing.workers))
        if worked_s is not None:
            cores_busy = worked_s / known.cores / timing.seconds
        points.append(
            dataclasses.replace(
                plain,
                predicted_s=max(links_s, machine_s),
                links_s=links_s,
                machine_s=machine_s,
                cores_busy=cores_busy,
            )
        )
    return Extrapolation(estimates, points)


def _bytes_moved(timing: Timing) -> float:
    return bytes_moved(timing.strategy, timing.workers, timing.num_bytes)


def _beyond(fitted_to: int, timings: Sequence[Timing]) -> list[tuple[HostsPoint, Timing]]:
    """Return the timings of more hosts, with the predictions of the model of real networks."""
    more = [timing for timing in timings if timing.workers > fitted_to]
    return list(zip(extrapolate_plain(timings, fitted_to).points, more, strict=True))


def extrapolate_plain(timings: Sequence[Timing], fitted_to: int) -> Extrapolation:
    """Fit the cost model of real networks to few hosts, and predict more."""
    fitted = fit_exchanges([timing for timing in timings if timing.workers <= fitted_to])
    points = []
    for timing in timings:
        if timing.workers <= fitted_to:
            continue
        predicted_s = step_time.exchange_s(
            timing.strategy, timing.workers, timing.num_bytes, fitted.fabric
        )
        points.append(
            HostsPoint(timing.strategy, timing.workers, timing.seconds, predicted_s, predicted_s)
        )
    return Extrapolation(fitted._asdict(), points)


def extrapolate_server(
    steps_s: Mapping[int, float], num_bytes: float, fitted_to: int
) -> Extrapolation:
    """Predict a server's null steps on more hosts.

    Nothing is computed, so a step is the exchange.

    Args:
        steps_s: workers -> seconds of a step.
        num_bytes: size of the model.
        fitted_to: the most workers that are fitted.
    """
    timings = []
    for workers, seconds in steps_s.items():
        timings.append(Timing("server", workers, num_bytes, seconds))
    return extrapolate_plain(timings, fitted_to)


@dataclasses.dataclass(frozen=True)
class BatchPrediction:
    """A step at a batch size that was not fitted, in seconds."""

    exchange: str
    workers: int
    batch_size: int
    measured_s: float
    predicted_s: float

    @property
    def error(self) -> float:
        """By which part the prediction is too long (positive) or too short (negative)."""
        return self.predicted_s / self.measured_s - 1


def other_batch(report: Report, fitted_batch: int) -> list[BatchPrediction]:
    """Calibrate on real training at one global batch size, and predict the steps of the others.

    Computation is a line through one worker's steps at the fitted batch and at its share for two
    workers. How much two workers slow each other down (caches, memory) is taken from the fitted
    batch as a factor. Each exchange has a network of its own, since gloo's is TCP and ours memory.

    Args:
        report: of a sweep over batch sizes.
        fitted_batch: the largest batch size that is fitted.
    """
    num_bytes = _gradient_bytes([*report.rows, *report.references])
    part = _fitted_part(report, fitted_batch)
    fitted = fit_report(part, num_bytes)
    fabrics = _fabrics(part, num_bytes)
    factors = _slowdowns(part, fitted, fitted_batch)
    points = []
    for row in report.rows:
        strategy = strategy_of(row.exchange)
        if row.exchange == "none" or row.workers == 1:
            strategy = "none"
        is_predicted = row.runs and row.batch_size > fitted_batch
        if not is_predicted or strategy is None or row.workers not in factors:
            continue
        compute = fitted.compute.slowed(factors[row.workers])
        fabric = fabrics.get(row.exchange, fitted.fabric)
        model = StepModel(num_bytes, compute, fabric)
        predicted_s = model.step_s(strategy, row.workers, row.batch_size / row.workers)
        measured_s = row.step_s_mean
        assert measured_s is not None, "the row has runs"
        points.append(
            BatchPrediction(row.exchange, row.workers, row.batch_size, measured_s, predicted_s)
        )
    return points


def _gradient_bytes(rows: Sequence[Row]) -> float:
    for row in rows:
        if row.runs and row.gradient_bytes:
            return row.gradient_bytes
    raise ValueError("no row says how many bytes the gradients have")


def _fitted_part(report: Report, fitted_batch: int) -> Report:
    """Return the rows up to a batch size. Their variants, which only say the batch, are removed."""

    def part(rows: Sequence[Row]) -> tuple[Row, ...]:
        kept = [row for row in rows if row.runs and row.batch_size <= fitted_batch]
        return tuple(dataclasses.replace(row, variant={}) for row in kept)

    return dataclasses.replace(report, rows=part(report.rows), references=part(report.references))


def _fabrics(part: Report, num_bytes: float) -> dict[str, Fabric]:
    """Fit a network to each exchange alone."""
    fabrics = {}
    exchanges = {row.exchange for row in part.rows if row.workers > 1 and strategy_of(row.exchange)}
    for exchange in exchanges:
        alike = tuple(row for row in part.rows if row.exchange in (exchange, "none"))
        fabrics[exchange] = fit_report(dataclasses.replace(part, rows=alike), num_bytes).fabric
    return fabrics


def _slowdowns(part: Report, fitted: Fit, fitted_batch: int) -> dict[int, float]:
    """Return how many times as long each worker computes, by the number of workers."""
    factors = {}
    for row in part.rows:
        if row.exchange == "none":
            assert row.step_s_mean is not None and row.update_s is not None, "the row has runs"
            pass_s = fitted.compute.pass_s(fitted_batch / row.workers)
            factors[row.workers] = (row.step_s_mean - row.update_s) / pass_s
    return factors


@dataclasses.dataclass(frozen=True)
class TrafficPrediction:
    """The efficiency (weak scaling) of a model whose computation is emulated."""

    model: str
    exchange: str
    workers: int
    gradient_bytes: int
    measured: float | None
    predicted: float


def traffic(report: Report, compute_s: float, fabric: Fabric) -> list[TrafficPrediction]:
    """Predict the efficiency of models of different size under the same computation.

    Args:
        report: of a sweep over models, weak scaling.
        compute_s: seconds of computation a step, the same for all models.
        fabric: the network.
    """
    points = []
    for row in report.rows:
        if not row.runs or row.workers == 1:
            continue
        assert row.gradient_bytes is not None, "the sweep leaves checkpoints"
        model = StepModel(row.gradient_bytes, ComputeCost(compute_s), fabric)
        step_s = model.step_s(str(strategy_of(row.exchange)), row.workers, share=1.0)
        points.append(
            TrafficPrediction(
                model=str(row.variant.get("model.preset")),
                exchange=row.exchange,
                workers=row.workers,
                gradient_bytes=row.gradient_bytes,
                measured=row.efficiency,
                predicted=compute_s / step_s,
            )
        )
    return points
