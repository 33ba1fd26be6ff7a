"""What a server counts: staleness, pushes, drops and pace of each worker, who was lost, what it cost."""

import resource
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil


@dataclass
class _Pace:
    pushes: int = 0
    dropped: int = 0
    steps_s: deque[float] = field(
        default_factory=lambda: deque(maxlen=500)
    )  # seconds between steps
    stepped: float | None = None


class Tally:
    """Counts of one server's life. Gradients are those of blocks."""

    def __init__(self) -> None:
        self._ranks: dict[int, _Pace] = {}
        self._staleness: Counter[int] = Counter()
        self._at_start = _resident_bytes()
        self.lost: list[dict[str, Any]] = []

    def came(self, rank: int) -> None:
        """A worker, or another one in its place."""
        self._ranks[rank] = _Pace()

    def pushed(self, rank: int, of_first_block: bool) -> None:
        """A gradient came; that of the first block marks a step."""
        pace = self._ranks[rank]
        pace.pushes += 1
        if of_first_block:
            now = time.monotonic()
            if pace.stepped is not None:
                pace.steps_s.append(now - pace.stepped)
            pace.stepped = now

    def answered(self, rank: int, staleness: int, dropped: bool) -> None:
        if dropped:
            self._ranks[rank].dropped += 1
        else:
            self._staleness[staleness] += 1

    def lose(self, rank: int, reason: str, update: int) -> None:
        self.lost.append({"rank": rank, "reason": reason, "time": time.time(), "update": update})

    def as_json(self) -> dict[str, Any]:
        ranks = sorted(self._ranks.items())
        cpu = time.process_time()
        return {
            "staleness": {
                str(updates): gradients for updates, gradients in sorted(self._staleness.items())
            },
            "pushes": {str(rank): pace.pushes for rank, pace in ranks},
            "dropped": {str(rank): pace.dropped for rank, pace in ranks},
            "step_s": {
                str(rank): float(np.median(pace.steps_s)) if pace.steps_s else None
                for rank, pace in ranks
            },
            "lost": self.lost,
            "cpu_s": cpu,
            "cpu_s_per_worker": cpu / max(1, len(ranks)),
            "memory_bytes": _resident_bytes(),
            "memory_peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "memory_at_start_bytes": self._at_start,
        }


def _resident_bytes() -> int:
    return psutil.Process().memory_info().rss
