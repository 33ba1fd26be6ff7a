"""Double binary tree: two trees carry half the message each, with other ranks as forks."""

import functools
from typing import Annotated

from annotated_types import Ge

from scaletrain.collectives.cost import Load, pipelined_loads
from scaletrain.collectives.schedule import Pipeline, Schedule, Transfer, sent_back


def schedule(size: int, *, segments: Annotated[int, Ge(1)] = 16) -> Schedule:
    """Return two pipelined trees. A rank that forks in one is a leaf in the other.

    A port carries twice the message, in O(log p + segments) rounds.

    The second tree is the first one on ranks shifted by one (for even sizes: mirrored). The leaves
    of the first one, the even numbers in-order, are then the forks of the second one.

    Source: Sanders, Speck and Traeff, Two-tree algorithms for full bandwidth broadcast, reduction
    and scan, Parallel Computing 2009; NCCL since 2.4.

    Args:
        size: number of ranks.
        segments: parts into which the half of each tree is cut.
    """
    return _pipeline(size).schedule(segments)


def loads(size: int, *, segments: int = 16, hosts_per_leaf: int = 0) -> list[Load]:
    """Return the loads of the rounds, for so many ranks that the schedule is slow to make."""
    return pipelined_loads(_pipeline(size), segments, hosts_per_leaf)


@functools.lru_cache(maxsize=4)
def _pipeline(size: int) -> Pipeline:
    first = _parents(size)
    # For odd sizes, mirroring maps even ranks to even ones: the leaves would be the same.
    if size % 2 == 0:
        second = _mirrored(first)
    else:
        second = _shifted(first)
    transfers = []
    for tree, parents in enumerate((first, second)):
        # Chunk 0 is the half of the first tree, chunk 1 that of the second.
        up = []
        for rank in _leaves_first(parents):
            parent = parents[rank]
            if parent is not None:
                up.append(Transfer(rank, parent, tree, True))
        transfers += [*up, *sent_back(reversed(up))]
    return Pipeline.of(transfers, size)


def _parents(size: int) -> list[int | None]:
    """Return the parent of each rank in an in-order binary tree; None: the root.

    The leaves are the even ranks. A rank's height is the number of its trailing one bits.
    """
    parents: list[int | None] = [None] * size

    def grow(low: int, high: int, parent: int | None) -> None:
        """Make a tree of the ranks from ``low`` to ``high`` (exclusive) below a parent."""
        if low >= high:
            return
        # The part on the left is a full tree of 2^height - 1 ranks, so the part on the right begins
        # at an even rank again, and the leaves stay even.
        height = (high - low).bit_length() - 1
        root = low + (1 << height) - 1
        parents[root] = parent
        grow(low, root, root)
        grow(root + 1, high, root)

    grow(0, size, None)
    return parents


def _mirrored(parents: list[int | None]) -> list[int | None]:
    """Return the same tree on the ranks in reverse order."""
    last = len(parents) - 1
    mirrored: list[int | None] = [None] * len(parents)
    for rank, parent in enumerate(parents):
        if parent is not None:
            mirrored[last - rank] = last - parent
    return mirrored


def _shifted(parents: list[int | None]) -> list[int | None]:
    """Return the same tree with every rank moved up by one, the last one to 0."""
    size = len(parents)
    shifted: list[int | None] = [None] * size
    for rank, parent in enumerate(parents):
        if parent is not None:
            shifted[(rank + 1) % size] = (parent + 1) % size
    return shifted


def _leaves_first(parents: list[int | None]) -> list[int]:
    """Return the ranks, the deepest first."""

    def depth(rank: int) -> int:
        steps = 0
        parent = parents[rank]
        while parent is not None:
            steps += 1
            parent = parents[parent]
        return steps

    # A rank passes on what it has added, so its children send before it does.
    return sorted(range(len(parents)), key=lambda rank: (-depth(rank), rank))
