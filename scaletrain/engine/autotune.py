"""The automatic choice of an algorithm: a short calibration on the actual wires, a model of what each costs, a choice that all ranks share.

The network model (``collectives.cost``), fitted to two probes, drops candidates that are far behind; the others are timed at a few sizes, and
between and beyond these a straight line is drawn: latency plus bytes over bandwidth. The result is kept in a file, so that a job chooses the same
algorithms, and so adds in the same order, from run to run.
"""

import hashlib
import json
import os
import time
from bisect import bisect
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

from scaletrain import __version__
from scaletrain.collectives.cost import Network, predict
from scaletrain.engine.transport import Group

if TYPE_CHECKING:
    from scaletrain.engine.choose import Engine

# The last is large: token buckets and socket buffers let short messages pass faster than the wire.
SIZES = (4 << 10, 64 << 10, 1 << 20, 4 << 20)
_REPEATS = 3
_FAR_BEHIND = 2.0  # a candidate that the model puts this far behind the best is not timed
_SAME_WIRE = 1.7  # a kept calibration is used when the probe takes no more than this much longer or shorter than it did


class Choice(NamedTuple):
    collective: str
    segments: int  # parts that go through the schedule side by side


class Tuning(NamedTuple):
    """Seconds of each candidate at ``SIZES``."""

    seconds: dict[Choice, tuple[float, ...]]

    def predict(self, choice: Choice, num_bytes: int) -> float:
        times = self.seconds[choice]
        place = min(max(bisect(SIZES, num_bytes), 1), len(SIZES) - 1)
        (a, b), (at_a, at_b) = SIZES[place - 1 : place + 1], times[place - 1 : place + 1]
        return at_a + (at_b - at_a) * (num_bytes - a) / (b - a) if num_bytes > SIZES[0] else times[0]

    def choose(self, num_bytes: int) -> Choice:
        return min(self.seconds, key=lambda choice: self.predict(choice, num_bytes))


def tune(engine: "Engine", group: Group, candidates: list[Choice], transport: str, hosts: list[str]) -> Tuning:
    """Read or measure (collective)."""
    probe = Choice("recursive_doubling", 1)
    quick = _agreed(engine, [_time(engine, probe, SIZES[1])])[0]
    path = _path(group.size, candidates, transport, hosts)
    if group.rank == 0:
        kept = _read(path)
        same = kept is not None and 1 / _SAME_WIRE < quick / kept.seconds[probe][1] < _SAME_WIRE
        group.store.set("tuning", _dump(kept) if kept is not None and same else "")
    if text := group.store.get("tuning").decode():
        return _load(text)
    tuning = _measure(engine, group.size, candidates)
    if group.rank == 0:
        _write(path, tuning)
    return tuning


def _measure(engine: "Engine", size: int, candidates: list[Choice]) -> Tuning:
    # Two probes give latency and bandwidth; recursive doubling moves the whole message in each of its rounds.
    probes = (Choice("recursive_doubling", 1), Choice("ring", 1))
    low, high = _agreed(engine, [_time(engine, probes[0], SIZES[0]), _time(engine, probes[1], SIZES[-1])])
    latency_s = low / predict(probes[0].collective, size, 0, Network(1.0, 1.0))
    wire_s = max(high - predict(probes[1].collective, size, 0, Network(latency_s, 1.0)), high / 10)
    network = Network(latency_s, predict(probes[1].collective, size, SIZES[-1], Network(0.0, 1.0)) / wire_s)
    expected = {
        c: [predict(c.collective, size, num_bytes, network) if c.collective != "native" else 0.0 for num_bytes in SIZES]
        for c in candidates
    }
    best = [min(e[i] for c, e in expected.items() if c.collective != "native") for i in range(len(SIZES))]
    times: dict[Choice, tuple[float, ...]] = {}
    for choice in candidates:
        taken = []
        for i, num_bytes in enumerate(SIZES):
            # Not timed where it cannot win: a pessimistic figure stands in its place.
            behind = expected[choice][i] > _FAR_BEHIND * best[i]
            taken.append(expected[choice][i] * _FAR_BEHIND if behind else _time(engine, choice, num_bytes))
        times[choice] = tuple(taken)
    flat = _agreed(engine, [t for row in times.values() for t in row])
    return Tuning(
        {c: tuple(flat[i * len(SIZES) : (i + 1) * len(SIZES)]) for i, c in enumerate(times)},
    )


def _time(engine: "Engine", choice: Choice, num_bytes: int) -> float:
    """The median of a few runs, after one that opens connections; seconds on this rank."""
    tensor = torch.zeros(num_bytes // 4)
    engine.run(choice, tensor)
    times = []
    for _ in range(_REPEATS):
        began = time.perf_counter()
        engine.run(choice, tensor)
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def _agreed(engine: "Engine", seconds: list[float]) -> list[float]:
    """The slowest rank's figures, equal on all ranks: so is the choice."""
    tensor = torch.tensor(seconds, dtype=torch.float64)
    engine.run(Choice("recursive_doubling", 1), tensor, torch.maximum)
    return tensor.tolist()


def _path(size: int, candidates: list[Choice], transport: str, hosts: list[str]) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "scaletrain"
    facts = json.dumps([__version__, size, candidates, transport, hosts])
    return root / f"tuning-{hashlib.sha256(facts.encode()).hexdigest()[:16]}.json"


def _dump(tuning: Tuning) -> str:
    return json.dumps([[*choice, *times] for choice, times in tuning.seconds.items()])


def _load(text: str) -> Tuning:
    return Tuning({Choice(str(row[0]), int(row[1])): tuple(map(float, row[2:])) for row in json.loads(text)})


def _read(path: Path) -> Tuning | None:
    try:
        tuning = _load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, IndexError, TypeError):
        return None
    whole = Choice("recursive_doubling", 1) in tuning.seconds and all(
        len(t) == len(SIZES) for t in tuning.seconds.values()
    )
    return tuning if whole else None


def _write(path: Path, tuning: Tuning) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(_dump(tuning), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        pass  # a home that cannot be written to: the next run measures again
