"""What a schedule costs on *emulated* hosts: links that are token buckets, and hosts that share one machine's cores.

The cost model of ``collectives/cost.py`` is of a real network. A rehearsal differs from one in ways that are known, and this model has them:

- A token bucket lets a burst pass after a pause (``launching/rehearsal``: 2 ms of its rate, at least 72 KiB), at both ends of a link. Ports
  that pause between rounds, as those of trees do, are faster for it; a ring's ports never pause.
- Whoever adds what has arrived uses a core, and the hosts share the cores. Algorithms that the engine runs in parts side by side add one
  part while the next one arrives, and whoever only receives adds one piece of a message (``cost.PIECE_BYTES``) while the next arrives.
- Where every host sends to several and receives from several at once, their messages leave in whatever order: ports wait for messages
  that are still behind others elsewhere, and then have several at once. In which order is drawn.
- Nobody waits for a round to end everywhere: a rank goes on when its own messages are there.
- All bytes pass through the same cores, those of the links included. Many hosts on few cores keep them busy for longer than the links take.
"""

import functools
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize

from scaletrain import plugins
from scaletrain.collectives import cost
from scaletrain.scaling.predict.fit import Parameter, Timing, intervals_of


class Links(NamedTuple):
    """Equal links between emulated hosts of one machine."""

    latency_s: float  # a message's, beside its bytes
    bandwidth_bytes_per_s: float
    add_bytes_per_s: float  # how fast one core adds what has arrived
    burst_bytes: float = 0.0  # a full token bucket
    cores: int = 1


_DRAWS = 20
FITTED = (
    "latency_s",
    "bandwidth_bytes_per_s",
    "add_bytes_per_s",
)  # what ``fit`` finds, in this order


class _Round(NamedTuple):
    sent: dict[int, int]  # chunks that leave a rank
    received: dict[int, int]
    added: dict[int, int]  # of those received
    pairs: frozenset[tuple[int, int]]


@functools.lru_cache(maxsize=512)
def _rounds(collective: str, size: int) -> tuple[int, tuple[_Round, ...]]:
    schedule = plugins.load("collective", collective)(size)
    rounds = tuple(
        _Round(
            Counter(t.src for t in transfers),
            Counter(t.dst for t in transfers),
            Counter(t.dst for t in transfers if t.add),
            frozenset((t.src, t.dst) for t in transfers),
        )
        for transfers in schedule.rounds
    )
    return schedule.num_chunks, rounds


def bytes_moved(collective: str, workers: int, num_bytes: float) -> float:
    """What one allreduce of ``num_bytes`` moves from one host to another, all hosts together."""
    num_chunks, rounds = _rounds(collective, workers)
    return num_bytes / num_chunks * sum(count for now in rounds for count in now.sent.values())


@functools.lru_cache(maxsize=512)
def _meetings(collective: str, size: int, parts: int) -> tuple[tuple[dict[int, float], ...], ...]:
    """For each of some draws and each round: how many messages longer a rank's port takes since it had to wait for some."""
    rounds = _rounds(collective, size)[1]
    to = [{s: [d for source, d in now.pairs if source == s] for s in now.sent} for now in rounds]
    crowded = [min(map(len, now.values())) > 1 and len(now) > 2 for now in to]
    if not any(crowded):
        return (({},) * len(rounds),)
    dice = np.random.default_rng(0)
    return tuple(
        tuple(
            _late(now, parts, dice) if many else {} for now, many in zip(to, crowded, strict=True)
        )
        for _ in range(_DRAWS)
    )


def _late(to: dict[int, list[int]], parts: int, dice: np.random.Generator) -> dict[int, float]:
    """Every port sends and receives a message a slot; a message is there when the port that it came from and its own are done with it."""
    slots: dict[int, list[int]] = {}
    for destinations in to.values():
        order = [d for _ in range(parts) for d in dice.permutation(sorted(destinations))]
        for slot, d in enumerate(order):
            slots.setdefault(d, []).append(slot)
    return {
        d: max(slot - i for i, slot in enumerate(sorted(of))) / parts for d, of in slots.items()
    }


def allreduce_s(collective: str, workers: int, num_bytes: float, on: Links) -> float:
    """Seconds until the last of ``workers`` hosts has the sum, when all begin at once with full token buckets."""
    draws = _meetings(collective, workers, cost.parts(collective, workers, num_bytes))
    return sum(_last_s(collective, workers, num_bytes, on, late) for late in draws) / len(draws)


def _last_s(
    collective: str, workers: int, num_bytes: float, on: Links, late: Sequence[dict[int, float]]
) -> float:
    num_chunks, rounds = _rounds(collective, workers)
    chunk = num_bytes / num_chunks
    chunk_s, burst_s = (n / on.bandwidth_bytes_per_s for n in (chunk, on.burst_bytes))
    ready = [0.0] * workers  # when each rank has done its rounds so far
    leaving, arriving = (
        [-math.inf] * workers,
        [-math.inf] * workers,
    )  # when a port's bucket is empty again, were it never to pause
    in_parts = cost.parts(collective, workers, num_bytes) > 1
    for now, behind in zip(rounds, late, strict=True):
        begins = {(s, d): max(ready[s], ready[d]) for s, d in now.pairs}
        first_out, first_in = (
            dict.fromkeys(now.sent, math.inf),
            dict.fromkeys(now.received, math.inf),
        )
        for (s, d), begin in begins.items():
            first_out[s], first_in[d] = min(first_out[s], begin), min(first_in[d], begin)
        for rank, count in now.sent.items():
            leaving[rank] = max(leaving[rank], first_out[rank] - burst_s) + count * chunk_s
        for rank, count in now.received.items():
            arriving[rank] = (
                max(arriving[rank], first_in[rank] - burst_s)
                + (count + behind.get(rank, 0.0)) * chunk_s
            )
        add_s_per_byte = (
            0.0 if in_parts else max(1.0, len(now.added) / on.cores) / on.add_bytes_per_s
        )
        after = list(ready)
        for (s, d), begin in begins.items():
            there = max(begin, leaving[s], arriving[d]) + on.latency_s
            after[s] = max(after[s], there)
            added = now.added.get(d, 0) * chunk
            after[d] = max(
                after[d],
                there + add_s_per_byte * (added if d in now.sent else min(added, cost.PIECE_BYTES)),
            )
        ready = after
    return max(ready)


def fit(timings: Sequence[Timing], known: Links) -> tuple[Links, list[Parameter]]:
    """Links that explain the timings of more than one worker best, and latency, bandwidth and speed of adding,
    with their intervals.

    The rest of ``known`` stays as it is. By least squares of the logarithms' differences, outliers weighing less.
    """
    used = [t for t in timings if t.workers > 1]

    def links(values: Sequence[float]) -> Links:
        found: dict[str, Any] = dict(zip(FITTED, values, strict=True))
        return known._replace(**found)

    def residuals(logs: np.ndarray) -> np.ndarray:
        on = links([float(value) for value in np.exp(logs)])
        return np.array(
            [
                math.log(allreduce_s(t.strategy, t.workers, t.num_bytes, on) / t.seconds)
                for t in used
            ]
        )

    start = float(np.median([t.num_bytes / t.seconds for t in used]))
    low, high = np.log([(1e-7, 0.1), (1e4, 1e12), (1e7, 1e12)]).T
    found = optimize.least_squares(
        residuals, np.log([5e-4, start, 2e9]), bounds=(low, high), loss="soft_l1", f_scale=0.05
    )
    parameters = intervals_of(found.x, found.jac, residuals(found.x))
    return links([parameter.value for parameter in parameters]), parameters
