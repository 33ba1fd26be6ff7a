"""The automatic choice of an algorithm: measured on the actual wires, equal on all ranks.

1. The network model (``collectives.cost``), fitted to two probes, drops the candidates that are far
   behind.
2. The others race at a few sizes.
3. Between these sizes, a straight line is drawn: latency plus bytes over bandwidth.

The result is kept in a file, so that a job chooses the same algorithms, and so adds in the same
order, from run to run.
"""

import hashlib
import json
import os
import platform
import time
from bisect import bisect
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from scaletrain import __version__
from scaletrain.collectives.cost import Network, predict
from scaletrain.engine.choice import NATIVE, Choice
from scaletrain.engine.transport import Group, Reduce
from scaletrain.run.atomic import write_text

# The largest size is there because token buckets and socket buffers let short messages pass faster
# than the wire.
SIZES = (4 << 10, 64 << 10, 1 << 20, 4 << 20, 16 << 20)
# If a message takes this long, larger ones are not tried: the wire's rate is what counts.
_LONG_S = 0.3
_ROUNDS = 3  # of a race
_FAR_BEHIND = 2.0  # a candidate that the model puts this far behind the best is not timed
_BEHIND = 1.25  # a candidate that was never closer to the fastest than this leaves the race
_PROBE_BYTES = 1 << 20
_FITTED_BYTES = 4 << 20  # of the larger message to which the network model is fitted
_FLOAT_BYTES = 4
# A few timings cannot separate these. The wire's own allreduce then wins: it leaves more of the
# cores to computation.
_AS_FAST = 1.05
# A kept calibration is used if the probe takes no more than this much longer or shorter than then.
_SAME_WIRE = 1.7

PROBE = Choice("recursive_doubling", 1)
_FITTED = Choice("ring", 1)


class Run(Protocol):
    """Runs one allreduce, in place (``Engine.run``). Collective."""

    def __call__(self, choice: Choice, tensor: Tensor, reduce: Reduce = torch.add) -> None:
        """Reduce a one-dimensional tensor over all ranks with this algorithm."""


class Ranks(NamedTuple):
    """The ranks that measure together."""

    group: Group
    hosts: Sequence[str]  # a name of each rank's host
    transport: str  # the name of the wire
    run: Run


class Tuning(NamedTuple):
    """The measured seconds of each candidate, one for each of the first sizes of ``SIZES``."""

    seconds: dict[Choice, tuple[float, ...]]
    probe_s: float  # of the probe, by which the wire is recognised

    def predict(self, choice: Choice, num_bytes: int) -> float:
        """Return the seconds that a candidate takes for a message of this size."""
        times = self.seconds[choice]
        sizes = SIZES[: len(times)]
        if num_bytes > sizes[-1]:
            # The largest decides. A line through the last two would favour a candidate that the
            # smaller one held up, such as a ring by its many messages.
            return times[-1] * num_bytes / sizes[-1]
        if num_bytes <= sizes[0]:  # on a slow wire, the only size that was timed
            return times[0]
        upper = min(bisect(sizes, num_bytes), len(sizes) - 1)
        lower = upper - 1
        rise = times[upper] - times[lower]
        width = sizes[upper] - sizes[lower]
        return times[lower] + rise * (num_bytes - sizes[lower]) / width

    def choose(self, num_bytes: int) -> Choice:
        """Return the candidate that should be the fastest for a message of this size."""
        expected = {choice: self.predict(choice, num_bytes) for choice in self.seconds}
        fastest = min(expected, key=expected.__getitem__)
        for choice, seconds in expected.items():
            if choice.collective == NATIVE and seconds <= _AS_FAST * expected[fastest]:
                return choice
        return fastest


