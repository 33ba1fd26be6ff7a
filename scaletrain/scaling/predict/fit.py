"""Calibrate the models from what was measured: computation from ``none``, the network from what exchanges add. Residuals are shown."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from scaletrain import plugins
from scaletrain.collectives.cost import Network
from scaletrain.errors import UserError
from scaletrain.scaling.predict import step_time
from scaletrain.scaling.predict.network import Preset
from scaletrain.scaling.predict.step_time import Compute

FAR = 8  # times the measured workers; beyond that a prediction has to be asked for


class Parameter(NamedTuple):
    """A fitted value with its 95 % interval (None: the measurements are too few, or do not depend on it)."""

    value: float
    low: float | None
    high: float | None

    @property
    def is_told(self) -> bool:
        """Whether the measurements tell the value, at least to a factor of ten."""
        return self.low is not None and self.high is not None and self.high <= 100 * self.low


class Fit(NamedTuple):
    """Calibrated models. ``residuals`` are predicted / measured - 1 of every measurement used."""

    compute: Compute
    latency_s: Parameter
    bandwidth_bytes_per_s: Parameter
    overlap: bool
    residuals: list[dict[str, Any]]
    max_workers: int

    @property
    def network(self) -> Preset:
        return Preset(Network(self.latency_s.value, self.bandwidth_bytes_per_s.value), "fitted")

    @property
    def untold(self) -> list[str]:
        """What the measurements do not tell of the network."""
        told = {"latency": self.latency_s.is_told, "bandwidth": self.bandwidth_bytes_per_s.is_told}
        return [name for name, is_told in told.items() if not is_told]

    def network_or(self, assumed: Network) -> Preset:
        """The fitted network, with what the measurements do not tell from ``assumed``."""
        return Preset(
            Network(
                assumed.latency_s if "latency" in self.untold else self.latency_s.value,
                assumed.bandwidth_bytes_per_s
                if "bandwidth" in self.untold
                else self.bandwidth_bytes_per_s.value,
            ),
            "fitted",
        )

    @property
    def error(self) -> float:
        """Root of the mean squared residual, as a fraction."""
        return math.sqrt(
            sum((r["predicted_s"] / r["measured_s"] - 1) ** 2 for r in self.residuals)
            / len(self.residuals)
        )

    def check_reach(self, workers: int, far: bool) -> None:
        """Raises ``UserError`` for a worker count beyond ``FAR`` times the measured ones, unless it is asked for."""
        if workers > FAR * self.max_workers and not far:
            raise UserError(
                f"--workers: {workers} is more than {FAR} times the {self.max_workers} that were measured"
                f" (allowed: up to {FAR * self.max_workers}, or --far)"
            )

    def as_json(self) -> dict[str, Any]:
        return {
            "compute": self.compute._asdict(),
            "latency_s": self.latency_s._asdict(),
            "bandwidth_bytes_per_s": self.bandwidth_bytes_per_s._asdict(),
            "overlap": self.overlap, "max_workers": self.max_workers, "residuals": self.residuals,
        }  # fmt: skip

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Fit":
        return cls(
            Compute(**value["compute"]), Parameter(**value["latency_s"]), Parameter(**value["bandwidth_bytes_per_s"]),
            value["overlap"], value["residuals"], value["max_workers"],
        )  # fmt: skip


class Timing(NamedTuple):
    """One measured exchange: ``strategy`` as ``step_time.exchange_s`` takes it."""

    strategy: str
    workers: int
    num_bytes: float
    seconds: float


def fit_exchanges(timings: Sequence[Timing]) -> tuple[Parameter, Parameter]:
    """(latency_s, bandwidth_bytes_per_s) that explain pure exchanges best: least squares of the logarithms' differences."""

    def residuals(network: Network) -> list[float]:
        on = Preset(network, "")
        return [
            math.log(step_time.exchange_s(t.strategy, t.workers, t.num_bytes, on) / t.seconds)
            for t in timings
            if t.workers > 1
        ]

    return _least_squares(residuals)


def _least_squares(residuals: Callable[[Network], list[float]]) -> tuple[Parameter, Parameter]:
    """Fit latency and bandwidth (as logarithms: both are positive); intervals from the Jacobian where freedom is left.

    Where the measurements do not tell one (the latency, when all messages are large), it ends anywhere or at a bound, and has no interval.
    """

    def vector(logs: np.ndarray) -> np.ndarray:
        return np.array(residuals(Network(float(np.exp(logs[0])), float(np.exp(logs[1])))))

    bounds = ([math.log(1e-7), math.log(1e4)], [math.log(0.1), math.log(1e12)])
    found = min(
        (
            optimize.least_squares(
                vector,
                [math.log(1e-4), math.log(start)],
                bounds=bounds,
                loss="soft_l1",
                f_scale=0.05,
            )
            for start in (1e7, 1e8, 1e9, 1e10)
        ),
        key=lambda result: result.cost,
    )
    made = intervals_of(found.x, found.jac, vector(found.x))
    at_bound = np.minimum(found.x - bounds[0], bounds[1] - found.x) < 0.01
    latency, bandwidth = (
        Parameter(p.value, None, None) if at else p for p, at in zip(made, at_bound, strict=True)
    )
    return latency, bandwidth


