"""Pipelined chain tree: the message flows in segments down a tree without forks and back, so every link is busy at once."""

from typing import Annotated

from annotated_types import Ge

from scaletrain.collectives.schedule import Schedule, Transfer, pipeline


def schedule(
    size: int, *, segments: Annotated[int, Ge(1)] = 16, fan_out: Annotated[int, Ge(1)] = 1
) -> Schedule:
    """A tree of ``fan_out`` children a node, cut into ``segments``; 1 is the chain, which moves the fewest bytes through a port.

    A port carries (fan_out + 1) times the message: 2 for the chain, in about 2(p + segments) rounds, since the sum of one segment travels down
    while the next one still travels up. Van de Geijn's pipelined tree, as in Thakur et al., IJHPCA 2005.
    """
    up = [Transfer(r, (r - 1) // fan_out, 0, True) for r in range(size - 1, 0, -1)]
    down = [Transfer(t.dst, t.src, 0, False) for t in reversed(up)]
    return pipeline([*up, *down], size, segments)
