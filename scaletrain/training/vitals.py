"""Vital signs of a step: the time that the garbage collector and other processes took from it.

Both are there already, and reading them takes two microseconds: Python calls back around each
collection, and Linux counts for how long a thread could have run but had no core.
"""

import contextlib
import gc
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

from scaletrain.run.layout import RunDir
from scaletrain.run.links import LinkWriter


class Vitals(NamedTuple):
    """What was taken from a step, in seconds."""

    gc_s: float  # in Python's garbage collector, of whichever thread: it holds up all of them
    stolen_s: float | None  # the training thread could run and had no core; None: not known
    by_part: dict[str, float]  # both together, by the part of the step


class VitalSigns:
    """Counts for the thread that makes it, which must be the one that trains.

    Beside, it notes the counters of this process's connections now and then (``run.links``).

    Args:
        run_dir: of the run.
        rank: of this worker.
    """

    def __init__(self, run_dir: Path, rank: int) -> None:
        self._links = LinkWriter(RunDir(run_dir).links(rank))
        # Seconds in collections since the last lap. Written by ``_note``, in whichever thread
        # collects, and emptied by ``lap``: a lost update costs one part's figure.
        self._collecting_s = 0.0
        self._collection_began: float | None = None
        gc.callbacks.append(self._note)
        self._schedstat = -1  # the kernel does not count
        with contextlib.suppress(OSError):
            self._schedstat = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        self._delay_s = self._read_delay_s()
        # Of the step under way. Only the training thread uses them.
        self._gc_s, self._stolen_s = 0.0, 0.0
        self._by_part: dict[str, float] = {}

    def begin(self) -> None:
        """Begin a step: what was taken until now belongs to none."""
        self._collecting_s = 0.0
        self._delay_s = self._read_delay_s()
        self._gc_s, self._stolen_s = 0.0, 0.0
        self._by_part = {}

    def lap(self, part: str) -> None:
        """Note that ``part`` of the step ends now. A part may have several laps."""
        gc_s, self._collecting_s = self._collecting_s, 0.0
        taken_s = gc_s
        self._gc_s += gc_s
        before, self._delay_s = self._delay_s, self._read_delay_s()
        if before is not None and self._delay_s is not None:
            self._stolen_s += self._delay_s - before
            taken_s += self._delay_s - before
        self._by_part[part] = self._by_part.get(part, 0.0) + taken_s

    def end(self) -> Vitals:
        """Return what was taken from the step."""
        self._links.sample()
        stolen_s = None if self._delay_s is None else self._stolen_s
        return Vitals(self._gc_s, stolen_s, self._by_part)

    def close(self) -> None:
        """Stop counting."""
        gc.callbacks.remove(self._note)
        self._links.close()
        if self._schedstat >= 0:
            os.close(self._schedstat)

    def _read_delay_s(self) -> float | None:
        """Return for how long the thread has waited for a core, since it began."""
        if self._schedstat < 0:
            return None
        # Three numbers: nanoseconds on a core, nanoseconds of waiting for one, turns.
        # (Documentation/scheduler/sched-stats.rst of Linux)
        return int(os.pread(self._schedstat, 80, 0).split()[1]) / 1e9

    def _note(self, phase: str, info: dict[str, Any]) -> None:
        if phase == "start":
            self._collection_began = time.perf_counter()
        elif self._collection_began is not None:
            self._collecting_s += time.perf_counter() - self._collection_began
            self._collection_began = None
