"""Predictions of published figures that the models were not fitted to."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from scaletrain.collectives import cost, star, tree
from scaletrain.collectives.cost import Network
from scaletrain.scaling.predict import network
from scaletrain.scaling.predict.network import Fabric
from scaletrain.scaling.predict.simulate import MODEL_BYTES

IMAGENET = 1_281_167  # training images


class Training(NamedTuple):
    """A row of FireCaffe's table 3 (arXiv 1511.00175); the hours are read from memory."""

    model: str
    gpus: int
    batch: int
    epochs: int
    hours: float  # of the whole training


class Target(NamedTuple):
    """A training on 128 GPUs that is predicted."""

    epochs: int
    speedup: float  # as published


ONE_GPU = {
    "nin": Training("nin", 1, 256, 47, 5.8 * 24),
    "googlenet": Training("googlenet", 1, 32, 64, 21 * 24),
}
FITTED_ROWS = (
    Training("nin", 32, 256, 47, 11.0),
    Training("nin", 32, 1024, 47, 6.0),
    Training("googlenet", 32, 1024, 72, 23.4),
)
TARGETS = {"nin": Target(47, 39.0), "googlenet": Target(72, 47.0)}
# A streaming server's time over the tree's, from FireCaffe's section 4, by the number of workers.
PUBLISHED_RATIOS = {32: 3.2, 128: 9.1}


class SpeedUp(NamedTuple):
    """A speed-up on 128 GPUs over one GPU."""

    published: float
    predicted: float

    @property
    def error(self) -> float:
        """By which part the prediction is too large (positive) or too small (negative)."""
        return self.predicted / self.published - 1


@dataclasses.dataclass(frozen=True)
class FireCaffe:
    """What the 32-GPU rows predict for 128 GPUs."""

    bandwidth_bytes_per_s: float  # fitted
    fitted_hours: list[float]  # of FITTED_ROWS
    speedups: dict[str, SpeedUp]  # by model
    ratios: dict[int, float]  # by workers, as PUBLISHED_RATIOS

    @property
    def has_published_ratios(self) -> bool:
        """True if the two schedules give the published ratios, as they were printed."""
        rounded = {workers: round(ratio, 1) for workers, ratio in self.ratios.items()}
        return rounded == PUBLISHED_RATIOS

    def to_json(self) -> dict[str, Any]:
        """Return the result as prediction.json holds it."""
        fitted = []
        for row, hours in zip(FITTED_ROWS, self.fitted_hours, strict=True):
            fitted.append(row._asdict() | {"fitted_hours": hours})
        return {
            "bandwidth_bytes_per_s": self.bandwidth_bytes_per_s,
            "fitted": fitted,
            "speedups": self.speedups,
            "ratios": self.ratios,
        }


def firecaffe() -> FireCaffe:
    """Fit one bandwidth to FireCaffe's rows of 32 GPUs, and predict its rows of 128.

    A step is the single GPU's time for its share of the batch, plus the tree's allreduce of the
    whole model, costed on its schedule. Nothing overlaps. A training is its epochs of steps. The
    seconds of a single GPU come from the table's rows of one GPU.
    """

    def errors(log_bandwidth: np.ndarray) -> np.ndarray:
        fabric = _tree_network(float(np.exp(log_bandwidth[0])))
        return np.array([math.log(_hours(row, fabric) / row.hours) for row in FITTED_ROWS])

    result = optimize.least_squares(errors, [math.log(1e9)])
    bandwidth = float(np.exp(result.x[0]))
    fabric = _tree_network(bandwidth)
    speedups = {}
    for model, target in TARGETS.items():
        training = Training(model, 128, 1024, target.epochs, hours=math.nan)
        predicted = ONE_GPU[model].hours / _hours(training, fabric)
        speedups[model] = SpeedUp(target.speedup, predicted)
    return FireCaffe(
        bandwidth_bytes_per_s=bandwidth,
        fitted_hours=[_hours(row, fabric) for row in FITTED_ROWS],
        speedups=speedups,
        ratios={workers: server_tree_ratio(workers) for workers in PUBLISHED_RATIOS},
    )


def _tree_network(bandwidth: float) -> Fabric:
    return Fabric(Network(0.0, bandwidth), "")


def _hours(row: Training, fabric: Fabric) -> float:
    """Return the hours of a training on this network."""
    single = ONE_GPU[row.model]
    image_s = single.hours * 3600 / (single.epochs * IMAGENET)
    exchange_s = network.allreduce_s("tree", row.gpus, MODEL_BYTES[row.model], fabric)
    step_s = image_s * row.batch / row.gpus + exchange_s
    return step_s * row.epochs * IMAGENET / row.batch / 3600


