"""The automatic choice of an algorithm: a short calibration on the actual wires, a model of what each costs, a choice that all ranks share.

The network model (``collectives.cost``), fitted to two probes, drops candidates that are far behind; the others race at a few sizes, and
between these a straight line is drawn: latency plus bytes over bandwidth. The result is kept in a file, so that a job chooses the same
algorithms, and so adds in the same order, from run to run.
"""

import hashlib
import json
import os
import platform
import time
from bisect import bisect
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, NamedTuple

import torch

from scaletrain import __version__
from scaletrain.collectives.cost import Network, predict
from scaletrain.engine.transport import Group

if TYPE_CHECKING:
    from scaletrain.engine.choice import Engine

# The last is large: token buckets and socket buffers let short messages pass faster than the wire.
SIZES = (4 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20)
_LONG_S = 0.3  # where a message takes this long, larger ones are not tried: it is the wire's rate that counts
_ROUNDS = 3
_FAR_BEHIND = 2.0  # a candidate that the model puts this far behind the best is not timed
_BEHIND = 1.25  # one that was never closer to the fastest than this leaves the race
_PROBE_BYTES = 1 << 20
_AS_FAST = 1.05  # few timings do not tell these apart: the wire's own allreduce leaves computation more of the cores
_SAME_WIRE = 1.7  # a kept calibration is used when the probe takes no more than this much longer or shorter than it did


class Choice(NamedTuple):
    collective: str
    segments: int  # parts that go through the schedule side by side


PROBE = Choice("recursive_doubling", 1)


class Tuning(NamedTuple):
    """Seconds of each candidate at the first of ``SIZES``; and of the probe, by which the wire is known again."""

    seconds: dict[Choice, tuple[float, ...]]
    probe_s: float

    def predict(self, choice: Choice, num_bytes: int) -> float:
        times = self.seconds[choice]
        sizes = SIZES[: len(times)]
        if num_bytes > sizes[-1]:
            # The largest decides. A line through the last two would favour whom the smaller one held up, such as a ring by its many messages.
            return times[-1] * num_bytes / sizes[-1]
        if num_bytes <= sizes[0]:  # on a slow wire the only size that was timed
            return times[0]
        place = min(bisect(sizes, num_bytes), len(sizes) - 1)
        (a, b), (at_a, at_b) = sizes[place - 1 : place + 1], times[place - 1 : place + 1]
        return at_a + (at_b - at_a) * (num_bytes - a) / (b - a)

    def choose(self, num_bytes: int) -> Choice:
        expected = {choice: self.predict(choice, num_bytes) for choice in self.seconds}
        fastest = min(expected, key=expected.__getitem__)
        own = (choice for choice in expected if choice.collective == "native")
        return next(
            (choice for choice in own if expected[choice] <= _AS_FAST * expected[fastest]), fastest
        )


