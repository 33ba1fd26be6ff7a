"""Sums of small vectors over the live workers (evaluation counts), complete even when workers die."""

import numpy as np


class Sums:
    """The n-th sum of every worker belongs together. ``complete`` answers as soon as nobody who lives is missing."""

    def __init__(self, workers: int):
        self._workers = workers
        self._parts: dict[int, dict[int, np.ndarray]] = {}  # sequence number -> rank -> values
        self._done: dict[int, np.ndarray] = {}

    def next(self) -> int:
        """The sequence number with which a worker that comes (back) begins."""
        return min(self._parts, default=max(self._done, default=-1) + 1)

    def add(self, number: int, rank: int, values: np.ndarray) -> np.ndarray | None:
        """Take a worker's part. Returns the total when that sum is complete already (asked again after a lost connection).

        Raises:
            ValueError: another length than the other workers' parts.
        """
        if number in self._done:
            return self._done[number]
        parts = self._parts.setdefault(number, {})
        if any(len(other) != len(values) for other in parts.values()):
            raise ValueError("parts of a sum differ in length")
        parts[rank] = np.array(values)
        return None

    def complete(self, live: set[int], seen: set[int]) -> list[tuple[int, np.ndarray, list[int]]]:
        """Sums that became complete: (number, total in rank order, ranks to be told). ``seen``: all that ever came."""
        if len(seen) < self._workers:
            return []
        ready = []
        for number in sorted(self._parts):
            parts = self._parts[number]
            if live <= set(parts):
                total = np.sum([parts[rank] for rank in sorted(parts)], axis=0)
                ready.append((number, total, sorted(parts)))
                del self._parts[number]
                self._done = {
                    number: total,
                    **{n: t for n, t in self._done.items() if n > number - 4},
                }
        return ready

    def awaited(self, live: set[int]) -> set[int]:
        """Live workers that others wait for here."""
        return {rank for parts in self._parts.values() for rank in live if rank not in parts}
