"""Predictions held against figures that they were not made from: the literature's, and rehearsals at more hosts than were fitted."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from scaletrain.collectives import cost
from scaletrain.collectives.cost import Network
from scaletrain.scaling import emulated
from scaletrain.scaling.predict import network, step_time
from scaletrain.scaling.predict.fit import Parameter, Timing, fit_exchanges, fit_report, strategy_of
from scaletrain.scaling.predict.network import Preset
from scaletrain.scaling.predict.simulate import MODEL_BYTES
from scaletrain.scaling.predict.step_time import Compute

IMAGENET = 1_281_167  # training images


class Published(NamedTuple):
    """A row of FireCaffe's table. ``hours`` of a whole training, ``epochs`` of it; † in the paper's digest: read from memory."""

    model: str
    gpus: int
    batch: int
    epochs: int
    hours: float


ONE_GPU = {
    "nin": Published("nin", 1, 256, 47, 5.8 * 24),
    "googlenet": Published("googlenet", 1, 32, 64, 21 * 24),
}
FIT_ROWS = (
    Published("nin", 32, 256, 47, 11.0), Published("nin", 32, 1024, 47, 6.0), Published("googlenet", 32, 1024, 72, 23.4),
)  # fmt: skip
SPEEDUPS = {"nin": (47, 39.0), "googlenet": (72, 47.0)}  # epochs at 128 GPUs, published speed-up


class FireCaffe(NamedTuple):
    """What the 32-GPU rows predict for 128 GPUs."""

    bandwidth_bytes_per_s: float
    fitted: list[tuple[Published, float]]  # row, its fitted hours
    speedups: dict[str, tuple[float, float]]  # model -> (published, predicted)
    ratios: dict[int, float]  # workers -> server's time / tree's time


def firecaffe() -> FireCaffe:
    """Fit one bandwidth to FireCaffe's rows of at most 32 GPUs; predict its 128-GPU rows (arXiv 1511.00175, table 3).

    A step is the single GPU's time for the share of the batch plus the tree's allreduce of the whole model, costed on its schedule,
    nothing overlapped; a training is its epochs of steps. Single-GPU seconds come from the table's single-GPU rows.
    """

    def hours(row: Published, on: Preset) -> float:
        single = ONE_GPU[row.model]
        image_s = single.hours * 3600 / (single.epochs * IMAGENET)
        step = image_s * row.batch / row.gpus + network.allreduce_s(
            "tree", row.gpus, MODEL_BYTES[row.model], on
        )
        return step * row.epochs * IMAGENET / row.batch / 3600

    def error(log_bandwidth: np.ndarray) -> np.ndarray:
        on = Preset(Network(0.0, float(np.exp(log_bandwidth[0]))), "")
        return np.array([math.log(hours(row, on) / row.hours) for row in FIT_ROWS])

    bandwidth = float(np.exp(optimize.least_squares(error, [math.log(1e9)]).x[0]))
    on = Preset(Network(0.0, bandwidth), "")
    speedups = {
        model: (
            published,
            ONE_GPU[model].hours / hours(Published(model, 128, 1024, epochs, 0.0), on),
        )
        for model, (epochs, published) in SPEEDUPS.items()
    }
    return FireCaffe(
        bandwidth,
        [(row, hours(row, on)) for row in FIT_ROWS],
        speedups,
        {p: server_tree_ratio(p) for p in (32, 128)},
    )


def server_tree_ratio(workers: int, num_bytes: float = 1e9) -> float:
    """A streaming server's time over the binomial tree's: p / (2 log2 p) in FireCaffe's section 4, here from the two schedules.

    The star runs on p + 1 ranks (the server is no worker) in many segments, so that the server sends while it receives, without latency.
    """
    from scaletrain.collectives import star, tree

    on = Network(0.0, 1e9)
    segments = 2**20
    whole = cost.loads_of(
        star.schedule(workers + 1, segments=2)
    )  # first, middle and last round of any number of segments
    first, middle, last = (load._replace(one_way=load.one_way * 2 / segments) for load in whole)
    streamed = [first, middle._replace(repeats=segments - 1), last]
    server = cost.predict_seconds(streamed, int(num_bytes), on)
    return server / cost.predict_seconds(tree.schedule(workers), int(num_bytes), on)


class Backups(NamedTuple):
    """TensorFlow's backup workers (OSDI'16, section 6.3) under one assumption about stragglers."""

    delay: dict[str, float]  # the assumption's fitted figures
    load_s: float  # what each worker more adds to a step at the servers
    steps: dict[int, float]  # backup workers -> seconds a step
    per_resource: dict[int, float]  # backup workers -> gain in step time per machine

    @property
    def shortest(self) -> int:
        return min(self.steps, key=lambda b: self.steps[b])

    @property
    def best_per_resource(self) -> int:
        return max(self.per_resource, key=lambda b: self.per_resource[b])


PUBLISHED_STEPS = {0: 2.25, 4: 1.93}  # backup workers -> seconds; 50 workers
PUBLISHED_GAIN = (3, 0.095)  # the best step per machine, over none spare


def backup_workers(most: int = 8) -> dict[str, Backups]:
    """50 workers and b spare, the first 50 gradients of a step count. What is not published is how stragglers are late; two assumptions:

    - ``everyone``: every worker's step has an exponential delay. Fitted to the steps at b = 0 and 4; everything else is a prediction.
    - ``few``: with some probability a worker's step takes a fixed time longer. Fitted to the same and to the gain at b = 3; where the two
      best b lie is the prediction.

    Servers add a time for each worker, which the same paper's null-step test gives: 147 ms for 1 worker to 613 ms for 100 with 100 MB on 16
    servers, scaled to Inception-v3's 95 MB.
    """
    load_s = (0.613 - 0.147) / 99 * 0.95

    def everyone(b: int, base: float, tail: float) -> float:
        # The 50th of 50 + b exponentials comes after H(50 + b) - H(b) means, in expectation.
        return base * (1 + tail * (_harmonic(50 + b) - _harmonic(b))) + load_s * (50 + b)

    def few(b: int, base: float, odds: float, late_s: float) -> float:
        # The step is late when more than b of 50 + b are.
        return (
            base + late_s * float(stats.binom.sf(b, 50 + b, odds / (1 + odds))) + load_s * (50 + b)
        )

    at, gain = PUBLISHED_GAIN
    facts = [*PUBLISHED_STEPS.items(), (at, PUBLISHED_STEPS[0] / (1 + gain) * 50 / (50 + at))]

    def fitted(step: Any, names: tuple[str, ...], start: list[float]) -> Backups:
        known = facts[: len(names)]
        found = optimize.least_squares(
            lambda logs: [step(b, *np.exp(logs)) - seconds for b, seconds in known],
            np.log(start),
            xtol=1e-14,
            ftol=1e-14,
        )
        values = [float(value) for value in np.exp(found.x)]
        steps = {b: float(step(b, *values)) for b in range(most + 1)}
        gains = {b: steps[0] / seconds * 50 / (50 + b) - 1 for b, seconds in steps.items()}
        return Backups(dict(zip(names, values, strict=True)), load_s, steps, gains)

    return {
        "everyone": fitted(everyone, ("base_s", "tail"), [1.5, 0.1]),
        "few": fitted(few, ("base_s", "odds", "late_s"), [1.6, 0.03, 0.4]),
    }


def _harmonic(n: int) -> float:
    return sum(1 / i for i in range(1, n + 1))


class Extrapolation(NamedTuple):
    """A fit on few hosts held against more hosts. ``points``: strategy, workers, measured_s, predicted_s, and plain_s: the prediction of
    the cost model of real networks, fitted to the same."""

    parameters: dict[str, Parameter]
    points: list[dict[str, Any]]

    def errors(self, key: str = "predicted_s") -> dict[str, float]:
        """Mean absolute error of each strategy's predictions, as a fraction."""
        by: dict[str, list[float]] = {}
        for point in self.points:
            by.setdefault(point["exchange"], []).append(abs(point[key] / point["measured_s"] - 1))
        return {name: float(np.mean(errors)) for name, errors in by.items()}


