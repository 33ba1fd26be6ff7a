"""The cost of a schedule on *emulated* hosts, which share one machine.

Links are token buckets, and hosts share the machine's cores. The cost model of
``collectives/cost.py`` is that of a real network. A rehearsal differs from one in ways that are
known, and this model has them:

- A token bucket lets a burst pass after a pause, at both ends of a link (``rehearsal/links.py``: 2
  ms of its rate, at least 72 KiB). The ports of trees pause between rounds and are faster for it.
  The ports of a ring never pause.
- Adding what has arrived uses a core, and the hosts share the cores. Algorithms that the engine
  runs in parts side by side add one part while the next one arrives. A rank that only receives adds
  one piece of a message (``cutting.PIECE_BYTES``) while the next one arrives.
- Where every host sends to several and receives from several at once, messages leave in any order.
  Ports then wait for messages that are still behind others elsewhere, and later have several at
  once. The order is drawn.
- No rank waits for a round to end everywhere. It goes on when its own messages have arrived.
- All bytes pass through the same cores, also those of the links. Many hosts on few cores keep them
  busy for longer than the links take.
"""

import functools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize

from scaletrain import plugins
from scaletrain.collectives import cutting
from scaletrain.scaling.predict.calibration import Estimate
from scaletrain.scaling.predict.fit import Timing
from scaletrain.scaling.predict.search import estimates_of


class EmulatedLinks(NamedTuple):
    """Equal links between emulated hosts of one machine."""

    latency_s: float  # of a message, beside its bytes
    bandwidth_bytes_per_s: float
    add_bytes_per_s: float  # how fast one core adds what has arrived
    burst_bytes: float = 0.0  # a full token bucket
    cores: int = 1


# The figures that ``fit`` finds: where it starts (None: at the timings' own rate) and its bounds.
_FITTED = {
    "latency_s": (5e-4, 1e-7, 0.1),
    "bandwidth_bytes_per_s": (None, 1e4, 1e12),
    "add_bytes_per_s": (2e9, 1e7, 1e12),
}
_DRAWS = 20  # orders of messages that are drawn for a prediction


class _Round(NamedTuple):
    """A round of a schedule, in chunks."""

    sent: Mapping[int, int]  # rank -> chunks that leave it
    received: Mapping[int, int]  # rank -> chunks that arrive
    added: Mapping[int, int]  # rank -> of these, chunks that are added
    pairs: frozenset[tuple[int, int]]  # (source, destination) of every message


class _Rounds(NamedTuple):
    """A schedule, as this model needs it."""

    num_chunks: int
    rounds: tuple[_Round, ...]


@functools.lru_cache(maxsize=512)
def _rounds(collective: str, size: int) -> _Rounds:
    schedule = plugins.load("collective", collective)(size)
    rounds = []
    for transfers in schedule.rounds:
        sent: Counter[int] = Counter()
        received: Counter[int] = Counter()
        added: Counter[int] = Counter()
        for transfer in transfers:
            sent[transfer.src] += 1
            received[transfer.dst] += 1
            if transfer.add:
                added[transfer.dst] += 1
        pairs = frozenset((transfer.src, transfer.dst) for transfer in transfers)
        rounds.append(_Round(sent, received, added, pairs))
    return _Rounds(schedule.num_chunks, tuple(rounds))


# rank -> by how many chunks' time its port is late, because it had to wait for messages.
_Lateness = Mapping[int, float]


@functools.lru_cache(maxsize=512)
def _drawn_lateness(collective: str, size: int, parts: int) -> list[list[_Lateness]]:
    """Return the lateness of each round, for each of some draws of the messages' order.

    Args:
        collective: the algorithm.
        size: number of ranks.
        parts: in how many parts a message travels.
    """
    crowded = [_crowded_destinations(now) for now in _rounds(collective, size).rounds]
    if not any(crowded):
        return [[{} for _ in crowded]]
    random = np.random.default_rng(0)
    draws = []
    for _ in range(_DRAWS):
        draws.append([_lateness(destinations, parts, random) for destinations in crowded])
    return draws


def _crowded_destinations(now: _Round) -> dict[int, list[int]]:
    """Return each source's destinations, if messages can get in each other's way in this round.

    They do where three or more ranks send to two or more others each. Otherwise the result is
    empty.
    """
    destinations: dict[int, list[int]] = {source: [] for source in now.sent}
    for source, destination in now.pairs:
        destinations[source].append(destination)
    fewest = min(len(ranks) for ranks in destinations.values())
    if fewest > 1 and len(destinations) > 2:
        return destinations
    return {}


def _lateness(
    destinations: Mapping[int, list[int]], parts: int, random: np.random.Generator
) -> _Lateness:
    """Draw the order in which each source sends, and return how late the destinations are for it.

    Every port sends and receives one message a slot. A message has arrived when the port that it
    came from and its own port are done with it.
    """
    slots: dict[int, list[int]] = {}  # destination -> the slots in which its messages are sent
    for ranks in destinations.values():
        order: list[int] = []
        for _ in range(parts):
            order.extend(random.permutation(sorted(ranks)))
        for slot, destination in enumerate(order):
            slots.setdefault(destination, []).append(slot)
    lateness = {}
    for destination, sent_in in slots.items():
        waits = [slot - index for index, slot in enumerate(sorted(sent_in))]
        lateness[destination] = max(waits) / parts
    return lateness


