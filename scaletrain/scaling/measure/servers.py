"""Parameter servers in the report: staleness, drops, pace and losses of workers, and time to loss beside throughput.

Asynchronous training may be faster and worse: what counts is when a loss was reached that all compared runs reach.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SMOOTHED_STEPS = 10


def read(run_dir: Path) -> dict[str, Any] | None:
    """What a run's servers counted, together; None when it had none.

    ``staleness``: gradients of blocks by the number of updates between the weights they came from and their own. ``dropped``: share of
    the pushed gradients that came too late. ``pace_s``: each worker's median seconds a step. ``lost``: workers with the reason.
    """
    found = [
        json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(run_dir.glob("server-*.json"))
    ]
    found = [server for server in found if "staleness" in server]
    if not found:
        return None
    staleness: Counter[int] = Counter()
    for server in found:
        staleness.update({int(updates): count for updates, count in server["staleness"].items()})
    pushes, dropped = (
        sum(sum(server[key].values()) for server in found) for key in ("pushes", "dropped")
    )
    lost = {entry["rank"]: entry["reason"] for server in found for entry in server["lost"]}
    restored = [
        server["restored_at_update"] for server in found if server["restored_at_update"] is not None
    ]
    return {
        "servers": len(found),
        "cores": sorted({core for server in found for core in server.get("cores", ())}),
        "mode": found[0]["mode"],
        "staleness": {str(updates): staleness[updates] for updates in sorted(staleness)},
        "staleness_mean": sum(u * n for u, n in staleness.items()) / max(1, staleness.total()),
        "dropped": dropped / max(1, pushes),
        "pace_s": [found[0]["step_s"][rank] for rank in sorted(found[0]["step_s"], key=int)],
        "lost": {str(rank): reason for rank, reason in sorted(lost.items())},
        "refused": sum(sum(server["refused"].values()) for server in found),
        "restored_at_update": min(restored, default=None),
        "cpu_s_per_worker": sum(server["cpu_s_per_worker"] for server in found),
        "memory_bytes": max(server["memory_bytes"] for server in found),
    }


def smoothed(losses: np.ndarray) -> np.ndarray:
    """Mean over the ranks and the last ``SMOOTHED_STEPS`` steps; losses (steps, ranks) -> (steps - SMOOTHED_STEPS + 1)."""
    width = min(SMOOTHED_STEPS, len(losses))
    return np.convolve(losses.mean(axis=1), np.ones(width) / width, mode="valid")


def time_to_loss(losses: np.ndarray, ended_s: np.ndarray, target: float) -> float | None:
    """Seconds until the smoothed training loss fell to ``target``; None when it never did. Both arrays (steps, ranks)."""
    curve = smoothed(losses)
    below = np.nonzero(curve <= target)[0]
    return float(ended_s[below[0] + len(losses) - len(curve)].mean()) if len(below) else None


def compare(
    rows: Sequence[dict[str, Any]], curves: Sequence[Sequence[tuple[np.ndarray, np.ndarray]]]
) -> float | None:
    """Write ``time_to_loss_s`` into rows, when one of them had servers; returns the loss: the lowest that every measured run reached.
    None where rows are of several configs, whose losses are not the same quantity.

    ``curves[i]``: (losses, ended_s) of row i's runs.
    """
    lowest = [float(smoothed(losses).min()) for runs in curves for losses, _ in runs]
    if (
        not any(row["servers"] for row in rows)
        or not lowest
        or len({row["config"] for row in rows}) > 1
    ):
        return None
    target = max(lowest)
    for row, runs in zip(rows, curves, strict=True):
        times = [seconds for one in runs if (seconds := time_to_loss(*one, target)) is not None]
        row["time_to_loss_s"] = float(np.mean(times)) if times else None
    return target


def text(servers: Mapping[str, Any] | None) -> str:
    """One line about a row's servers."""
    if servers is None:
        return ""
    total = sum(servers["staleness"].values())
    histogram = (
        ", ".join(
            f"{updates}: {100 * n / total:.0f} %" for updates, n in servers["staleness"].items()
        )
        if total
        else "none"
    )
    paces = ", ".join("-" if pace is None else f"{1000 * pace:.1f}" for pace in servers["pace_s"])
    parts = [
        f"{servers['servers']} server{'s' * (servers['servers'] > 1)}, {servers['mode']}",
        f"staleness {histogram}",
        f"{100 * servers['dropped']:.1f} % dropped",
        f"pace {paces} ms",
    ]
    parts += [f"lost rank {rank}: {reason}" for rank, reason in servers["lost"].items()]
    if servers["restored_at_update"] is not None:
        parts.append(f"restored at update {servers['restored_at_update']}: later ones were lost")
    if servers["refused"]:
        parts.append(f"{servers['refused']} messages refused")
    return "; ".join(parts)
