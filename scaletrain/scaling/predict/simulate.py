"""What if: step time, speed-up and cost of every strategy at every worker count, from the models alone."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from scaletrain import plugins
from scaletrain.collectives.schedule import proved
from scaletrain.errors import UserError, unknown
from scaletrain.scaling.predict import step_time
from scaletrain.scaling.predict.network import Preset
from scaletrain.scaling.predict.step_time import Compute, Profile, Stragglers

MODEL_BYTES = {  # float32 weights; googlenet with both auxiliary heads, as it is trained
    "lenet": 431_080 * 4, "squeezenet": 1_248_424 * 4, "googlenet": 13_378_280 * 4, "nin": 7_595_176 * 4,
    "alexnet": 60_965_224 * 4, "vgg16": 138_357_544 * 4, "vgg19": 143_667_240 * 4, "resnet50": 25_557_032 * 4,
}  # fmt: skip


class Job(NamedTuple):
    """What is trained, on what."""

    num_bytes: float
    batch_size: int  # global (strong) or a worker's (weak)
    compute: Compute
    network: Preset
    mode: str = "strong"
    overlap: bool = True
    profile: Profile = step_time.USUAL  # of a pass: when gradients are there to leave
    stragglers: Stragglers = Stragglers()
    epoch_samples: int | None = None
    price_per_worker_hour: float | None = None


class Point(NamedTuple):
    """One strategy at one worker count. ``machines``: the workers, and the servers and backup workers beside them; ``cost_per_epoch``
    is theirs."""

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
    """Every collective on disk that needs no options, and one and many servers."""
    return [name for name in plugins.names("collective") if name != "two_level"] + [
        "server",
        "server:4",
        "server:16",
    ]


def check(names: Sequence[str]) -> None:
    """Raises ``UserError`` for a strategy that there is not. ``+N`` at the end adds N backup workers."""
    for name in names:
        strategy, _, backups = name.partition("+")
        kind, _, servers = strategy.partition(":")
        if backups and not backups.isdigit():
            raise UserError(f"--strategy: {name!r}: backup workers are a number, as in server+4")
        if kind == "server" and (not servers or (servers.isdigit() and int(servers) > 0)):
            continue
        if kind not in [*plugins.names("collective"), "none"] or servers:
            raise unknown(
                "--strategy", name, [*plugins.names("collective"), "none", "server", "server:4"]
            )
        if kind in plugins.names("collective"):
            for size in (2, 5, 8):
                proved(kind, size)


def point(job: Job, strategy: str, workers: int) -> Point:
    """One strategy (``ring``, ``server:4``, ``server+3`` with three backup workers) at one worker count."""
    name, _, extra = strategy.partition("+")
    backups = int(extra or 0)
    share = job.batch_size / workers if job.mode == "strong" else job.batch_size
    slow = step_time.slowest_factor(workers, backups, job.stragglers)
    compute = Compute(job.compute.sample_s * slow, job.compute.fixed_s * slow, job.compute.update_s)
    ports = workers + backups if name.startswith("server") else workers
    step = step_time.step_s(
        name,
        ports,
        share,
        job.num_bytes,
        compute,
        job.network,
        overlap=job.overlap,
        profile=job.profile,
    )
    quiet = step_time.step_s("none", 1, share, job.num_bytes, compute, job.network)
    alone = step_time.step_s("none", 1, job.batch_size, job.num_bytes, job.compute, job.network)
    batch = share * workers
    rate = batch / step
    speedup = rate / (job.batch_size / alone)
    # One worker alone has nobody to exchange with.
    servers = (
        int(name.partition(":")[2] or 1)
        if name.startswith("server") and workers + backups > 1
        else 0
    )
    machines, cost = workers + backups + servers, None
    if job.price_per_worker_hour is not None and job.epoch_samples:
        cost = job.price_per_worker_hour * machines * job.epoch_samples / rate / 3600
    return Point(
        strategy, workers, step, step - quiet, rate, speedup, speedup / workers, cost, machines
    )


def simulate(job: Job, workers: Sequence[int], names: Sequence[str]) -> list[Point]:
    """Every strategy at every worker count. Strong scaling ends where a worker would have less than one sample."""
    check(names)
    most = job.batch_size if job.mode == "strong" else max(workers)
    fitting = [count for count in workers if count <= most]
    if not fitting:
        raise UserError(
            f"--workers: {min(workers)} workers cannot share a batch of {job.batch_size} (allowed: 1 to {job.batch_size})"
        )
    return [point(job, name, count) for count in fitting for name in names]


def best(points: Sequence[Point]) -> dict[int, Point]:
    """The fastest strategy at each worker count; of equally fast ones the one with fewest machines."""
    return {
        workers: min(equal, key=lambda p: p.machines) for workers, equal in fastest(points).items()
    }


def fastest(points: Sequence[Point]) -> dict[int, list[Point]]:
    """The strategies at each worker count that none beats."""
    found: dict[int, list[Point]] = {}
    for workers in dict.fromkeys(p.workers for p in points):
        alike = [p for p in points if p.workers == workers]
        least = min(p.step_s for p in alike)
        found[workers] = [p for p in alike if p.step_s <= least * (1 + 1e-9)]
    return found


def as_rows(points: Sequence[Point]) -> list[dict[str, Any]]:
    return [p._asdict() for p in points]
