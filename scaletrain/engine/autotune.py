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
    """The measured seconds of the candidates."""

    seconds: dict[Choice, tuple[float, ...]]  # at each of the first sizes of ``SIZES``
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
        extra_s = times[upper] - times[lower]
        extra_bytes = sizes[upper] - sizes[lower]
        return times[lower] + extra_s * (num_bytes - sizes[lower]) / extra_bytes

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
    own_probe_s = _time(ranks, PROBE, _message(_PROBE_BYTES))
    [probe_s] = _slowest(ranks, [own_probe_s])
    path = _path(ranks, candidates)
    if is_first:
        kept = _read(path)
        if kept is not None and _is_same_wire(kept, probe_s):
            store.set("tuning", _dump(kept))
        else:
            store.set("tuning", "")  # the other ranks wait for an answer
    text = store.get("tuning").decode()
    if text:
        return _load(text)
    tuning = Tuning(_measure(ranks, candidates), probe_s)
    if is_first:
        _write(path, tuning)
    return tuning


def _is_same_wire(kept: Tuning, probe_s: float) -> bool:
    """Return True if the probe takes about as long as when a calibration was measured."""
    return 1 / _SAME_WIRE < probe_s / kept.probe_s < _SAME_WIRE


def _measure(ranks: Ranks, candidates: list[Choice]) -> dict[Choice, tuple[float, ...]]:
    """Return the seconds of each candidate at each size. Collective."""
    network = _network(ranks)
    times: dict[Choice, tuple[float, ...]] = dict.fromkeys(candidates, ())
    for num_bytes in SIZES:
        expected = _expected_seconds(candidates, ranks.group.size, num_bytes, network)
        racing = _not_far_behind(candidates, expected)
        raced = _race(ranks, racing, num_bytes)
        for choice in candidates:
            # A candidate that cannot win is not timed: a pessimistic figure stands in its place.
            if choice in raced:
                seconds = raced[choice]
            else:
                seconds = _FAR_BEHIND * expected[choice]
            times[choice] += (seconds,)
        fastest_s = min(times_of_choice[-1] for times_of_choice in times.values())
        if fastest_s > _LONG_S:
            break
    return times


def _not_far_behind(candidates: list[Choice], expected: dict[Choice, float]) -> list[Choice]:
    """Return the candidates that are worth a race.

    Args:
        candidates: all of them.
        expected: the seconds that the network model expects. It knows nothing of the wire's own
            allreduce, which is always in the race.
    """
    limit_s = _FAR_BEHIND * min(expected.values())
    return [choice for choice in candidates if expected.get(choice, 0.0) <= limit_s]


def _expected_seconds(
    candidates: list[Choice], size: int, num_bytes: int, network: Network
) -> dict[Choice, float]:
    """Return the seconds that the network model expects of each candidate that it knows."""
    names = {choice.collective for choice in candidates} - {NATIVE}
    seconds = {name: predict(name, size, num_bytes, network) for name in names}
    return {
        choice: seconds[choice.collective] for choice in candidates if choice.collective in names
    }


def _network(ranks: Ranks) -> Network:
    """Return the network's latency and bandwidth, fitted to two probes. Collective.

    A short message gives the latency: recursive doubling moves the whole message in each of its
    rounds. A long one over the ring gives the bandwidth.
    """
    size = ranks.group.size
    own_short_s = _time(ranks, PROBE, _message(SIZES[0]))
    own_long_s = _time(ranks, _FITTED, _message(_FITTED_BYTES))
    short_s, long_s = _slowest(ranks, [own_short_s, own_long_s])
    # Predictions with a latency of one second and no bytes count the messages one after another.
    # Predictions with no latency and a byte a second count the bytes.
    messages = predict(PROBE.collective, size, 0, Network(1.0, 1.0))
    latency_s = short_s / messages
    all_latencies_s = predict(_FITTED.collective, size, 0, Network(latency_s, 1.0))
    # Timings are noisy: the difference can be close to 0 or below it, which is no bandwidth.
    wire_s = max(long_s - all_latencies_s, long_s / 10)
    wire_bytes = predict(_FITTED.collective, size, _FITTED_BYTES, Network(0.0, 1.0))
    return Network(latency_s, wire_bytes / wire_s)


def _race(ranks: Ranks, racing: list[Choice], num_bytes: int) -> dict[Choice, float]:
    """Return the seconds of each: the median of the slowest rank's. Collective.

    They run in turn, so that a slow moment of the machine hits all alike.
    """
    tensor = _message(num_bytes)
    times: dict[Choice, list[float]] = {choice: [] for choice in racing}
    for _ in range(_ROUNDS):
        own_times = [_time(ranks, choice, tensor) for choice in racing]
        for choice, seconds in zip(racing, _slowest(ranks, own_times), strict=True):
            times[choice].append(seconds)
        limit_s = _BEHIND * min(map(median, times.values()))
        racing = [choice for choice in racing if min(times[choice]) <= limit_s]
    return {choice: median(times_of_choice) for choice, times_of_choice in times.items()}


def _message(num_bytes: int) -> Tensor:
    """Return a float32 tensor of this size."""
    return torch.zeros(num_bytes // _FLOAT_BYTES)


def _time(ranks: Ranks, choice: Choice, tensor: Tensor) -> float:
    """Return this rank's seconds for an allreduce. Collective.

    The first of several runs makes connections and buffers, and does not count. Of a short message,
    the least of several runs counts: on a busy host, most runs only show how long the system lets a
    rank wait, which differs from run to run by more than the algorithms do.
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
    if num_runs > 1:
        del times[0]
    return min(times)


def _slowest(ranks: Ranks, seconds: list[float]) -> list[float]:
    """Return the slowest rank's figures. Collective.

    They are equal on all ranks, and so all ranks choose the same.
    """
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
    # Ranks on one host have the same number, whatever the hosts are called in this job.
    layout = [ranks.hosts.index(host) for host in ranks.hosts]
    facts = json.dumps([__version__, platform.node(), candidates, ranks.transport, layout])
    digest = hashlib.sha256(facts.encode()).hexdigest()[:16]
    return folder / "scaletrain" / f"tuning-{digest}.json"


def _dump(tuning: Tuning) -> str:
    """Return a calibration as JSON, in which a candidate is one row with its times."""
    rows = [[*choice, *times] for choice, times in tuning.seconds.items()]
    return json.dumps({"probe_s": tuning.probe_s, "seconds": rows})


def _load(text: str) -> Tuning:
    """Return the calibration that ``_dump`` wrote."""
    tree = json.loads(text)
    seconds = {}
    for collective, segments, *times in tree["seconds"]:
        choice = Choice(str(collective), int(segments))
        seconds[choice] = tuple(map(float, times))
    return Tuning(seconds, float(tree["probe_s"]))


def _read(path: Path) -> Tuning | None:
    """Return the calibration in a file; None if there is none, or it is damaged."""
    try:
        tuning = _load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return tuning if _is_sound(tuning) else None


def _is_sound(tuning: Tuning) -> bool:
    """Return True if all candidates were timed at the same sizes.

    On a slow wire that is one size only (``_measure``).
    """
    if tuning.probe_s <= 0:
        return False
    num_sizes = set(map(len, tuning.seconds.values()))
    if len(num_sizes) != 1:
        return False
    return 1 <= num_sizes.pop() <= len(SIZES)


def _write(path: Path, tuning: Tuning) -> None:
    """Keep a calibration. In a home that cannot be written to, the next run measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, _dump(tuning))
    except OSError:
        pass
