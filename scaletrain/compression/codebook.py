"""Codebooks: a few values that many weights share, found by k-means in one dimension."""

import numpy as np
from numpy.typing import NDArray

_MOST_ROUNDS = 100  # far more than weights of a layer need


def cluster(values: NDArray[np.floating], count: int) -> NDArray[np.float64]:
    """Return the centres of at most ``count`` clusters of values, ascending.

    Lloyd's rounds start from centres spread evenly between the least and the largest value. So the
    few large weights get centres of their own, and they matter most (Han et al. 2016, section 3.2).
    Pruned layers have no small weights: centres that nothing is near divide the widest clusters.
    The same values give the same centres on every rank.

    >>> cluster(np.array([-1.0, -1.2, 3.0, 3.2, 3.1]), 2).round(6).tolist()
    [-1.1, 3.1]

    Args:
        values: (n,) at least one.
        count: of clusters; there are fewer if there are fewer distinct values.
    """
    ordered = np.sort(values.astype(np.float64))
    sums = np.append(0.0, np.cumsum(ordered))
    centres = _begin(ordered, count)
    for _ in range(_MOST_ROUNDS):
        edges = _edges(ordered, centres)
        sizes = np.diff(edges)
        filled = sizes > 0
        moved = np.diff(sums[edges])[filled] / sizes[filled]
        if np.array_equal(moved, centres):
            break
        centres = moved
    return centres


def _edges(ordered: NDArray[np.float64], centres: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the ends of the clusters: in one dimension, each is a range of the ordered values."""
    inner = np.searchsorted(ordered, (centres[1:] + centres[:-1]) / 2, side="right")
    return np.concatenate(([0], inner, [len(ordered)]))


def _begin(ordered: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    """Return centres to begin with, each with a value near it."""
    centres = np.linspace(ordered[0], ordered[-1], count)
    for _ in range(_MOST_ROUNDS + count):
        edges = _edges(ordered, centres)
        filled = np.diff(edges) > 0
        if filled.all() and len(centres) == count:
            break
        first, last = ordered[edges[:-1][filled]], ordered[edges[1:][filled] - 1]
        widest = int(np.argmax(last - first))
        if first[widest] == last[widest]:
            return centres[filled]  # no two distinct values are left together
        ends = [first[widest], last[widest]]
        centres = np.sort(np.append(np.delete(centres[filled], widest), ends))
    return centres


def assign(values: NDArray[np.floating], centres: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the number of the nearest centre of each value; of two, the lower one."""
    return np.searchsorted((centres[1:] + centres[:-1]) / 2, values, side="left")
