"""What a step takes: computation at each batch size, the exchange, and how much of it hides behind backward."""

import functools
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from scaletrain.scaling.predict.network import Preset, allreduce_s, server_s

BUCKET_BYTES = 25 * 2**20  # DDP's default bucket


class Profile(NamedTuple):
    """How a pass goes: ``forward`` of its time, then backward, in which gradients become complete. ``points``: (part of the gradients'
    bytes, part of backward after which they are there), both growing to 1.

    Without a measurement: a third is forward, since backward costs about two forward passes, and gradients come in proportion to bytes.
    """

    forward: float = 1 / 3
    points: tuple[tuple[float, float], ...] = ((1.0, 1.0),)

    def complete(self, part: float) -> float:
        """The part of backward after which the first ``part`` of the gradients' bytes is there."""
        sizes, times = zip((0.0, 0.0), *self.points, strict=True)
        return float(np.interp(part, sizes, times))

    @classmethod
    def of_layers(cls, measured: Mapping[str, Any]) -> "Profile":
        """From what ``bench model`` wrote: backward visits the layers from the last to the first."""
        forward, backward = measured["forward_s"], measured["backward_s"]
        layers = measured["layers"][::-1]
        sizes, times = (
            np.cumsum([layer[key] for layer in layers]) for key in ("gradient_bytes", "backward_s")
        )
        points = tuple(
            (float(s / sizes[-1]), float(t / times[-1])) for s, t in zip(sizes, times, strict=True)
        )
        return cls(forward / (forward + backward), points)


USUAL = Profile()


class Compute(NamedTuple):
    """A worker's computation: ``fixed_s + sample_s * samples`` of forward and backward; then ``update_s``."""

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
    pass_s: float,
    costs: list[float],
    sizes: list[float],
    profile: Profile = USUAL,
    *,
    overlap: bool = True,
) -> float:
    """How much longer the step is for its exchanges, which run one after another while backward goes on.

    ``costs[i]`` seconds for bucket i of ``sizes[i]`` bytes, which leaves when all its gradients are there.
    """
    if not overlap:
        return sum(costs)
    forward, total = pass_s * profile.forward, sum(sizes) or 1.0
    done, until = 0.0, 0.0
    for cost, size in zip(costs, sizes, strict=True):
        until += size
        done = max(done, forward + (pass_s - forward) * profile.complete(until / total)) + cost
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
    overlap: bool = True, bucket_bytes: float = BUCKET_BYTES, profile: Profile = USUAL,
) -> float:  # fmt: skip
    """A synchronous step of ``workers``, each on ``share`` samples."""
    pass_s = compute.pass_s(share)
    sizes = (
        buckets(num_bytes, bucket_bytes)
        if overlap and not strategy.startswith("server")
        else [num_bytes]
    )
    costs = [exchange_s(strategy, workers, size, on) for size in sizes]
    hides = overlap and not strategy.startswith("server")
    return pass_s + exposed_s(pass_s, costs, sizes, profile, overlap=hides) + compute.update_s


@functools.lru_cache(maxsize=4096)
def slowest_factor(
    workers: int, backups: int, stragglers: Stragglers, draws: int = 2000, seed: int = 0
) -> float:
    """Mean over steps of the time until ``workers`` of ``workers + backups`` are done, in units of the computation without delays."""
    if stragglers.is_none:
        return 1.0
    total = workers + backups
    if total == 1:  # known; draws would only be near it
        return 1 + stragglers.slow_probability * (stragglers.slow_factor - 1) + stragglers.tail
    random = np.random.default_rng(seed)
    draws = max(50, min(draws, 4_000_000 // total))
    sigma = math.sqrt(math.log(1 + stragglers.variation**2))
    times = random.lognormal(-sigma * sigma / 2, sigma, size=(draws, total))
    times = np.where(
        random.random((draws, total)) < stragglers.slow_probability,
        times * stragglers.slow_factor,
        times,
    )
    if stragglers.tail:
        times = times + random.exponential(stragglers.tail, size=times.shape)
    return float(np.partition(times, workers - 1, axis=1)[:, workers - 1].mean())
