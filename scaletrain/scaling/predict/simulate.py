"""Simulate a job: step time, speed-up and cost of every strategy, from the models alone."""

from collections.abc import Sequence
from typing import NamedTuple

from scaletrain import plugins
from scaletrain.collectives.schedule import proved
from scaletrain.config.grammar import split_spec
from scaletrain.errors import UserError, unknown
from scaletrain.scaling.predict import step_time
from scaletrain.scaling.predict.network import Fabric
from scaletrain.scaling.predict.step_time import (
    ComputeCost,
    PassProfile,
    StepModel,
    Stragglers,
    Strategy,
)

MODEL_BYTES = {  # float32 weights; googlenet with both auxiliary heads, as it is trained
    "lenet": 431_080 * 4, "squeezenet": 1_248_424 * 4, "googlenet": 13_378_280 * 4, "nin": 7_595_176 * 4,
    "alexnet": 60_965_224 * 4, "vgg16": 138_357_544 * 4, "vgg19": 143_667_240 * 4, "resnet50": 25_557_032 * 4,
}  # fmt: skip


class SimulatedJob(NamedTuple):
    """The job to simulate, and the machine that it would run on.

    Attributes:
        num_bytes: size of the gradients.
        batch_size: samples a step, of all workers (strong scaling) or of each (weak scaling).
        compute: a worker's computation.
        network: the machine's network.
        mode: ``strong`` or ``weak``.
        overlap: collectives run while backward goes on.
        profile: when gradients become complete during a pass.
        stragglers: how the computation varies from step to step.
        epoch_samples: samples an epoch; None: no price is shown.
        price_per_worker_hour: of every machine; None: no price is shown.
    """

    num_bytes: float
    batch_size: int
    compute: ComputeCost
    network: Fabric
    mode: str = "strong"
    overlap: bool = True
    profile: PassProfile = step_time.USUAL_PROFILE
    stragglers: Stragglers = Stragglers()
    epoch_samples: int | None = None
    price_per_worker_hour: float | None = None

    def share(self, workers: int) -> float:
        """Return the samples of one worker in a step."""
        if self.mode == "strong":
            return self.batch_size / workers
        return self.batch_size


PointValue = str | float | int | None  # of a field of ``Point``


class Point(NamedTuple):
    """One strategy at one number of workers.

    Attributes:
        strategy: as a person types it.
        workers: workers whose gradients a step waits for.
        step_s: seconds of a step.
        exposed_s: of these, the seconds that the exchange and stragglers add.
        samples_per_s: of all workers together.
        speedup: over one worker without an exchange.
        efficiency: speed-up per worker.
        cost_per_epoch: price of all machines; None: no price is known.
        machines: the workers, the backup workers and the servers.
    """

    strategy: str
    workers: int
    step_s: float
    exposed_s: float
    samples_per_s: float
    speedup: float
    efficiency: float
    cost_per_epoch: float | None
    machines: int


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
        strategy, _, backups = name.partition("+")
        if backups and not backups.isdigit():
            raise UserError(f"--strategy: {name!r}: backup workers are a number, as in server+4")
        spec = split_spec(strategy)
        kind, servers = spec.name, spec.rest
        if kind == "server" and _is_count(servers or "1"):
            continue
        if kind not in [*collectives, "none"] or servers:
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
    slowest = step_time.slowest_factor(workers, parsed.backups, job.stragglers)
    compute = job.compute.slowed(slowest)
    # Backup workers send their gradients to a server, too. A collective has no backup workers.
    senders = workers + parsed.backups if parsed.has_servers else workers
    model = StepModel(job.num_bytes, compute, job.network, job.overlap, job.profile)
    step_s = model.step_s(strategy, senders, share)
    # The same computation without an exchange, and the whole batch on one worker.
    quiet_s = StepModel(job.num_bytes, compute, job.network).step_s("none", 1, share)
    alone = StepModel(job.num_bytes, job.compute, job.network)
    alone_s = alone.step_s("none", 1, job.batch_size)
    # By throughput, which compares strong and weak scaling with one worker alike.
    # The gradients of backup workers that come late do not count.
    samples_per_s = share * workers / step_s
    speedup = samples_per_s / (job.batch_size / alone_s)
    machines = workers + parsed.backups
    if machines > 1:  # one worker alone has nobody to exchange with, and needs no server
        machines += parsed.servers
    return Point(
        strategy=strategy,
        workers=workers,
        step_s=step_s,
        exposed_s=step_s - quiet_s,
        samples_per_s=samples_per_s,
        speedup=speedup,
        efficiency=speedup / workers,
        cost_per_epoch=_cost_per_epoch(job, machines, samples_per_s),
        machines=machines,
    )


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
