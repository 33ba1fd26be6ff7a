"""How much of this machine's cores others used while something was measured: figures from a busy machine are worth less."""

import os
import resource
import time
from collections.abc import Sequence

import psutil

CONSIDERABLE = 0.10  # of the cores
CHILDREN = (
    "local",
    "torchrun",
)  # launchers whose workers are this process's descendants, all waited for


class Watch:
    """From its making on: what the cores did, and what this process and its ended descendants had of it."""

    def __init__(self) -> None:
        self._began_s, self._busy_s, self._own_s = time.monotonic(), _busy_s(), _own_s()

    def others(self) -> float | None:
        """The share of the cores, 0 to 1, that other processes used (and other guests of the host). None where the system does not tell."""
        if self._busy_s is None or (now := _busy_s()) is None:
            return None
        cores_s = (time.monotonic() - self._began_s) * len(os.sched_getaffinity(0))
        return min(1.0, max(0.0, now - self._busy_s - (_own_s() - self._own_s)) / cores_s)


def _busy_s() -> float | None:
    """Seconds that the cores this process may use have worked. Interrupts do not count: traffic between own workers makes them."""
    try:
        cores = psutil.cpu_times(percpu=True)
        mine = [cores[core] for core in os.sched_getaffinity(0)]
    except (OSError, IndexError):
        return None
    busy = sum(t.user + t.nice + t.system + getattr(t, "steal", 0.0) for t in mine)
    return busy or None  # some sandboxes show zeros


def _own_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def told(shares: Sequence[float]) -> str | None:
    """A sentence where others used a considerable part during a run; None where they did not, or nothing is known."""
    busy = [share for share in shares if share > CONSIDERABLE]
    if not busy:
        return None
    return (
        f"BUSY MACHINE: other processes used more than {CONSIDERABLE:.0%} of the cores during {len(busy)} of {len(shares)} runs"
        f" ({max(busy):.0%} at most)."
    )