def server_tree_ratio(workers: int, num_bytes: float = 1e9) -> float:
    """Return a streaming server's time over the binomial tree's, from the two schedules.

    FireCaffe's section 4 gives p / (2 log2 p). The star runs on p + 1 ranks, because the server is
    no worker, and in many segments, so that the server sends while it receives, without latency.
    """
    link = Network(0.0, 1e9)
    segments = 2**20
    # With two segments, the star has the first, the middle and the last round of any number.
    loads = cost.loads_of(star.schedule(workers + 1, segments=2))
    first, middle, last = (load._replace(one_way=load.one_way * 2 / segments) for load in loads)
    streamed = [first, middle._replace(repeats=segments - 1), last]
    server_s = cost.predict_seconds(streamed, int(num_bytes), link)
    tree_s = cost.predict_seconds(tree.schedule(workers), int(num_bytes), link)
    return server_s / tree_s


# TensorFlow's backup workers (OSDI'16, section 6.3): 50 workers, and b spare.
WORKERS = 50
PUBLISHED_STEPS = {0: 2.25, 4: 1.93}  # b -> seconds a step
BEST_BACKUPS = 3  # b with the best step time per machine, and its gain over b = 0
BEST_GAIN = 0.095
# A worker's load on the servers. The paper's null steps take 147 ms with 1 worker and 613 ms with
# 100, for 100 MB on 16 servers; Inception-v3 has 95 MB.
LOAD_S = (0.613 - 0.147) / 99 * 0.95


@dataclasses.dataclass(frozen=True)
class Backups:
    """Steps with backup workers, under one assumption about stragglers."""

    delay: dict[str, float]  # the assumption's fitted figures
    load_s: float  # that each further worker adds to a step at the servers
    steps: dict[int, float]  # backup workers -> seconds a step
    per_resource: dict[int, float]  # backup workers -> gain in step time per machine

    @property
    def shortest(self) -> int:
        """The number of backup workers with the shortest step."""
        return min(self.steps, key=lambda backups: self.steps[backups])

    @property
    def best_per_resource(self) -> int:
        """The number of backup workers with the largest gain per machine."""
        return max(self.per_resource, key=lambda backups: self.per_resource[backups])

    def to_json(self) -> dict[str, Any]:
        """Return the result as prediction.json holds it."""
        best = {"shortest": self.shortest, "best_per_resource": self.best_per_resource}
        return dataclasses.asdict(self) | best


def backup_workers(most: int = 8) -> dict[str, Backups]:
    """Predict TensorFlow's steps with 0 to ``most`` backup workers, under two assumptions.

    The first 50 gradients of a step count. The paper does not say how stragglers are late:

    - ``everyone``: every worker's step has an exponential delay. It is fitted to the steps at b = 0
      and 4. Everything else is a prediction.
    - ``few``: with some probability, a worker's step takes a fixed time longer. It is fitted to the
      same steps and to the gain at b = 3. The prediction is where the two best b lie.
    """

    def everyone_s(backups: int, base_s: float, tail: float) -> float:
        # The 50th of 50 + b exponentials comes after H(50 + b) - H(b) means, in expectation.
        delay = _harmonic(WORKERS + backups) - _harmonic(backups)
        return base_s * (1 + tail * delay) + LOAD_S * (WORKERS + backups)

    def few_s(backups: int, base_s: float, odds: float, late_s: float) -> float:
        # The step is late if more than b of 50 + b workers are.
        probability = float(stats.binom.sf(backups, WORKERS + backups, odds / (1 + odds)))
        return base_s + late_s * probability + LOAD_S * (WORKERS + backups)

    step_with_gain = PUBLISHED_STEPS[0] / (1 + BEST_GAIN) * WORKERS / (WORKERS + BEST_BACKUPS)
    gained = {**PUBLISHED_STEPS, BEST_BACKUPS: step_with_gain}
    return {
        "everyone": _fit_delay(everyone_s, {"base_s": 1.5, "tail": 0.1}, PUBLISHED_STEPS, most),
        "few": _fit_delay(few_s, {"base_s": 1.6, "odds": 0.03, "late_s": 0.4}, gained, most),
    }


def _fit_delay(
    step_s: Callable[..., float], start: Mapping[str, float], known: Mapping[int, float], most: int
) -> Backups:
    """Fit an assumption to known steps.

    Args:
        step_s: seconds of a step, from the number of backup workers and the figures.
        start: name -> where the search for a figure begins.
        known: backup workers -> seconds of a step.
        most: backup workers up to which steps are predicted.
    """

    def errors(logs: np.ndarray) -> list[float]:
        figures = np.exp(logs)
        return [step_s(backups, *figures) - seconds for backups, seconds in known.items()]

    result = optimize.least_squares(errors, np.log([*start.values()]), xtol=1e-14, ftol=1e-14)
    figures = [float(value) for value in np.exp(result.x)]
    steps = {}
    gains = {}
    for backups in range(most + 1):
        steps[backups] = float(step_s(backups, *figures))
        gains[backups] = steps[0] / steps[backups] * WORKERS / (WORKERS + backups) - 1
    return Backups(dict(zip(start, figures, strict=True)), LOAD_S, steps, gains)


def _harmonic(n: int) -> float:
    return sum(1 / i for i in range(1, n + 1))
