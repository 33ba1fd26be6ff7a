"""How much of this machine's cores others used while something was measured.

Figures from a busy machine are worth less.
"""

import json
import os
import resource
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from scaletrain.run.atomic import write_json

CONSIDERABLE = 0.10  # of the cores
# Launchers whose workers are this process's descendants, all waited for.
CHILDREN = ("local", "torchrun")


class Watch:
    """Counts the work of the cores, and this process's part of it, from its creation on."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        self._busy_s = _busy_s()
        self._own_s = _own_s()

    def others(self) -> float | None:
        """Return the share of the cores, 0 to 1, that other processes and other guests used.

        None where the system does not say. Only descendants that have ended count as this
        process's own.
        """
        busy_s = _busy_s()
        if self._busy_s is None or busy_s is None:
            return None
        cores_s = (time.monotonic() - self._began_s) * len(os.sched_getaffinity(0))
        others_s = busy_s - self._busy_s - (_own_s() - self._own_s)
        # The kernel counts in ticks of some milliseconds: a short watch may leave 0 to 1.
        return min(1.0, max(0.0, others_s) / cores_s)


def _busy_s() -> float | None:
    """Return the seconds that the cores this process may use have worked.

    Interrupts do not count: the traffic between the run's own workers makes them.
    """
    try:
        cores = psutil.cpu_times(percpu=True)
        usable = [cores[core] for core in os.sched_getaffinity(0)]
    except (OSError, IndexError):
        return None
    busy_s = 0.0
    for times in usable:
        # Stolen time went to other guests of the host. Only Linux counts it.
        busy_s += times.user + times.nice + times.system + getattr(times, "steal", 0.0)
    return busy_s or None  # some sandboxes show zeros


def _own_s() -> float:
    """Return the seconds of computation of this process and its ended descendants."""
    total_s = 0.0
    for processes in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(processes)
        total_s += used.ru_utime + used.ru_stime
    return total_s


def path(run_dir: Path) -> Path:
    """Return where a sweep notes the share of the cores that others used during a run."""
    return run_dir / "machine.json"


def write(run_dir: Path, others: float) -> None:
    """Note the share of the cores that others used during a run."""
    write_json(path(run_dir), {"used_by_others": others})


def read(run_dir: Path) -> list[float]:
    """Return the share that was noted for a run, or nothing."""
    if not path(run_dir).exists():
        return []
    return [json.loads(path(run_dir).read_text(encoding="utf-8"))["used_by_others"]]


def sentence(shares: Sequence[float]) -> str | None:
    """Return a sentence if others used a considerable part of the cores during a run.

    Args:
        shares: of each run, 0 to 1.
    """
    busy = [share for share in shares if share > CONSIDERABLE]
    if not busy:
        return None
    return (
        f"BUSY MACHINE: other processes used more than {CONSIDERABLE:.0%} of the cores"
        f" during {len(busy)} of {len(shares)} runs ({max(busy):.0%} at most)."
    )
