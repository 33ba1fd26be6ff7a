"""Double binary tree: two trees carry half the message each; a rank that forks in one is a leaf in the other."""

from typing import Annotated

from annotated_types import Ge

from scaletrain.collectives.schedule import Schedule, Transfer, pipeline


def schedule(size: int, *, segments: Annotated[int, Ge(1)] = 16) -> Schedule:
    """Sanders, Speck and Traeff, Parallel Computing 2009; NCCL 2.4. Twice the message through a port, in O(log p + segments) rounds.

    ``segments`` of each tree. The second tree is the first one on ranks shifted by one (even sizes: mirrored), so that the
    first one's leaves, the even numbers in-order, are the second one's forks.
    """
    first = _parents(size)
    shift = (lambda r: size - 1 - r) if size % 2 == 0 else (lambda r: (r + 1) % size)
    back = (lambda r: size - 1 - r) if size % 2 == 0 else (lambda r: (r - 1) % size)
    second = [None if (parent := first[back(r)]) is None else shift(parent) for r in range(size)]
    transfers = []
    for tree, parents in enumerate((first, second)):
        up = [
            Transfer(r, parent, tree, True)
            for r in _leaves_first(parents)
            if (parent := parents[r]) is not None
        ]
        transfers += [*up, *(Transfer(t.dst, t.src, tree, False) for t in reversed(up))]
    return pipeline(transfers, size, segments)


def _parents(size: int) -> list[int | None]:
    """An in-order binary tree over 0..size-1: leaves are the even ranks, a rank's height is its number of trailing ones."""
    parents: list[int | None] = [None] * size

    def grow(low: int, high: int, parent: int | None) -> None:
        if low >= high:
            return
        height = (high - low).bit_length() - 1
        root = low + (1 << height) - 1
        parents[root] = parent
        grow(low, root, root)
        grow(root + 1, high, root)

    grow(0, size, None)
    return parents


def _leaves_first(parents: list[int | None]) -> list[int]:
    def depth(rank: int) -> int:
        steps, parent = 0, parents[rank]
        while parent is not None:
            steps, parent = steps + 1, parents[parent]
        return steps

    return sorted(range(len(parents)), key=lambda rank: (-depth(rank), rank))
