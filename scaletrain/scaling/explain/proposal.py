"""What a request for computing time says: scaling, its knee, and node hours. Trains nothing."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

from scaletrain.errors import UserError, unknown
from scaletrain.scaling.explain import headline
from scaletrain.scaling.measure.intervals import ONE_RUN, change, typical
from scaletrain.scaling.model import Report, Row
from scaletrain.scaling.predict.extrapolate import Extrapolation
from scaletrain.scaling.predict.fit import alike_but_for_exchange
from scaletrain.units import plural


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for."""

    samples: float  # that one run trains on, all workers together
    runs: int
    workers: int | None = None  # of each run; None: as many as pay
    workers_per_node: int | None = None  # None: as many as ran on one host
    exchange: str | None = None  # None: the fastest that was measured
    mode: str | None = None  # strong or weak; None: strong if it was measured


class Interval(NamedTuple):
    """A figure with its 95 % interval; without ends where one run was made."""

    value: float
    low: float | None = None
    high: float | None = None

    @classmethod
    def around(cls, value: float, ci95: float | None) -> Self:
        """Return a figure with half the width of its interval."""
        if ci95 is None:
            return cls(value)
        return cls(value, value - ci95, value + ci95)

    def times(self, factor: float) -> "Interval":
        """Return the figure in another unit."""
        ends = [None if end is None else factor * end for end in (self.low, self.high)]
        return Interval(factor * self.value, *ends)

    def divides(self, amount: float) -> "Interval":
        """Return ``amount`` over this figure: the time that work takes at a rate."""
        low = None if self.high is None else amount / self.high
        high = None
        if self.low is not None:
            # A rate whose interval reaches zero bounds no time.
            high = amount / self.low if self.low > 0 else math.inf
        return Interval(amount / self.value, low, high)


@dataclasses.dataclass(frozen=True)
class Point:
    """One number of workers, measured or predicted."""

    exchange: str
    workers: int
    nodes: int
    batch_size: int  # of all workers together
    samples_per_s: Interval
    speedup: Interval
    efficiency: Interval
    run_s: Interval  # seconds of one run that is asked for
    is_measured: bool
    oversubscribed: str = ""  # of what the workers had too little; empty: of nothing
    rates: tuple[float, ...] = ()  # samples/s of each measured repeat

    @property
    def node_hours(self) -> Interval:
        """Node hours of one run. Nodes are counted whole."""
        return self.run_s.times(self.nodes / 3600)

    @property
    def power(self) -> float:
        """Efficiency of the nodes over the time of a step, but for a factor that all share."""
        return self.samples_per_s.value**2 / self.nodes


class Knee(NamedTuple):
    """Where adding workers stops paying."""

    workers: int  # with the highest efficiency over time
    sentence: str


@dataclasses.dataclass(frozen=True)
class Scaling:
    """Strong or weak scaling of one exchange."""

    report: Report
    mode: str
    exchange: str
    points: tuple[Point, ...]  # the fewest workers first
    knee: Knee
    predicted: str  # how points were predicted and tested; or why none is

    @property
    def pays_up_to(self) -> int:
        """The workers beyond which more of them do not pay, by measured and predicted points."""
        return max(self.points, key=lambda point: point.power).workers

    def point(self, workers: int) -> Point | None:
        """Return the point of a number of workers; None if there is none."""
        return next((point for point in self.points if point.workers == workers), None)


@dataclasses.dataclass(frozen=True)
class Proposal:
    """A request, and what it rests on."""

    request: Request
    config: str  # the job's name
    workers_per_node: int
    scalings: tuple[Scaling, ...]  # the first is the one that hours are computed from
    asked: Point

    @property
    def node_hours(self) -> Interval:
        """Node hours of all runs."""
        return self.asked.node_hours.times(self.request.runs)