def tune(ranks: Ranks, candidates: list[Choice]) -> Tuning:
    """Return a kept calibration of this wire, or measure one. Collective.

    1. Every rank times the probe.
    2. Rank 0 reads the file. If the probe says that it is about this wire, all ranks take it.
    3. Otherwise all ranks measure, and rank 0 writes the file.

    Raises:
        TimeoutError, ConnectionError: as ``Engine.run``.
    """
    store = ranks.group.store
    is_first = ranks.group.rank == 0
    [probe_s] = _slowest(ranks, [_time(ranks, PROBE, torch.zeros(_PROBE_BYTES // _FLOAT_BYTES))])
    path = _path(ranks, candidates)
    if is_first:
        kept = _read(path)
        if kept is not None and 1 / _SAME_WIRE < probe_s / kept.probe_s < _SAME_WIRE:
            store.set("tuning", _dump(kept))
        else:
            store.set("tuning", "")
    text = store.get("tuning").decode()
    if text:
        return _load(text)
    tuning = Tuning(_measure(ranks, candidates), probe_s)
    if is_first:
        _write(path, tuning)
    return tuning


def _measure(ranks: Ranks, candidates: list[Choice]) -> dict[Choice, tuple[float, ...]]:
    """Return the seconds of each candidate at each size. Collective."""
    network = _network(ranks)
    times: dict[Choice, list[float]] = {choice: [] for choice in candidates}
    for num_bytes in SIZES:
        expected = _expected_seconds(candidates, ranks.group.size, num_bytes, network)
        limit = _FAR_BEHIND * min(expected.values())
        # The model knows nothing of the wire's own allreduce, which is always in the race.
        racing = [choice for choice in candidates if expected.get(choice, 0.0) <= limit]
        raced = _race(ranks, racing, num_bytes)
        for choice in candidates:
            # A candidate that cannot win is not timed: a pessimistic figure stands in its place.
            if choice in raced:
                times[choice].append(raced[choice])
            else:
                times[choice].append(_FAR_BEHIND * expected[choice])
        if min(times_of_choice[-1] for times_of_choice in times.values()) > _LONG_S:
            break
    return {choice: tuple(times_of_choice) for choice, times_of_choice in times.items()}


def _expected_seconds(
    candidates: list[Choice], size: int, num_bytes: int, network: Network
) -> dict[Choice, float]:
    """Return the seconds that the network model expects of each candidate that it knows."""
    expected = {}
    for choice in candidates:
        if choice.collective != NATIVE:
            expected[choice] = predict(choice.collective, size, num_bytes, network)
    return expected


def _network(ranks: Ranks) -> Network:
    """Return the network's latency and bandwidth, fitted to two probes. Collective.

    A short message gives the latency: recursive doubling moves the whole message in each of its
    rounds. A long one over the ring gives the bandwidth.
    """
    size = ranks.group.size
    short = torch.zeros(SIZES[0] // _FLOAT_BYTES)
    long = torch.zeros(_FITTED_BYTES // _FLOAT_BYTES)
    times = [_time(ranks, PROBE, short), _time(ranks, _FITTED, long)]
    short_s, long_s = _slowest(ranks, times)
    # Predictions with a latency of one second and no bytes count the messages one after another,
    # those with no latency and a byte a second count the bytes.
    latency_s = short_s / predict(PROBE.collective, size, 0, Network(1.0, 1.0))
    all_latencies_s = predict(_FITTED.collective, size, 0, Network(latency_s, 1.0))
    wire_s = max(long_s - all_latencies_s, long_s / 10)
    wire_bytes = predict(_FITTED.collective, size, _FITTED_BYTES, Network(0.0, 1.0))
    return Network(latency_s, wire_bytes / wire_s)


def _race(ranks: Ranks, racing: list[Choice], num_bytes: int) -> dict[Choice, float]:
    """Return the seconds of each: the median of the slowest rank's. Collective.

    They run in turn, so that a slow moment of the machine hits all alike.
    """
    tensor = torch.zeros(num_bytes // _FLOAT_BYTES)
    times: dict[Choice, list[float]] = {choice: [] for choice in racing}
    for _ in range(_ROUNDS):
        round_times = _slowest(ranks, [_time(ranks, choice, tensor) for choice in racing])
        for choice, seconds in zip(racing, round_times, strict=True):
            times[choice].append(seconds)
        fastest = min(median(times_of_choice) for times_of_choice in times.values())
        racing = [choice for choice in racing if min(times[choice]) <= _BEHIND * fastest]
    return {choice: median(times_of_choice) for choice, times_of_choice in times.items()}


def _time(ranks: Ranks, choice: Choice, tensor: Tensor) -> float:
    """Return this rank's seconds for an allreduce. Collective.

    The first run makes connections and buffers, and does not count. Of a short message, the least
    of several runs counts: on a busy host, most runs only show how long the system lets a rank
    wait, which differs from run to run by more than the algorithms do.
    """
    if tensor.nbytes <= SIZES[1]:
        num_runs = 6
    elif tensor.nbytes <= SIZES[2]:
        num_runs = 2
    else:
        num_runs = 1  # long enough for the first run to count
    times = []
    for _ in range(num_runs):
        began = time.perf_counter()
        ranks.run(choice, tensor)
        times.append(time.perf_counter() - began)
    return min(times[1:] or times)


def _slowest(ranks: Ranks, seconds: list[float]) -> list[float]:
    """Return the slowest rank's figures, equal on all ranks: so is the choice. Collective."""
    tensor = torch.tensor(seconds, dtype=torch.float64)
    ranks.run(PROBE, tensor, torch.maximum)
    return tensor.tolist()


# The file of a calibration


def _path(ranks: Ranks, candidates: list[Choice]) -> Path:
    """Return the file for these candidates, this wire, and which ranks share a host.

    The probe decides whether it is the same network.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    folder = Path(cache) if cache else Path.home() / ".cache"
    layout = [ranks.hosts.index(host) for host in ranks.hosts]
    facts = json.dumps([__version__, platform.node(), candidates, ranks.transport, layout])
    digest = hashlib.sha256(facts.encode()).hexdigest()[:16]
    return folder / "scaletrain" / f"tuning-{digest}.json"


def _dump(tuning: Tuning) -> str:
    rows = [[*choice, *times] for choice, times in tuning.seconds.items()]
    return json.dumps({"probe_s": tuning.probe_s, "seconds": rows})


def _load(text: str) -> Tuning:
    tree = json.loads(text)
    seconds = {}
    for collective, segments, *times in tree["seconds"]:
        choice = Choice(str(collective), int(segments))
        seconds[choice] = tuple(float(value) for value in times)
    return Tuning(seconds, float(tree["probe_s"]))


def _read(path: Path) -> Tuning | None:
    """Return the calibration in a file; None if there is none, or it is damaged."""
    try:
        tuning = _load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, LookupError, TypeError):
        return None
    lengths = {len(times) for times in tuning.seconds.values()}
    if len(lengths) != 1 or tuning.probe_s <= 0:
        return None
    [length] = lengths
    return tuning if 2 <= length <= len(SIZES) else None


def _write(path: Path, tuning: Tuning) -> None:
    """Keep a calibration. In a home that cannot be written to, the next run measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, _dump(tuning))
    except OSError:
        pass