def extrapolate(
    timings: Sequence[Timing], fitted_to: int, known: emulated.Links, busy: Sequence[Timing] = ()
) -> Extrapolation:
    """Fit emulated links to the timings of at most ``fitted_to`` workers; predict the others. ``known``: what is not fitted.

    ``busy``: core-seconds of the same exchanges. What a byte takes of the cores with the most hosts that are fitted, it takes with more of them,
    and the prediction is no less than the cores need for all bytes (``machine_s`` of a point).
    """
    few = [t for t in timings if t.workers <= fitted_to]
    links, parameters = emulated.fit(few, known)
    most = max(t.workers for t in few)
    core_s = {
        t.strategy: t.seconds / emulated.bytes_moved(*t[:3]) for t in busy if t.workers == most
    }
    worked = {(t.strategy, t.workers): t.seconds for t in busy}
    plain = extrapolate_plain(timings, fitted_to)
    points = []
    for point, t in zip(plain.points, (t for t in timings if t.workers > fitted_to), strict=True):
        links_s = emulated.allreduce_s(t.strategy, t.workers, t.num_bytes, links)
        machine_s = core_s.get(t.strategy, 0.0) * emulated.bytes_moved(*t[:3]) / known.cores
        point |= {
            "predicted_s": max(links_s, machine_s),
            "links_s": links_s,
            "machine_s": machine_s,
        }
        if (t.strategy, t.workers) in worked:
            point["cores_busy"] = worked[t.strategy, t.workers] / known.cores / t.seconds
        points.append(point)
    return Extrapolation(dict(zip(emulated.FITTED, parameters, strict=True)), points)


