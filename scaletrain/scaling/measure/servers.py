"""Parameter servers in the report: their counts, and time to loss beside throughput.

Asynchronous training may be faster and worse. Runs are compared by the time at which they reach a
loss that all of them reach.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np

from scaletrain.run.layout import RunDir
from scaletrain.scaling.model import Row, Run, ServerCounts, ServerStatistics
from scaletrain.units import plural

# Losses of single steps are noisy: one lucky batch must not count as progress.
SMOOTHED_STEPS = 10
_Value = TypeVar("_Value")


def read(run_dir: Path) -> ServerCounts | None:
    """Return the counts of a run's servers, together; None if it had none."""
    each = []
    for path in RunDir(run_dir).all_server_statistics():
        value = json.loads(path.read_text(encoding="utf-8"))
        if "staleness" in value:  # a server that was killed early has not counted
            each.append(ServerStatistics.from_json(value))
    return _together(each) if each else None


def _together(each: Sequence[ServerStatistics]) -> ServerCounts:
    """Return the counts of several servers, added up."""
    staleness: Counter[int] = Counter()
    cores: set[int] = set()
    lost: dict[int, str] = {}
    restored: list[int] = []
    for server in each:
        staleness.update(server.staleness)
        cores.update(server.cores)
        # Every server notices a lost worker by itself; one reason is enough.
        lost.update(server.lost)
        if server.restored_at_update is not None:
            restored.append(server.restored_at_update)
    pushed = sum(server.pushes for server in each)
    dropped = sum(server.dropped for server in each)
    return ServerCounts(
        servers=len(each),
        cores=tuple(sorted(cores)),
        mode=each[0].mode,
        staleness=_by_text(staleness),
        staleness_mean=_mean_staleness(staleness),
        dropped=dropped / max(1, pushed),
        pace_s=each[0].pace_s,
        lost=_by_text(lost),
        refused=sum(server.refused for server in each),
        # The oldest snapshot says how far weights went back at most.
        restored_at_update=min(restored, default=None),
        # Every server works for every worker: the cost of one is the sum.
        cpu_s_per_worker=sum(server.cpu_s_per_worker for server in each),
        memory_bytes=max(server.memory_bytes for server in each),
    )


def _by_text(values: Mapping[int, _Value]) -> dict[str, _Value]:
    """Return a mapping in the order of its keys, which become text as in a JSON file."""
    return {str(key): values[key] for key in sorted(values)}


def _mean_staleness(staleness: Counter[int]) -> float:
    """Return the updates that a gradient came late by, in the mean."""
    late = 0
    for updates, gradients in staleness.items():
        late += updates * gradients
    return late / max(1, staleness.total())


def smoothed(losses: np.ndarray) -> np.ndarray:
    """Return the mean loss over the ranks and the last ``SMOOTHED_STEPS`` steps.

    Args:
        losses: shape (steps, ranks). The result has shape (steps - SMOOTHED_STEPS + 1).
    """
    # A run of fewer steps has one window.
    # ``valid`` keeps full windows only, so the first losses are not averaged with zeros.
    width = min(SMOOTHED_STEPS, len(losses))
    return np.convolve(losses.mean(axis=1), np.ones(width) / width, mode="valid")


def time_to_loss(losses: np.ndarray, ended_s: np.ndarray, target: float) -> float | None:
    """Return the seconds until the smoothed loss fell to ``target``; None if it never did.

    Args:
        losses: shape (steps, ranks).
        ended_s: seconds at which each step ended, shape (steps, ranks).
        target: the loss.
    """
    curve = smoothed(losses)
    reached = np.nonzero(curve <= target)[0]
    if len(reached) == 0:
        return None
    # Point i of the curve is a window that ends ``len(losses) - len(curve)`` steps later.
    last_of_window = reached[0] + len(losses) - len(curve)
    return float(ended_s[last_of_window].mean())


def common_loss(rows: Sequence[Row], runs_of_rows: Sequence[Sequence[Run]]) -> float | None:
    """Return the lowest loss that every measured run reached, if a row had servers.

    None where rows are of several configs: their losses are different quantities.
    """
    if not any(row.servers for row in rows):
        return None
    if len({row.config for row in rows}) > 1:
        return None
    lowest_losses = []
    for runs in runs_of_rows:
        for run in runs:
            lowest_losses.append(float(smoothed(run.losses).min()))
    # The worst of the runs' best losses is the lowest that all of them have seen.
    return max(lowest_losses, default=None)


def mean_time_to_loss(runs: Sequence[Run], loss: float) -> float | None:
    """Return the mean seconds until runs reached a loss; None if none of them did."""
    times = []
    for run in runs:
        seconds = time_to_loss(run.losses, run.ended_s, loss)
        if seconds is not None:
            times.append(seconds)
    return float(np.mean(times)) if times else None


def text(counts: ServerCounts | None) -> str:
    """Return one line about a row's servers; empty if it had none."""
    if counts is None:
        return ""
    paces = ", ".join(map(_pace, counts.pace_s))
    parts = [
        f"{plural(counts.servers, 'server')}, {counts.mode}",
        f"staleness {_histogram(counts)}",
        f"{100 * counts.dropped:.1f} % dropped",
        f"pace {paces} ms",
    ]
    for rank, reason in counts.lost.items():
        parts.append(f"lost rank {rank}: {reason}")
    if counts.restored_at_update is not None:
        parts.append(f"restored at update {counts.restored_at_update}: later ones were lost")
    if counts.refused:
        parts.append(f"{counts.refused} messages refused")
    return "; ".join(parts)


def _pace(pace_s: float | None) -> str:
    """Return a worker's milliseconds a step; a dash if it is not known."""
    return "-" if pace_s is None else f"{1000 * pace_s:.1f}"


_RARE = 0.01  # share of a staleness that is not worth a place of its own


def _histogram(counts: ServerCounts) -> str:
    """Return the share of the gradients at each staleness, with the rare ones together."""
    total = sum(counts.staleness.values())
    if total == 0:
        return "none"
    shares = []
    rare: dict[int, int] = {}
    for updates, gradients in counts.staleness.items():
        if gradients < _RARE * total:
            rare[int(updates)] = gradients
        else:
            shares.append(f"{updates}: {100 * gradients / total:.0f} %")
    if rare:
        percent = 100 * sum(rare.values()) / total
        shares.append(f"others, up to {max(rare)}: {percent:.0f} %")
    return ", ".join(shares)