def tune(
    engine: "Engine", group: Group, candidates: list[Choice], transport: str, hosts: list[str]
) -> Tuning:
    """Read or measure (collective)."""
    [probe_s] = _agreed(engine, [_time(engine, PROBE, torch.zeros(_PROBE_BYTES // 4))])
    path = _path(candidates, transport, [hosts.index(host) for host in hosts])
    if group.rank == 0:
        kept = _read(path)
        same = kept is not None and 1 / _SAME_WIRE < probe_s / kept.probe_s < _SAME_WIRE
        group.store.set("tuning", _dump(kept) if kept is not None and same else "")
    if text := group.store.get("tuning").decode():
        return _load(text)
    tuning = Tuning(_measure(engine, group.size, candidates), probe_s)
    if group.rank == 0:
        _write(path, tuning)
    return tuning


def _measure(
    engine: "Engine", size: int, candidates: list[Choice]
) -> dict[Choice, tuple[float, ...]]:
    network = _network(engine, size)
    rows: list[dict[Choice, float]] = []
    for num_bytes in SIZES:
        # The wire's own allreduce is nothing that the model knows: it is always in the race.
        expected = {
            c: predict(c.collective, size, num_bytes, network)
            for c in candidates
            if c.collective != "native"
        }
        far = _FAR_BEHIND * min(expected.values())
        racing = [c for c in candidates if expected.get(c, 0.0) <= far]
        # Not timed where it cannot win: a pessimistic figure stands in its place.
        rows.append(
            {c: _FAR_BEHIND * s for c, s in expected.items()} | _race(engine, racing, num_bytes)
        )
        if min(rows[-1].values()) > _LONG_S:
            break
    return {c: tuple(row[c] for row in rows) for c in candidates}


def _network(engine: "Engine", size: int) -> Network:
    """Latency and bandwidth from two probes; recursive doubling moves the whole message in each of its rounds."""
    few, many = SIZES[0], 4 << 20
    ring = Choice("ring", 1)
    low, high = _agreed(
        engine,
        [_time(engine, PROBE, torch.zeros(few // 4)), _time(engine, ring, torch.zeros(many // 4))],
    )
    latency_s = low / predict(PROBE.collective, size, 0, Network(1.0, 1.0))
    wire_s = max(high - predict(ring.collective, size, 0, Network(latency_s, 1.0)), high / 10)
    return Network(latency_s, predict(ring.collective, size, many, Network(0.0, 1.0)) / wire_s)


def _race(engine: "Engine", racing: list[Choice], num_bytes: int) -> dict[Choice, float]:
    """Seconds of each, the median of the slowest rank's. They run in turn, so that a slow moment of the machine hits all alike."""
    tensor = torch.zeros(num_bytes // 4)
    found: dict[Choice, list[float]] = {c: [] for c in racing}
    for _ in range(_ROUNDS):
        for choice, seconds in zip(
            racing, _agreed(engine, [_time(engine, c, tensor) for c in racing]), strict=True
        ):
            found[choice].append(seconds)
        fastest = min(median(times) for times in found.values())
        racing = [c for c in racing if min(found[c]) <= _BEHIND * fastest]
    return {c: median(times) for c, times in found.items()}


def _time(engine: "Engine", choice: Choice, tensor: torch.Tensor) -> float:
    """Seconds on this rank, after a run that makes connections and buffers. Of a short message the least of several: on a busy host most runs
    tell how long the system lets a rank wait, which differs from run to run by more than the algorithms do."""
    times = []
    for _ in range(6 if tensor.nbytes <= SIZES[1] else 2 if tensor.nbytes <= SIZES[2] else 1):
        began = time.perf_counter()
        engine.run(choice, tensor)
        times.append(time.perf_counter() - began)
    return min(times[1:] or times)


def _agreed(engine: "Engine", seconds: list[float]) -> list[float]:
    """The slowest rank's figures, equal on all ranks: so is the choice."""
    tensor = torch.tensor(seconds, dtype=torch.float64)
    engine.run(PROBE, tensor, torch.maximum)
    return tensor.tolist()


def _path(candidates: list[Choice], transport: str, layout: list[int]) -> Path:
    """By what is asked and who shares a host with whom; that it is the same network is the probe's to say."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scaletrain"
    facts = json.dumps([__version__, platform.node(), candidates, transport, layout])
    return root / f"tuning-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"


def _dump(tuning: Tuning) -> str:
    rows = [[*choice, *times] for choice, times in tuning.seconds.items()]
    return json.dumps({"probe_s": tuning.probe_s, "seconds": rows})


def _load(text: str) -> Tuning:
    tree = json.loads(text)
    seconds = {
        Choice(str(row[0]), int(row[1])): tuple(map(float, row[2:])) for row in tree["seconds"]
    }
    return Tuning(seconds, float(tree["probe_s"]))


def _read(path: Path) -> Tuning | None:
    try:
        tuning = _load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, LookupError, TypeError):
        return None
    lengths = {len(times) for times in tuning.seconds.values()}
    whole = len(lengths) == 1 and 2 <= min(lengths) <= len(SIZES) and tuning.probe_s > 0
    return tuning if whole else None


def _write(path: Path, tuning: Tuning) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(_dump(tuning), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        pass  # a home that cannot be written to: the next run measures again