def extrapolate_plain(timings: Sequence[Timing], fitted_to: int) -> Extrapolation:
    """The same with the cost model of real networks."""
    latency, bandwidth = fit_exchanges([t for t in timings if t.workers <= fitted_to])
    on = Preset(Network(latency.value, bandwidth.value), "fitted")
    points = []
    for t in timings:
        if t.workers > fitted_to:
            seconds = step_time.exchange_s(t.strategy, t.workers, t.num_bytes, on)
            point = {"exchange": t.strategy, "workers": t.workers, "measured_s": t.seconds}
            points.append(point | {"predicted_s": seconds, "plain_s": seconds})
    return Extrapolation({"latency_s": latency, "bandwidth_bytes_per_s": bandwidth}, points)


def timings_of(measured: Sequence[Mapping[str, Any]], key: str = "seconds") -> list[Timing]:
    """The median of every collective and number of workers in files that ``benchmarks/suites/time_exchanges.py`` wrote, those of one number
    taken together: of ``seconds`` or ``busy_s``."""
    found: dict[tuple[str, int, float], list[float]] = {}
    for one in measured:
        for name, seconds in one[key].items():
            found.setdefault((name, one["workers"], one["num_bytes"]), []).extend(seconds)
    return [Timing(*at, float(np.median(seconds))) for at, seconds in found.items()]


def extrapolate_server(
    steps_s: Mapping[int, float], num_bytes: float, fitted_to: int
) -> Extrapolation:
    """The same for a server's null steps (workers -> seconds): nothing is computed, so a step is the exchange."""
    return extrapolate_plain(
        [Timing("server", workers, num_bytes, seconds) for workers, seconds in steps_s.items()],
        fitted_to,
    )


def other_batch(report: Mapping[str, Any], fitted_batch: int) -> list[dict[str, Any]]:
    """Real training: calibrate on the rows of one global batch size, predict the steps of the others.

    Computation is a line through one worker's steps at the fitted batch and its share for two workers. What two workers lose to each other
    (caches, memory) is taken from the fitted batch too, as a factor. Each exchange has a network of its own: gloo's is TCP, ours memory.
    """
    rows = [r for r in [*report["rows"], *report["references"]] if r["runs"]]
    mine = [r for r in rows if r["batch_size"] <= fitted_batch]
    part = {
        "header": report["header"],
        "rows": [{**r, "variant": {}} for r in mine if r in report["rows"]],
        "references": [{**r, "variant": {}} for r in mine if r in report["references"]],
    }
    num_bytes = next(r["gradient_bytes"] for r in rows if r["gradient_bytes"])
    fitted = fit_report(part, num_bytes)
    networks = {}
    for exchange in {
        r["exchange"] for r in part["rows"] if r["workers"] > 1 and strategy_of(r["exchange"])
    }:
        alike = [r for r in part["rows"] if r["exchange"] in (exchange, "none")]
        networks[exchange] = fit_report({**part, "rows": alike}, num_bytes).network
    alone = {r["workers"]: r for r in part["rows"] if r["exchange"] == "none"}
    factors = {}
    for workers, row in alone.items():
        own = fitted.compute.pass_s(fitted_batch / workers)
        factors[workers] = (row["step_s_mean"] - row["update_s"]) / own
    points = []
    for row in report["rows"]:
        strategy = (
            "none"
            if row["exchange"] == "none" or row["workers"] == 1
            else strategy_of(row["exchange"])
        )
        if (
            not row["runs"]
            or row["batch_size"] <= fitted_batch
            or strategy is None
            or row["workers"] not in factors
        ):
            continue
        factor = factors[row["workers"]]
        compute = Compute(
            fitted.compute.sample_s * factor,
            fitted.compute.fixed_s * factor,
            fitted.compute.update_s,
        )
        share = row["batch_size"] / row["workers"]
        on = networks.get(row["exchange"], fitted.network)
        guess = step_time.step_s(strategy, row["workers"], share, num_bytes, compute, on)
        points.append(
            {"exchange": row["exchange"], "workers": row["workers"], "batch_size": row["batch_size"],
             "measured_s": row["step_s_mean"], "predicted_s": guess}
        )  # fmt: skip
    return points


def traffic(report: Mapping[str, Any], compute_s: float, on: Preset) -> list[dict[str, Any]]:
    """Models of different size under the same computation: measured and predicted efficiency (weak scaling) of each row of several workers."""
    points = []
    for row in report["rows"]:
        if row["runs"] and row["workers"] > 1:
            step = step_time.step_s(
                str(strategy_of(row["exchange"])),
                row["workers"],
                1.0,
                row["gradient_bytes"],
                Compute(compute_s),
                on,
            )
            points.append(
                {"model": str(row["variant"].get("model.preset")), "exchange": row["exchange"], "workers": row["workers"],
                 "gradient_bytes": row["gradient_bytes"], "measured": row["efficiency"], "predicted": compute_s / step}
            )  # fmt: skip
    return points
