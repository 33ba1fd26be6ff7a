"""Sums of small vectors over the live workers (counts of an evaluation).

They become complete even when workers die.
"""

from dataclasses import dataclass

import numpy as np

# A worker asks again for a total after a lost connection, and never for an older one.
_KEPT_TOTALS = 4


@dataclass(frozen=True)
class Total:
    """A sum that is complete."""

    number: int  # of the sum
    values: np.ndarray  # float64
    ranks: list[int]  # whose vectors it holds, in ascending order


class Sums:
    """The sums of one server. The n-th vectors of all workers belong together.

    Used by the server's only thread.
    """

    def __init__(self, workers: int):
        self._workers = workers
        # By number, then rank: the vectors of sums that somebody is missing from. Filled by add,
        # emptied by complete.
        self._parts: dict[int, dict[int, np.ndarray]] = {}
        # By number: the last few totals. Written by complete, read by add.
        self._totals: dict[int, np.ndarray] = {}

    def next(self) -> int:
        """Return the number of the sum with which a worker that comes (back) begins."""
        if self._parts:
            return min(self._parts)
        return max(self._totals, default=-1) + 1

    def add(self, number: int, rank: int, values: np.ndarray) -> np.ndarray | None:
        """Take a worker's vector.

        Args:
            number: of the sum.
            rank: of the worker.
            values: float64; copied.

        Returns:
            The total if that sum is complete already: the worker asks again after a lost
            connection. None otherwise.

        Raises:
            ValueError: another length than that of the other workers' vectors.
        """
        if number in self._totals:
            return self._totals[number]
        parts = self._parts.setdefault(number, {})
        for other in parts.values():
            if len(other) != len(values):
                raise ValueError("parts of a sum differ in length")
        parts[rank] = np.array(values)
        return None

    def complete(self, live: set[int], ever_joined: set[int]) -> list[Total]:
        """Return the sums that no live worker is missing from (any more), the oldest first.

        Args:
            live: ranks of the workers that live.
            ever_joined: ranks of all workers that ever came. Before all have, no sum is complete.
        """
        if len(ever_joined) < self._workers:
            return []
        totals = []
        for number in sorted(self._parts):
            parts = self._parts[number]
            ranks = sorted(parts)
            if live <= set(ranks):
                # In the order of the ranks, so that rounding does not depend on who came first.
                values = np.sum([parts[rank] for rank in ranks], axis=0)
                totals.append(Total(number, values, ranks))
                del self._parts[number]
                self._keep(number, values)
        return totals

    def awaited(self, live: set[int]) -> set[int]:
        """Return the live workers that others wait for here."""
        awaited: set[int] = set()
        for parts in self._parts.values():
            awaited |= live - set(parts)
        return awaited

    def _keep(self, number: int, values: np.ndarray) -> None:
        """Remember a total, and forget old ones."""
        oldest = number - _KEPT_TOTALS
        self._totals = {n: total for n, total in self._totals.items() if n > oldest}
        self._totals[number] = values
