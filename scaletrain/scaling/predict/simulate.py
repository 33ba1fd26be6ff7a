"""Simulate a job: step time, speed-up and cost of every strategy, from the models alone."""

from collections.abc import Sequence
from typing import NamedTuple

from scaletrain import plugins
from scaletrain.collectives.schedule import proved
from scaletrain.config.grammar import split_spec
from scaletrain.errors import UserError, unknown
from scaletrain.scaling.predict import network, step_time
from scaletrain.scaling.predict.network import OUR_SERVERS, Fabric, Servers
from scaletrain.scaling.predict.step_time import (
    Band,
    ComputeCost,
    PassProfile,
    StepModel,
    Stragglers,
    Strategy,
)

# Parameters; googlenet with both auxiliary heads, as it is trained. Counts of torchvision, but for
# nin (Caffe's model zoo), inception_v3 (TensorFlow's, without its head) and bert (for pretraining).
MODEL_PARAMETERS = {
    "lenet": 431_080, "squeezenet": 1_248_424, "googlenet": 13_378_280, "nin": 7_595_176, "alexnet": 60_965_224,
    "vgg16": 138_357_544, "vgg19": 143_667_240, "inception_v3": 23_834_568,
    "resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032, "resnet101": 44_549_160, "resnet152": 60_192_808,
    "densenet121": 7_978_856, "mobilenet_v2": 3_504_872, "efficientnet_b0": 5_288_548, "vit_b_16": 86_567_656,
    "bert_base": 110_106_428, "bert_large": 336_226_108, "gpt2": 124_439_808,
}  # fmt: skip
MODEL_BYTES = {name: 4 * count for name, count in MODEL_PARAMETERS.items()}  # in float32

# Bytes of a gradient on the wire. torch.autocast keeps float32 weights and so float32 gradients.
PRECISIONS = {"float32": 4, "float16": 2, "bfloat16": 2}


class SimulatedJob(NamedTuple):
    """The job to simulate, and the machine that it would run on.

    What is not known spans a band, from one assumption to the other.

    Attributes:
        num_bytes: size of the gradients.
        batch_size: samples a step, of all workers (strong scaling) or of each (weak scaling).
        compute: a worker's computation.
        network: the machine's network.
        mode: ``strong`` or ``weak``.
        overlap: exchanges run while backward goes on; None: not known.
        profile: when gradients become complete during a pass.
        stragglers: how the computation varies from step to step; None: not known.
        epoch_samples: samples an epoch; None: no price is shown.
        price_per_worker_hour: of every machine; None: no price is shown.
        servers: what parameter servers are like.
    """

    num_bytes: float
    batch_size: int
    compute: ComputeCost
    network: Fabric
    mode: str = "strong"
    overlap: bool | None = None
    profile: PassProfile = step_time.USUAL_PROFILE
    stragglers: Stragglers | None = None
    epoch_samples: int | None = None
    price_per_worker_hour: float | None = None
    servers: Servers = OUR_SERVERS

    def share(self, workers: int) -> float:
        """Return the samples of one worker in a step."""
        if self.mode == "strong":
            return self.batch_size / workers
        return self.batch_size


PointValue = str | float | int | None  # of a field of ``Point``


class Point(NamedTuple):
    """One strategy at one number of workers.

    Every figure is of the slow end of the band, on which a plan can rely. ``fast_`` figures are of
    the other end, where the exchange hides as well as it can.

    Attributes:
        strategy: as a person types it.
        workers: workers whose gradients a step waits for.
        step_s: seconds of a step.
        fast_step_s: the same at the fast end.
        exposed_s: of ``step_s``, the seconds that the exchange and stragglers add.
        samples_per_s: of all workers together.
        speedup: over one worker without an exchange.
        fast_speedup: the same at the fast end.
        efficiency: speed-up per worker that computes, backup workers included.
        cost_per_epoch: price of all machines; None: no price is known.
        machines: the workers, the backup workers and the servers.
        segments: that a pipelined tree needs for this; None: it is no such tree.
    """

    strategy: str
    workers: int
    step_s: float
    fast_step_s: float
    exposed_s: float
    samples_per_s: float
    speedup: float
    fast_speedup: float
    efficiency: float
    cost_per_epoch: float | None
    machines: int
    segments: int | None = None


def strategies() -> list[str]:
    """Return every collective that needs no options, and one and many servers."""
    collectives = [name for name in plugins.names("collective") if name != "two_level"]
    return [*collectives, "server", "server:4", "server:16"]


def check(names: Sequence[str]) -> None:
    """Check that every strategy exists, and prove the schedules of collectives.

    Raises:
        UserError: a strategy does not exist.
    """
    collectives = plugins.names("collective")
    for name in names:
        strategy, plus, backups = name.partition("+")
        if plus and not backups.isdigit():
            raise UserError(f"--strategy: {name!r}: backup workers are a number, as in server+4")
        spec = split_spec(strategy)
        kind, option = spec.name, spec.rest
        if kind == "server" and _is_count(option or "1"):
            continue
        if plus and kind in collectives:
            # A collective adds up every rank's gradient: it cannot go on without the slowest.
            raise UserError(
                f"--strategy: {name!r}: backup workers need a server, which can drop the late"
                " gradients (allowed: server+4, server:4+4)"
            )
        is_segmented = kind in collectives and network.has_segments(kind)
        segments = option.removeprefix("segments=")
        if option and is_segmented and option != segments and _is_count(segments):
            option = ""
        if kind not in [*collectives, "none"] or option:
            raise unknown("--strategy", name, [*collectives, "none", "server", "server:4"])
        if kind in collectives:
            # The smallest size, an odd one and a power of two: algorithms treat them differently.
            for size in (2, 5, 8):
                proved(kind, size)


