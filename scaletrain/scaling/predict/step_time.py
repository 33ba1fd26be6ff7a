"""How long a step takes: computation, the exchange, and how much of it hides behind backward."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from scaletrain.config.grammar import split_spec
from scaletrain.scaling.predict.layers import ModelTimes
from scaletrain.scaling.predict.network import (
    INCAST_S,
    INCAST_SENDERS,
    OUR_SERVERS,
    Fabric,
    Servers,
    allreduce_s,
    is_crowded,
    server_s,
)

BUCKET_BYTES = 25 * 2**20  # DDP's default bucket
FIRST_BUCKET_BYTES = 2.0**20  # DDP's, smaller so that communication starts early


class PassProfile(NamedTuple):
    """How a pass is divided: forward, then backward, in which gradients become complete.

    Without a measurement, a third of a pass is forward, because backward costs about two forward
    passes, and gradients become complete in proportion to their bytes.

    Attributes:
        forward: part of the pass that is forward.
        points: (part of the gradients' bytes, part of backward after which they are complete),
            both growing to 1.
    """

    forward: float = 1 / 3
    points: tuple[tuple[float, float], ...] = ((1.0, 1.0),)

    def complete(self, part: float) -> float:
        """Return the part of backward after which this part of the gradients is complete."""
        sizes = [0.0]
        times = [0.0]
        for size, time in self.points:
            sizes.append(size)
            times.append(time)
        return float(np.interp(part, sizes, times))

    @classmethod
    def of_layers(cls, model: ModelTimes) -> "PassProfile":
        """Return the profile of a model from the times of its layers."""
        backward_order = model.layers[::-1]  # the last layer's gradient comes first
        sizes = np.cumsum([layer.gradient_bytes for layer in backward_order])
        times = np.cumsum([layer.backward_s for layer in backward_order])
        points = []
        for size, time in zip(sizes, times, strict=True):
            points.append((float(size / sizes[-1]), float(time / times[-1])))
        return cls(model.forward_s / model.pass_s, tuple(points))


USUAL_PROFILE = PassProfile()


class ComputeCost(NamedTuple):
    """A worker's computation: forward and backward of its samples, then the update."""

    sample_s: float  # forward and backward, for each sample
    fixed_s: float = 0.0  # forward and backward, for each step
    update_s: float = 0.0

    def pass_s(self, samples: float) -> float:
        """Return the seconds of forward and backward."""
        return self.fixed_s + self.sample_s * samples

    def slowed(self, factor: float) -> "ComputeCost":
        """Return the cost when forward and backward take ``factor`` times as long."""
        return self._replace(sample_s=self.sample_s * factor, fixed_s=self.fixed_s * factor)


class Stragglers(NamedTuple):
    """How a worker's computation varies from step to step.

    Attributes:
        variation: standard deviation / mean of a lognormal factor.
        slow_probability: of a step being slow.
        slow_factor: how many times as long a slow step takes.
        tail: mean of an exponential delay, in units of the computation.
    """

    variation: float = 0.0
    slow_probability: float = 0.0
    slow_factor: float = 1.0
    tail: float = 0.0

    @property
    def is_none(self) -> bool:
        """True if every step takes the same time."""
        return self.variation == 0 and self.slow_probability == 0 and self.tail == 0


# What a plan allows for where nobody has measured it. A synchronous step of 200 workers took
# about 10 % longer than an asynchronous one (Abadi et al., OSDI 2016, Inception-v3), and the
# slowest of 200 is 2.75 standard deviations above the mean.
USUAL_STRAGGLERS = Stragglers(variation=0.036)


def buckets(num_bytes: float, bucket_bytes: float = BUCKET_BYTES) -> list[float]:
    """Return the sizes of DDP's buckets, in the order of backward.

    The first bucket has at most 1 MiB. The others are equal, and at most ``bucket_bytes`` each.
    """
    first = min(num_bytes, FIRST_BUCKET_BYTES, bucket_bytes)
    rest = num_bytes - first
    if rest <= 0:
        return [first]
    count = math.ceil(rest / bucket_bytes)
    # Equal, since the borders between parameters, where DDP cuts, are not known here.
    return [first, *[rest / count] * count]


def exposed_s(
    pass_s: float,
    costs: Sequence[float],
    sizes: Sequence[float],
    profile: PassProfile = USUAL_PROFILE,
    *,
    overlap: bool = True,
) -> float:
    """Return how much longer a step is for its exchanges, which run one after another.

    A bucket leaves when all its gradients are complete, and backward goes on meanwhile.

    Args:
        pass_s: seconds of forward and backward.
        costs: seconds of each bucket's exchange.
        sizes: bytes of each bucket.
        profile: when gradients become complete.
        overlap: False: every exchange waits for the end of backward.
    """
    if not overlap:
        return sum(costs)
    forward_s = pass_s * profile.forward
    backward_s = pass_s - forward_s
    # A model without parameters has one bucket of 0 bytes.
    total = sum(sizes) or 1.0
    exchanged_s = 0.0  # when the exchanges so far have ended
    bytes_so_far = 0.0
    for cost, size in zip(costs, sizes, strict=True):
        # A bucket waits for its own gradients and for the exchange of the bucket before.
        bytes_so_far += size
        complete_s = forward_s + backward_s * profile.complete(bytes_so_far / total)
        exchanged_s = max(exchanged_s, complete_s) + cost
    return max(0.0, exchanged_s - pass_s)


class Strategy(NamedTuple):
    """A way to exchange gradients, as the models know it."""

    name: str  # a collective, ``server`` or ``none``
    servers: int = 0  # parameter servers beside the workers
    backups: int = 0  # workers beyond those whose gradients a step waits for
    segments: int | None = None  # of a pipelined tree; None: its default

    @property
    def has_servers(self) -> bool:
        """True if gradients go to parameter servers."""
        return self.name == "server"

    @classmethod
    def parse(cls, text: str) -> "Strategy":
        """Return the strategy that a text names.

        >>> Strategy.parse("server:4+3")
        Strategy(name='server', servers=4, backups=3, segments=None)
        >>> Strategy.parse("double_tree:segments=64").segments
        64

        Raises:
            ValueError: a number of servers, of backup workers or of segments is not a number.
        """
        kind, _, backups = text.partition("+")
        spec = split_spec(kind)
        if spec.name == "server":
            return cls(spec.name, int(spec.rest or 1), int(backups or 0))
        segments = spec.rest.removeprefix("segments=")
        return cls(spec.name, 0, int(backups or 0), int(segments) if segments else None)


def exchange_s(
    strategy: str | Strategy,
    workers: int,
    num_bytes: float,
    fabric: Fabric,
    servers: Servers = OUR_SERVERS,
) -> float:
    """Return the seconds of one exchange.

    Args:
        strategy: itself, or as ``Strategy.parse`` takes it.
        workers: workers that exchange.
        num_bytes: size of the gradients.
        fabric: the network.
        servers: what servers are like; the strategy says how many.
    """
    parsed = Strategy.parse(strategy) if isinstance(strategy, str) else strategy
    if parsed.name == "none" or workers <= 1:
        return 0.0
    if parsed.has_servers:
        return server_s(workers, num_bytes, fabric, servers._replace(number=parsed.servers))
    return allreduce_s(parsed.name, workers, num_bytes, fabric, parsed.segments)


def incast_s(strategy: Strategy, workers: int, fabric: Fabric) -> float:
    """Return the seconds that TCP may lose where many hosts send to one port at once."""
    if strategy.name == "none" or not fabric.drops_packets:
        return 0.0
    if strategy.has_servers:
        crowded = -(-workers // fabric.workers_per_host) > INCAST_SENDERS
    else:
        crowded = is_crowded(strategy.name, workers, fabric, strategy.segments)
    return INCAST_S if crowded else 0.0


class Band(NamedTuple):
    """The seconds of a step between two assumptions."""

    low: float  # all of the exchange that can hide behind backward does
    high: float  # none of it does, TCP times out where it may, and workers may be late

    @property
    def middle(self) -> float:
        """The geometric mean: as many times ``low`` as ``high`` is as many times it."""
        return math.sqrt(self.low * self.high)


@dataclasses.dataclass(frozen=True)
class StepModel:
    """The quantities behind a synchronous step's time, beside the strategy and the workers.

    Attributes:
        num_bytes: size of the gradients.
        compute: a worker's computation.
        fabric: the network.
        overlap: exchanges run while backward goes on.
        profile: when gradients become complete.
        servers: what parameter servers are like.
    """

    num_bytes: float
    compute: ComputeCost
    fabric: Fabric
    overlap: bool = True
    profile: PassProfile = USUAL_PROFILE
    servers: Servers = OUR_SERVERS

    def step_s(self, strategy: str | Strategy, workers: int, share: float) -> float:
        """Return the seconds of a step of ``workers``, each on ``share`` samples."""
        pass_s = self.compute.pass_s(share)
        # Without overlap, all gradients leave as one message after backward.
        sizes = buckets(self.num_bytes) if self.overlap else [self.num_bytes]
        costs = [exchange_s(strategy, workers, size, self.fabric, self.servers) for size in sizes]
        exposed = exposed_s(pass_s, costs, sizes, self.profile, overlap=self.overlap)
        return pass_s + exposed + self.compute.update_s


@functools.lru_cache(maxsize=4096)
def slowest_factor(
    workers: int, backups: int, stragglers: Stragglers, draws: int = 2000, seed: int = 0
) -> float:
    """Return how much longer a step computes because it waits for its slowest workers.

    The result is the mean time until ``workers`` of ``workers + backups`` are done, in units of the
    computation without delays.

    Args:
        workers: gradients that a step waits for.
        backups: workers beyond them, whose late gradients are dropped.
        stragglers: how the computation varies.
        draws: steps that are drawn, fewer for many workers.
        seed: of the random numbers.
    """
    if stragglers.is_none:
        return 1.0
    total = workers + backups
    if total == 1:  # the mean is known; drawn steps would only be near it
        return 1 + stragglers.slow_probability * (stragglers.slow_factor - 1) + stragglers.tail
    random = np.random.default_rng(seed)
    # At most four million numbers at once, which is 32 MB an array.
    draws = max(50, min(draws, 4_000_000 // total))
    # A lognormal with mean 1 and this coefficient of variation.
    sigma = math.sqrt(math.log(1 + stragglers.variation**2))
    times = random.lognormal(-sigma * sigma / 2, sigma, size=(draws, total))
    is_slow = random.random((draws, total)) < stragglers.slow_probability
    times = np.where(is_slow, times * stragglers.slow_factor, times)
    if stragglers.tail:
        times = times + random.exponential(stragglers.tail, size=times.shape)
    last = workers - 1  # the index of the last gradient that is waited for
    # Only the element at ``last`` has to be in its place: no need to sort.
    return float(np.partition(times, last, axis=1)[:, last].mean())