def of(reports: Mapping[str, Report], request: Request) -> Proposal:
    """Return the proposal that rests on some reports.

    Args:
        reports: of the same job, by mode: strong, weak or both.
        request: what is asked for.

    Raises:
        UserError: they do not hold what the request needs.
    """
    mode = request.mode or ("strong" if "strong" in reports else next(iter(reports)))
    if mode not in reports:
        raise UserError(f"--mode: {mode} scaling was not measured (allowed: {', '.join(reports)})")
    for each, report in reports.items():
        _check(each, report)
    configs = {row.config for report in reports.values() for row in report.rows}
    if len(configs) > 1:
        raise UserError(
            f"the directories are of different jobs: {', '.join(sorted(configs))}"
            " (allowed: strong and weak scaling of one job)"
        )
    per_node = request.workers_per_node or _workers_per_node(list(reports.values()))
    # The scaling that the hours rest on comes first.
    in_order = sorted(reports.items(), key=lambda item: item[0] != mode)
    scalings = []
    for each, report in in_order:
        scalings.append(_scaling(each, report, request, per_node, predicts=each == mode))
    first = scalings[0]
    workers = request.workers or first.knee.workers
    asked = first.point(workers)
    if asked is None:
        measured = ", ".join(str(point.workers) for point in first.points)
        raise UserError(
            f"--workers: {workers} workers were not measured, and cannot be predicted:"
            f" {first.predicted} (allowed: {measured}, or measure {workers})"
        )
    return Proposal(request, configs.pop(), per_node, tuple(scalings), asked)


def _check(mode: str, report: Report) -> None:
    """Check that a report has one job and several numbers of workers."""
    rows = [row for row in report.rows if row.runs]
    if not rows:
        raise UserError(f"{mode} scaling: nothing was measured")
    if not alike_but_for_exchange(rows):
        raise UserError(
            f"{mode} scaling: its rows are of several configs or --vary values (allowed: a sweep"
            " of one job whose exchanges and workers differ)"
        )
    if not any(row.speedup is not None and row.workers > 1 for row in rows):
        raise UserError(
            f"{mode} scaling: speed-up is not known (allowed: a sweep over several numbers of"
            " workers, such as --workers 1,2,4)"
        )


def _workers_per_node(reports: Sequence[Report]) -> int:
    """Return the most workers that ran on one host.

    Raises:
        UserError: the reports do not say on which hosts workers ran.
    """
    most = 0
    for report in reports:
        for row in report.rows:
            most = max([most, *report.hosts(row).values()])
    if not most:
        raise UserError(
            "--workers-per-node is missing: the reports do not say on which hosts workers ran"
        )
    return most


def _scaling(
    mode: str, report: Report, request: Request, per_node: int, *, predicts: bool
) -> Scaling:
    """Return one mode's scaling, with predictions if the request needs them."""
    exchange = _exchange(report, request.exchange)
    rows = [row for row in report.rows if row.speedup is not None]
    line = [row for row in rows if row.exchange == exchange]
    if all(row.workers > 1 for row in line):
        # One worker that trains without an exchange begins the line.
        line += [row for row in rows if row.workers == 1 and row.exchange == "none"]
    measured = sorted([_measured(row, request, per_node) for row in line], key=_workers)
    asked = request.workers or 0
    wanted = []
    if predicts and asked not in [point.workers for point in measured]:
        wanted = _between(measured[-1].workers, asked)
    forecasts: list[Point] = []
    predicted = "Nothing is predicted: all figures are measured."
    if wanted:
        try:
            model = _Predicting(report, exchange, request, per_node)
            # The asked for first: if it cannot be predicted, its own reason is the one to give.
            forecasts = [model.point(workers) for workers in reversed(wanted)]
            predicted = _basis(report, exchange, wanted)
        except UserError as error:
            predicted = str(error)
    points = tuple(sorted([*measured, *forecasts], key=_workers))
    return Scaling(report, mode, exchange, points, _knee(points), predicted)


def _exchange(report: Report, wanted: str | None) -> str:
    """Return the exchange that a proposal is about: the wanted one, else the fastest."""
    measured = [row.exchange for row in report.rows if row.speedup is not None and row.workers > 1]
    if wanted is not None:
        if wanted not in measured:
            raise unknown("--exchange", wanted, dict.fromkeys(measured))
        return wanted
    best = headline.fastest(report)
    assert best is not None, "a report without several workers was refused"
    return best.exchange


def _workers(point: Point) -> int:
    return point.workers