def _is_count(text: str) -> bool:
    return text.isdigit() and int(text) > 0


def simulate_one(job: SimulatedJob, strategy: str, workers: int) -> Point:
    """Simulate one strategy, such as ``ring`` or ``server:4+3``, at one number of workers."""
    parsed = Strategy.parse(strategy)
    share = job.share(workers)
    # Backup workers send their gradients to the servers, too.
    computing = workers + parsed.backups
    parsed = _with_segments(parsed, computing, job)
    band = _band(job, parsed, workers, share)
    # The same computation without an exchange or stragglers, and the whole batch on one worker.
    quiet_s = _step_s(job, Strategy("none"), 1, share, Stragglers(), overlap=True)
    alone_stragglers = job.stragglers or Stragglers()
    alone_s = _step_s(job, Strategy("none"), 1, job.batch_size, alone_stragglers, overlap=True)
    # By throughput, which compares strong and weak scaling with one worker alike.
    # The gradients of backup workers that come late do not count.
    samples_per_s = share * workers / band.high
    speedup = samples_per_s / (job.batch_size / alone_s)
    machines = computing
    if machines > 1:  # one worker alone has nobody to exchange with, and needs no server
        machines += parsed.servers
    return Point(
        strategy=strategy,
        workers=workers,
        step_s=band.high,
        fast_step_s=band.low,
        exposed_s=band.high - quiet_s,
        samples_per_s=samples_per_s,
        speedup=speedup,
        fast_speedup=speedup * band.high / band.low,
        efficiency=speedup / computing,
        cost_per_epoch=_cost_per_epoch(job, machines, samples_per_s),
        machines=machines,
        segments=parsed.segments,
    )


def _band(job: SimulatedJob, strategy: Strategy, workers: int, share: float) -> Band:
    """Return the step between the best and the worst of what is not known of the job."""
    steps = []
    overlaps = (True, False) if job.overlap is None else (job.overlap,)
    # Where latency counts most, many buckets are slower than one message after backward.
    for overlap in overlaps:
        best_s = _step_s(
            job, strategy, workers, share, job.stragglers or Stragglers(), overlap=overlap
        )
        late = job.stragglers or step_time.USUAL_STRAGGLERS
        late_s = _step_s(job, strategy, workers, share, late, overlap=overlap)
        steps += [best_s, late_s]
    incast_s = 0.0
    if job.overlap is None:
        incast_s = step_time.incast_s(strategy, workers + strategy.backups, job.network)
    return Band(min(steps), max(steps) + incast_s)


def _step_s(
    job: SimulatedJob,
    strategy: Strategy,
    workers: int,
    share: float,
    stragglers: Stragglers,
    *,
    overlap: bool,
) -> float:
    """Return the step under one assumption about overlap and stragglers."""
    slowest = step_time.slowest_factor(workers, strategy.backups, stragglers)
    model = StepModel(
        job.num_bytes,
        job.compute.slowed(slowest),
        job.network,
        overlap=overlap,
        profile=job.profile,
        servers=job.servers,
    )
    return model.step_s(strategy, workers + strategy.backups, share)


def _with_segments(strategy: Strategy, workers: int, job: SimulatedJob) -> Strategy:
    """Return a pipelined tree with the fastest number of segments, unless one was typed.

    It is one for all buckets, since a person sets one: that of the largest bucket.
    """
    if strategy.segments or strategy.has_servers or strategy.name == "none":
        return strategy
    if not network.has_segments(strategy.name):
        return strategy
    largest = max(step_time.buckets(job.num_bytes))
    best = network.best_segments(strategy.name, workers, largest, job.network)
    return strategy._replace(segments=best)


def _cost_per_epoch(job: SimulatedJob, machines: int, samples_per_s: float) -> float | None:
    if job.price_per_worker_hour is None or not job.epoch_samples:
        return None
    return job.price_per_worker_hour * machines * job.epoch_samples / samples_per_s / 3600


def simulate(job: SimulatedJob, workers: Sequence[int], names: Sequence[str]) -> list[Point]:
    """Simulate every strategy at every number of workers.

    Strong scaling ends where a worker would have less than one sample.

    Raises:
        UserError: a strategy does not exist, or every number of workers is too large.
    """
    check(names)
    most = job.batch_size if job.mode == "strong" else max(workers)
    fitting = [count for count in workers if count <= most]
    if not fitting:
        raise UserError(
            f"--workers: {min(workers)} workers cannot share a batch of {job.batch_size}"
            f" (allowed: 1 to {job.batch_size})"
        )
    points = []
    for count in fitting:
        for name in names:
            points.append(simulate_one(job, name, count))
    return points


def fastest(points: Sequence[Point]) -> dict[int, list[Point]]:
    """Return the strategies of each number of workers that no other strategy beats."""
    by_workers: dict[int, list[Point]] = {}
    for point in points:
        by_workers.setdefault(point.workers, []).append(point)
    unbeaten = {}
    for workers, alike in by_workers.items():
        limit_s = min(point.step_s for point in alike) * (1 + 1e-9)  # equal but for rounding
        unbeaten[workers] = [point for point in alike if point.step_s <= limit_s]
    return unbeaten


def as_rows(points: Sequence[Point]) -> list[dict[str, PointValue]]:
    """Return the points as JSON and CSV hold them."""
    return [point._asdict() for point in points]
