"""A random order of any number of samples that is computed place by place, never as a whole.

``torch.randperm`` of 30 million samples takes seconds and 240 MB, on every rank and at every epoch.
A step needs a few hundred places of it.
"""

import math

import numpy as np
from numpy.typing import NDArray

from scaletrain.training.randomness import mixed_bits, seed_of

# An even number. Four are known to suffice for large sizes. With few samples a round has little to
# choose from: with 8, some orders of 5 samples came up more often than others, with 12 none did.
_ROUNDS = 12


class Permutation:
    """A bijection of 0..size-1 to itself, drawn from a place.

    A number below the size is written with two digits, ``high * columns + low``, where ``rows`` and
    ``columns`` are about the square root of the size. Each round adds a random function of one
    digit to the other (a Feistel network). A round can be undone, so the whole is a bijection of
    the rows x columns numbers. Those are slightly more than the size: a number that lands outside
    goes through the network again until it lands inside (cycle-walking), which keeps it a
    bijection. Source: J. Black, P. Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002.

    Args:
        size: number of places, at least 1.
        place: of the draw, as for ``seed_of``.
    """

    def __init__(self, size: int, *place: int | str):
        self._size = size
        self._rows = math.isqrt(size - 1) + 1  # the square root, rounded up
        self._columns = -(-size // self._rows)  # at most as many as rows
        # Round r adds functions[r, digit], so a round is a look-up: (rounds, rows) int64, which
        # is 0.5 MB and takes 1 ms for 30 million samples.
        keys = [seed_of(*place, index) for index in range(_ROUNDS)]
        functions = mixed_bits(np.arange(self._rows), np.array(keys, dtype=np.uint64)[:, None])
        functions[0::2] %= np.uint64(self._rows)
        functions[1::2] %= np.uint64(self._columns)
        self._functions = functions.astype(np.int64)

    def __call__(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the numbers at these places.

        Args:
            places: (n,) int64, each in 0..size-1.

        Returns:
            (n,) int64, in the same range.
        """
        values = self._scramble(places)
        outside = values >= self._size
        while outside.any():
            values[outside] = self._scramble(values[outside])
            outside = values >= self._size
        return values

    def _scramble(self, values: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the values after all rounds: a bijection of 0..rows*columns-1."""
        high, low = np.divmod(values, self._columns)
        for even, odd in zip(self._functions[0::2], self._functions[1::2], strict=True):
            high = (high + even[low]) % self._rows
            low = (low + odd[high]) % self._columns
        return high * self._columns + low