def allreduce_s(collective: str, workers: int, num_bytes: float, links: EmulatedLinks) -> float:
    """Return the seconds until the last host has the sum.

    All hosts begin at once, with full token buckets.

    Args:
        collective: an algorithm without options.
        workers: number of hosts.
        num_bytes: size of the message.
        links: between the hosts.
    """
    parts = cutting.parts(collective, workers, num_bytes)
    draws = _drawn_lateness(collective, workers, parts)
    seconds = 0.0
    for lateness in draws:
        seconds += _last_s(collective, workers, num_bytes, links, lateness)
    return seconds / len(draws)


def _last_s(
    collective: str,
    workers: int,
    num_bytes: float,
    links: EmulatedLinks,
    lateness: Sequence[_Lateness],
) -> float:
    """Return the seconds until the last host has the sum, for one draw of the messages' order."""
    num_chunks, rounds = _rounds(collective, workers)
    chunk_bytes = num_bytes / num_chunks
    is_in_parts = cutting.parts(collective, workers, num_bytes) > 1
    ports = _Ports(workers, links, chunk_bytes)
    ready = [0.0] * workers  # when each rank has done its rounds so far
    for now, late in zip(rounds, lateness, strict=True):
        # A message begins when both of its ranks are there.
        begins = {}
        for source, destination in now.pairs:
            begins[source, destination] = max(ready[source], ready[destination])
        ports.pass_round(now, begins, late)
        add_s_per_byte = 0.0
        if not is_in_parts:  # else one part is added while the next one arrives
            adding_hosts_a_core = max(1.0, len(now.added) / links.cores)
            add_s_per_byte = adding_hosts_a_core / links.add_bytes_per_s
        after = list(ready)
        for (source, destination), begin in begins.items():
            arrived = max(begin, ports.leaving[source], ports.arriving[destination])
            arrived += links.latency_s
            after[source] = max(after[source], arrived)
            # What is still to be added after the last byte has arrived.
            added_bytes = now.added.get(destination, 0) * chunk_bytes
            if destination not in now.sent:
                added_bytes = min(added_bytes, cutting.PIECE_BYTES)
            added = arrived + add_s_per_byte * added_bytes
            after[destination] = max(after[destination], added)
        ready = after
    return max(ready)


class _Ports:
    """The token buckets at both ends of each host's link.

    ``leaving`` and ``arriving`` hold when each bucket is empty again, by rank.
    """

    def __init__(self, workers: int, links: EmulatedLinks, chunk_bytes: float):
        self._chunk_s = chunk_bytes / links.bandwidth_bytes_per_s
        self._burst_s = links.burst_bytes / links.bandwidth_bytes_per_s
        self.leaving = [-math.inf] * workers
        self.arriving = [-math.inf] * workers

    def pass_round(
        self, now: _Round, begins: Mapping[tuple[int, int], float], late: _Lateness
    ) -> None:
        """Let the chunks of a round through, whose messages begin at these times."""
        first_out = dict.fromkeys(now.sent, math.inf)
        first_in = dict.fromkeys(now.received, math.inf)
        for (source, destination), begin in begins.items():
            first_out[source] = min(first_out[source], begin)
            first_in[destination] = min(first_in[destination], begin)
        for rank, chunks in now.sent.items():
            full_s = first_out[rank] - self._burst_s  # a bucket is full after a pause
            self.leaving[rank] = max(self.leaving[rank], full_s) + chunks * self._chunk_s
        for rank, chunks in now.received.items():
            full_s = first_in[rank] - self._burst_s
            slots = chunks + late.get(rank, 0.0)
            self.arriving[rank] = max(self.arriving[rank], full_s) + slots * self._chunk_s


def fit(
    timings: Sequence[Timing], known: EmulatedLinks
) -> tuple[EmulatedLinks, dict[str, Estimate]]:
    """Return the links that explain timings best, and the fitted figures with their intervals.

    Latency, bandwidth and the speed of adding are fitted. The rest of ``known`` stays as it is. The
    sum of the squared differences of the logarithms is least; outliers weigh less.

    Args:
        timings: exchanges; those of one worker are not used.
        known: the token buckets and the cores.
    """
    used = [timing for timing in timings if timing.workers > 1]

    def links_of(values: Sequence[float]) -> EmulatedLinks:
        latency_s, bandwidth, add_bytes_per_s = values
        return known._replace(
            latency_s=latency_s,
            bandwidth_bytes_per_s=bandwidth,
            add_bytes_per_s=add_bytes_per_s,
        )

    def residuals(logs: np.ndarray) -> np.ndarray:
        links = links_of([float(value) for value in np.exp(logs)])
        errors = []
        for timing in used:
            predicted_s = allreduce_s(timing.strategy, timing.workers, timing.num_bytes, links)
            errors.append(math.log(predicted_s / timing.seconds))
        return np.array(errors)

    usual_rate = float(np.median([timing.num_bytes / timing.seconds for timing in used]))
    starts = [start or usual_rate for start, _, _ in _FITTED.values()]
    lowest, highest = np.log([(low, high) for _, low, high in _FITTED.values()]).T
    result = optimize.least_squares(
        residuals, np.log(starts), bounds=(lowest, highest), loss="soft_l1", f_scale=0.05
    )
    estimates = estimates_of(result.x, result.jac, residuals(result.x))
    fitted = links_of([estimate.value for estimate in estimates])
    return fitted, dict(zip(_FITTED, estimates, strict=True))
