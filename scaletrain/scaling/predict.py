"""What a step takes: computation at each batch size, the exchange, and how much of it hides behind backward."""

import math
from typing import NamedTuple

import numpy as np

from scaletrain.scaling.network import Preset, allreduce_s, server_s

FORWARD_SHARE = 1 / 3  # of a step's computation; backward costs about two forward passes
BUCKET_BYTES = 25 * 2**20  # DDP's default bucket


class Compute(NamedTuple):
    """A worker's computation: ``fixed_s + sample_s * samples``, of which a third is forward; then ``update_s``."""

    sample_s: float
    fixed_s: float = 0.0
    update_s: float = 0.0

    def pass_s(self, samples: float) -> float:
        return self.fixed_s + self.sample_s * samples


class Stragglers(NamedTuple):
    """How a worker's computation varies from step to step: lognormal with this coefficient of variation, rare long delays, and an
    exponential delay of mean ``tail`` (in units of the computation)."""

    variation: float = 0.0  # standard deviation / mean
    slow_probability: float = 0.0
    slow_factor: float = 1.0  # a slow step takes so many times as long
    tail: float = 0.0

    @property
    def is_none(self) -> bool:
        return self.variation == 0 and self.slow_probability == 0 and self.tail == 0


def buckets(num_bytes: float, bucket_bytes: float = BUCKET_BYTES) -> list[float]:
    """DDP's layout: a first bucket of 1 MiB, so that communication starts early, then full ones, in the order of backward."""
    first = min(num_bytes, 2.0**20, bucket_bytes)
    rest = num_bytes - first
    count = math.ceil(rest / bucket_bytes) if rest > 0 else 0
    return [first, *(rest / count for _ in range(count))]


def exposed_s(
    pass_s: float, costs: list[float], sizes: list[float], profile: list[float] | None = None, *, overlap: bool = True
) -> float:
    """How much longer the step is for its exchanges, which run one after another while backward goes on.

    ``costs[i]`` seconds for bucket i of ``sizes[i]`` bytes. ``profile[i]``: the part of backward after which bucket i is complete;
    default: in proportion to bytes.
    """
    if not overlap:
        return sum(costs)
    forward, total = pass_s * FORWARD_SHARE, sum(sizes) or 1.0
    done, until = 0.0, 0.0
    for index, (cost, size) in enumerate(zip(costs, sizes, strict=True)):
        until += size
        part = profile[index] if profile else until / total
        done = max(done, forward + (pass_s - forward) * part) + cost
    return max(0.0, done - pass_s)


def exchange_s(strategy: str, workers: int, num_bytes: float, on: Preset) -> float:
    """Seconds of one exchange of ``num_bytes``: a collective's name, ``server`` or ``server:K`` (K servers), or ``none``."""
    if strategy == "none" or workers <= 1:
        return 0.0
    name, _, servers = strategy.partition(":")
    if name == "server":
        return server_s(workers, num_bytes, on, servers=int(servers or 1))
    return allreduce_s(name, workers, num_bytes, on)


def step_s(
    strategy: str, workers: int, share: float, num_bytes: float, compute: Compute, on: Preset, *,
    overlap: bool = True, bucket_bytes: float = BUCKET_BYTES,
) -> float:  # fmt: skip
    """A synchronous step of ``workers``, each on ``share`` samples."""
    pass_s = compute.pass_s(share)
    sizes = buckets(num_bytes, bucket_bytes) if overlap and not strategy.startswith("server") else [num_bytes]
    costs = [exchange_s(strategy, workers, size, on) for size in sizes]
    hides = overlap and not strategy.startswith("server")
    return pass_s + exposed_s(pass_s, costs, sizes, overlap=hides) + compute.update_s


def slowest_factor(workers: int, backups: int, stragglers: Stragglers, draws: int = 2000, seed: int = 0) -> float:
    """Mean over steps of the time until ``workers`` of ``workers + backups`` are done, in units of a worker's mean time."""
    if stragglers.is_none:
        return 1.0
    random = np.random.default_rng(seed)
    total = workers + backups
    draws = max(50, min(draws, 4_000_000 // total))
    sigma = math.sqrt(math.log(1 + stragglers.variation**2))
    times = random.lognormal(-sigma * sigma / 2, sigma, size=(draws, total))
    times = np.where(random.random((draws, total)) < stragglers.slow_probability, times * stragglers.slow_factor, times)
    if stragglers.tail:
        times = times + random.exponential(stragglers.tail, size=times.shape)
    return float(np.partition(times, workers - 1, axis=1)[:, workers - 1].mean())