def _measured(row: Row, request: Request, per_node: int) -> Point:
    assert row.samples_per_s is not None and row.speedup is not None
    assert row.efficiency is not None
    rate = Interval.around(row.samples_per_s, row.samples_per_s_ci95)
    return Point(
        exchange=row.exchange,
        workers=row.workers,
        nodes=-(-row.workers // per_node),
        batch_size=row.batch_size,
        samples_per_s=rate,
        speedup=Interval.around(row.speedup, row.speedup_ci95),
        efficiency=Interval.around(row.efficiency, row.efficiency_ci95),
        run_s=rate.divides(request.samples),
        is_measured=True,
        oversubscribed=row.oversubscribed,
        rates=tuple(row.rates),
    )


def _between(measured: int, asked: int) -> list[int]:
    """Return the numbers of workers to predict: doublings of the measured ones, and the asked."""
    counts = []
    doubled = 2 * measured
    while doubled < asked:
        counts.append(doubled)
        doubled *= 2
    return [*counts, asked] if asked else []


class _Predicting:
    """Makes points that nobody measured."""

    def __init__(self, report: Report, exchange: str, request: Request, per_node: int):
        self._report = report
        self._exchange = exchange
        self._request = request
        self._per_node = per_node
        rows = [row for row in report.rows if row.exchange == exchange and row.runs]
        self._largest = max(rows, key=lambda row: row.workers)
        self._model = Extrapolation(report, exchange)

    def point(self, workers: int) -> Point:
        """Return the prediction for a number of workers.

        Raises:
            UserError: the measurements do not allow it.
        """
        row = self._largest
        nodes = -(-workers // self._per_node)
        hosts = len(self._report.hosts(row)) or -(-row.workers // self._per_node)
        if nodes > 1 and hosts == 1:
            raise UserError(
                "all workers that were measured shared one host, which tells nothing of the network"
                " between nodes"
            )
        forecast = self._model.forecast(workers)
        batch_size = self._model.batch_size(workers)
        step = Interval(forecast.step_s, forecast.low_s, forecast.high_s)
        rate = step.divides(batch_size)
        # The same baseline as for all measured rows.
        assert row.samples_per_s is not None and row.speedup is not None
        speedup = rate.times(row.speedup / row.samples_per_s)
        return Point(
            exchange=self._exchange,
            workers=workers,
            nodes=nodes,
            batch_size=batch_size,
            samples_per_s=rate,
            speedup=speedup,
            efficiency=speedup.times(1 / workers),
            run_s=rate.divides(self._request.samples),
            is_measured=False,
        )


def _basis(report: Report, exchange: str, predicted: Sequence[int]) -> str:
    """Return how points were predicted, and how such predictions did where they were measured."""
    counts = ", ".join(map(str, predicted))
    sentences = [
        f"{counts} workers are predicted: the computation of one worker, and the exchange's own"
        " schedule on a network that is calibrated on the measured steps, as scaletrain fit does. The"
        " interval is for a step that is going to be measured."
    ]
    for point in report.predictions:
        if point.exchange == exchange and not point.in_fit:
            sentences.append(
                f"Calibrated without them, the model missed the steps of"
                f" {plural(point.workers, 'worker')} by {100 * point.error:+.1f} %."
            )
    return " ".join(sentences)


def _knee(points: Sequence[Point]) -> Knee:
    """Return where adding workers stops paying.

    The knee is where efficiency over the time of a step is highest (Eager, Zahorjan and Lazowska
    1989, "Speedup versus efficiency in parallel systems"). From there on, twice the nodes are less
    than 1.41 times as fast. A worker more on a node that is paid for costs nothing.
    """
    measured = [point for point in points if point.is_measured]
    best = max(measured, key=lambda point: point.power)
    most = measured[-1]
    if best is not most:
        return Knee(best.workers, _found(best, measured))
    sentence = f"Not reached: more workers pay up to {most.workers}, the most that were measured."
    sentence += _doubt(best, measured)
    beyond = max(points, key=lambda point: point.power)
    if not points[-1].is_measured and beyond is not points[-1]:
        sentence += f" Predicted: the knee is at {plural(beyond.workers, 'worker')}."
    return Knee(most.workers, sentence)


def _found(best: Point, measured: Sequence[Point]) -> str:
    """Return the knee, and the price of going beyond it."""
    most = measured[-1]
    faster = most.samples_per_s.value / best.samples_per_s.value
    dearer = most.node_hours.value / best.node_hours.value
    return (
        f"{plural(best.workers, 'worker')}. {most.workers} are {faster:.2f} times as fast, at"
        f" {dearer:.2f} times the node hours.{_doubt(best, measured)}"
    )


def _doubt(best: Point, measured: Sequence[Point]) -> str:
    """Return which other points may be the knee, as far as repeats tell; empty if none may."""
    rivals = []
    for point in measured:
        if point.workers == best.workers:
            continue
        faster = change(typical(point.rates), typical(best.rates))
        if faster is None:
            return f" ({ONE_RUN})"
        # Both are as good where the ratio of the speeds is the root of the nodes' ratio.
        if faster.high >= math.sqrt(point.nodes / best.nodes):
            rivals.append(str(point.workers))
    if not rivals:
        return ""
    return f" The repeats do not exclude {' or '.join(rivals)} workers."
