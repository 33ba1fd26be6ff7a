"""The counts of a server: staleness, pushes, drops and pace of workers, and losses."""

import dataclasses
import resource
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil

_KEPT_STEPS = 500  # the pace is the median of a worker's last steps


@dataclass(frozen=True)
class LostWorker:
    """The loss of one worker."""

    rank: int
    reason: str
    time: float  # seconds since the epoch
    update: int  # of the least updated block


@dataclass
class _Pace:
    """Counts of one worker, as long as it is the same process."""

    pushes: int = 0  # gradients of blocks
    dropped: int = 0  # of them, those that came too late
    steps_s: deque[float] = field(default_factory=lambda: deque(maxlen=_KEPT_STEPS))
    last_step: float | None = None  # when its last step began to arrive, on the monotonic clock

    def median_step_s(self) -> float | None:
        """Return the median seconds between two steps; None before there were two."""
        return float(np.median(self.steps_s)) if self.steps_s else None


class Tally:
    """Counts of one server, since the start of the job where it was restored from a snapshot.

    Written by the server's only thread as events happen, read by it when it writes statistics.
    """

    def __init__(self) -> None:
        self._paces: dict[int, _Pace] = {}  # by rank
        self._staleness: Counter[int] = Counter()  # gradients by their staleness in updates
        # Before there are any weights: what Python and torch take by themselves.
        self._at_start = _resident_bytes()
        self.lost: list[LostWorker] = []

    def came(self, rank: int) -> None:
        """Count a worker anew: it came, or another process came in its place."""
        self._paces[rank] = _Pace()

    def pushed(self, rank: int, of_first_block: bool) -> None:
        """Count a gradient. The gradient of the first block marks a step."""
        pace = self._paces[rank]
        pace.pushes += 1
        if of_first_block:
            now = time.monotonic()
            if pace.last_step is not None:
                pace.steps_s.append(now - pace.last_step)
            pace.last_step = now

    def answered(self, rank: int, staleness: int, dropped: bool) -> None:
        """Count the fate of a gradient."""
        if dropped:
            self._paces[rank].dropped += 1
        else:
            self._staleness[staleness] += 1

    def lose(self, rank: int, reason: str, update: int) -> None:
        """Note that a worker was lost while the least updated block was at ``update``."""
        self.lost.append(LostWorker(rank, reason, time.time(), update))

    def counts(self) -> dict[str, Any]:
        """Return the counts of gradients and losses as JSON, for a snapshot, too."""
        paces = {str(rank): pace for rank, pace in sorted(self._paces.items())}
        return {
            "staleness": {str(updates): n for updates, n in sorted(self._staleness.items())},
            "pushes": {rank: pace.pushes for rank, pace in paces.items()},
            "dropped": {rank: pace.dropped for rank, pace in paces.items()},
            "lost": [dataclasses.asdict(loss) for loss in self.lost],
        }

    def restore(self, counts: dict[str, Any]) -> None:
        """Go on with the ``counts`` of a snapshot."""
        self._staleness = Counter({int(key): n for key, n in counts["staleness"].items()})
        for rank, pushes in counts["pushes"].items():
            self._paces[int(rank)] = _Pace(pushes=pushes, dropped=counts["dropped"][rank])
        self.lost = [LostWorker(**loss) for loss in counts["lost"]]

    def as_json(self) -> dict[str, Any]:
        """Return the counts for the statistics file; numbers of ranks and updates become text."""
        paces = {str(rank): pace for rank, pace in sorted(self._paces.items())}
        # Of all threads: ZeroMQ's are in it, which encrypt.
        cpu_s = time.process_time()
        peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {
            **self.counts(),
            "step_s": {rank: pace.median_step_s() for rank, pace in paces.items()},
            "cpu_s": cpu_s,
            "cpu_s_per_worker": cpu_s / max(1, len(paces)),
            "memory_bytes": _resident_bytes(),
            "memory_peak_bytes": 1024 * peak_kib,
            "memory_at_start_bytes": self._at_start,
        }


def _resident_bytes() -> int:
    """Return how much memory this process has, in bytes."""
    return psutil.Process().memory_info().rss
