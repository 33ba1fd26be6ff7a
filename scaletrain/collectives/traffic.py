"""How many bytes a schedule moves between ranks."""

import functools
from typing import NamedTuple

from scaletrain import plugins


class Traffic(NamedTuple):
    """The transfers of one allreduce, all ranks and rounds together."""

    num_chunks: int  # equal parts into which the schedule cuts the message
    transfers: int  # of one chunk from one rank to another


@functools.lru_cache(maxsize=512)
def traffic(collective: str, workers: int) -> Traffic:
    """Count the transfers of an algorithm without options."""
    schedule = plugins.load("collective", collective)(workers)
    transfers = sum(len(transfers) for transfers in schedule.rounds)
    return Traffic(schedule.num_chunks, transfers)


def bytes_moved(collective: str, workers: int, num_bytes: float) -> float:
    """Return the bytes that one allreduce moves between ranks, all ranks together.

    >>> bytes_moved("ring", 4, 4e6)
    24000000.0

    Args:
        collective: an algorithm without options, such as ``ring``.
        workers: number of ranks.
        num_bytes: size of the message that is reduced.
    """
    counted = traffic(collective, workers)
    return num_bytes / counted.num_chunks * counted.transfers
