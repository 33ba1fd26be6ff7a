"""Sums of small vectors over the live workers (counts of an evaluation).

They become complete even when workers die, or come late.
"""

from dataclasses import dataclass

import numpy as np

from scaletrain.parameter_server.protocol import wire

# A worker asks again for a total after a lost connection, and never for an older one.
_KEPT_TOTALS = 4


@dataclass(frozen=True)
class Total:
    """A sum that is complete."""

    number: int  # of the sum
    values: np.ndarray  # float64
    ranks: list[int]  # whose vectors it holds, in ascending order


class Sums:
    """The sums of one server. Vectors with the same number belong together.

    Numbers ascend (``wire.SUMS_OF_A_STEP``). A worker owes its vector to every sum, except those
    before one that it has sent a vector to, and those of a step at which the others had met when it
    came.

    Used by the server's only thread.
    """

    def __init__(self, workers: int):
        self._workers = workers
        # By number, then rank: the vectors of sums that somebody is missing from. Filled by add,
        # emptied by complete.
        self._parts: dict[int, dict[int, np.ndarray]] = {}
        # By number: the last few totals. Written by complete, read by add.
        self._totals: dict[int, np.ndarray] = {}
        # By rank: the last sum that it does not owe any more. Written by came and add.
        self._passed: dict[int, int] = {}

    @property
    def met_step(self) -> int:
        """The step of the last sum that was complete; -1: none."""
        return max(self._totals, default=-1) // wire.SUMS_OF_A_STEP

    def came(self, rank: int) -> None:
        """Note that a worker has come as a new process: the others may be in the midst of sums."""
        self._passed[rank] = (self.met_step + 1) * wire.SUMS_OF_A_STEP - 1

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
        self._passed[rank] = max(number, self._passed.get(rank, -1))
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
            if self._owing(number, live):
                continue
            parts = self._parts.pop(number)
            ranks = sorted(parts)
            # In the order of the ranks, so that rounding does not depend on who came first.
            values = np.sum([parts[rank] for rank in ranks], axis=0)
            totals.append(Total(number, values, ranks))
            self._totals[number] = values
        for number in sorted(self._totals)[:-_KEPT_TOTALS]:
            del self._totals[number]
        return totals

    def awaited(self, live: set[int]) -> set[int]:
        """Return the live workers that others wait for here."""
        awaited: set[int] = set()
        for number in self._parts:
            awaited |= self._owing(number, live)
        return awaited

    def _owing(self, number: int, live: set[int]) -> set[int]:
        """Return the live workers that owe their vector to a sum."""
        return {rank for rank in live if self._passed.get(rank, -1) < number}
