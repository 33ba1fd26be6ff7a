"""Processor cores, and which of them a worker is kept on."""

import os


def usable() -> list[int]:
    """Return the cores that this process may use, in ascending order."""
    return sorted(os.sched_getaffinity(0))


def cores_of(rank: int, threads: int) -> list[int]:
    """Return the cores that a bound worker is kept on: the next ``threads`` usable ones.

    With more threads than cores, workers share them in turn.
    """
    cores = usable()
    first = rank * threads
    return [cores[place % len(cores)] for place in range(first, first + threads)]