def intervals_of(logs: np.ndarray, jacobian: np.ndarray, errors: np.ndarray) -> list[Parameter]:
    """Fitted logarithms as values with their 95 % intervals: none where no freedom is left, or the measurements do not tell."""
    freedom, count = len(errors) - len(logs), len(logs)
    half: list[float | None] = [None] * count
    if freedom > 0:
        variance = float(errors @ errors) / freedom
        with np.errstate(all="ignore"):
            covariance = np.linalg.pinv(jacobian.T @ jacobian) * variance
        scale = float(stats.t.ppf(0.975, freedom))
        known = np.abs(jacobian).max(axis=0) > 1e-6
        half = [
            scale * math.sqrt(max(0.0, covariance[i, i])) if known[i] else None
            for i in range(count)
        ]
    made = []
    for log, width in zip(logs, half, strict=True):
        interval = (
            (None, None)
            if width is None or width > 50
            else (math.exp(log - width), math.exp(log + width))
        )
        made.append(Parameter(math.exp(log), *interval))
    return made


def fit_compute(rows: Sequence[Mapping[str, Any]]) -> Compute:
    """Seconds a sample and a step from one worker's runs with ``none`` at one or more batch sizes."""
    points = [
        (row["batch_size"], row["forward_s"] + row["backward_s"] + row["input_s"], row["update_s"])
        for row in rows
    ]
    if not points:
        raise UserError(
            "fit: the report has no run of one worker with the exchange none (measure none, or with --split)"
        )
    update = float(np.mean([p[2] for p in points]))
    if len({p[0] for p in points}) == 1:
        return Compute(points[0][1] / points[0][0], 0.0, update)
    solved, _ = optimize.nnls(
        np.array([[p[0], 1.0] for p in points]), np.array([p[1] for p in points])
    )
    return Compute(float(solved[0]), float(solved[1]), update)


def strategy_of(exchange: str) -> str | None:
    """The model of an exchange's label: ``ring@gloo`` is ``ring``, ``native`` a ring, a synchronous server ``server``.

    None: it has no model.
    """
    name = exchange.partition("@")[0]
    if name in ("native", "horovod", "scheduled"):
        return "ring"
    if name in ("parameter_server", "parameter_server:sync"):
        return "server"
    return name if name in plugins.names("collective") else None


def fit_report(
    report: Mapping[str, Any],
    num_bytes: float,
    overlap: bool = True,
    max_workers: int | None = None,
) -> Fit:
    """Calibrate from a scaling report. ``num_bytes``: of the gradients. ``max_workers``: use only rows up to there.

    Raises:
        UserError: nothing to calibrate from.
    """
    used = [r for r in _measured(report) if max_workers is None or r["workers"] <= max_workers]
    compute = fit_compute([r for r in used if r["exchange"] == "none" and r["workers"] == 1])
    alone = {_key(r): r for r in used if r["exchange"] == "none"}
    cells = [(r, s) for r in used if r["workers"] > 1 and (s := strategy_of(r["exchange"]))]
    if not cells:
        raise UserError(
            "fit: no exchange between several workers in the report has a model (collectives, native, parameter_server)"
        )

    def residuals(network: Network) -> list[float]:
        on = Preset(network, "")
        return [
            math.log(
                _step_s(r, s, alone.get(_key(r)), compute, num_bytes, overlap, on)
                / r["step_s_mean"]
            )
            for r, s in cells
        ]

    latency, bandwidth = _least_squares(residuals)
    fitted = Fit(compute, latency, bandwidth, overlap, [], max(r["workers"] for r in used))
    return fitted._replace(
        residuals=predictions(
            fitted, {"rows": [r for r, _ in cells], "references": [*alone.values()]}, num_bytes
        )
    )


def alike_but_for_exchange(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether rows are of one job on one network, so that one calibration can hold for all: one config, one variant, one model."""
    return len({(row["config"], str(row["variant"]), row["gradient_bytes"]) for row in rows}) == 1


def predictions(fitted: Fit, report: Mapping[str, Any], num_bytes: float) -> list[dict[str, Any]]:
    """Measured and predicted seconds of a step, for every row of several workers whose exchange has a model."""
    alone = {_key(r): r for r in _measured(report) if r["exchange"] == "none"}
    rows = [
        (r, s)
        for r in report["rows"]
        if r["runs"] and r["workers"] > 1 and (s := strategy_of(r["exchange"]))
    ]
    return [
        {
            "exchange": row["exchange"], "workers": row["workers"], "measured_s": row["step_s_mean"],
            "predicted_s": _step_s(row, strategy, alone.get(_key(row)), fitted.compute, num_bytes, fitted.overlap, fitted.network),
            "in_fit": row["workers"] <= fitted.max_workers,
        }
        for row, strategy in rows
    ]  # fmt: skip


def _step_s(
    row: Mapping[str, Any], strategy: str, none: Mapping[str, Any] | None, compute: Compute, num_bytes: float, overlap: bool, on: Preset
) -> float:  # fmt: skip
    """A row's step. Where the same workers were measured without an exchange, their computation is known: shared cores are in it."""
    if none is not None:
        compute = Compute(0.0, none["step_s_mean"] - none["update_s"], none["update_s"])
    return step_time.step_s(
        strategy,
        row["workers"],
        row["batch_size"] / row["workers"],
        num_bytes,
        compute,
        on,
        overlap=overlap,
    )


def _measured(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in [*report["references"], *report["rows"]] if row["runs"]]


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["config"], row["workers"], row["batch_size"], str(row["variant"])
