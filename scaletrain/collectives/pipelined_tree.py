"""Pipelined chain tree: segments flow along a chain and back, so every link is busy."""

import functools
from typing import Annotated

from annotated_types import Ge

from scaletrain.collectives.cost import Load, pipelined_loads
from scaletrain.collectives.schedule import Pipeline, Schedule, Transfer, sent_back


def schedule(
    size: int, *, segments: Annotated[int, Ge(1)] = 16, fan_out: Annotated[int, Ge(1)] = 1
) -> Schedule:
    """Return a pipelined tree of ``fan_out`` children a node.

    A port carries (fan_out + 1) times the message. That is twice for the chain, in about
    2(p + segments) rounds, since the sum of one segment travels down while the next one still
    travels up.

    Source: van de Geijn's pipelined tree, as in Thakur et al., IJHPCA 2005.

    Args:
        size: number of ranks.
        segments: parts into which the message is cut.
        fan_out: children of a node; 1 is the chain, which moves the fewest bytes through a port.
    """
    return _pipeline(size, fan_out).schedule(segments)


@functools.lru_cache(maxsize=4)
def _pipeline(size: int, fan_out: int) -> Pipeline:
    # Numbered as a heap. From the last rank down, every rank comes before its parent.
    up = [Transfer(rank, (rank - 1) // fan_out, 0, True) for rank in range(size - 1, 0, -1)]
    return Pipeline.of([*up, *sent_back(reversed(up))], size)


def loads(
    size: int, *, segments: int = 16, fan_out: int = 1, hosts_per_leaf: int = 0
) -> list[Load]:
    """Return the loads of the rounds, for so many ranks that the schedule is slow to make."""
    return pipelined_loads(_pipeline(size, fan_out), segments, hosts_per_leaf)
