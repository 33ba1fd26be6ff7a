"""Huffman codes of small symbols, in their canonical form: the lengths alone are the code.

Symbols are coded in parts of ``PART`` symbols, and the bits of each part are noted. So a decoder
reads all parts at once, one symbol of each in a round, and numpy does the work.
"""

import heapq
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_BITS = 15  # of a symbol
PART = 1024  # symbols; their bits fit into 16 bits
# In the place of a length: the one symbol there is, which takes no bits.
ONLY = MAX_BITS + 1


class Stream(NamedTuple):
    """Coded symbols."""

    lengths: NDArray[np.uint8]  # (symbols of the alphabet,): bits of each; 0: it does not occur
    parts: NDArray[np.uint16]  # bits of each part
    data: NDArray[np.uint8]


def code_lengths(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the bits of each symbol in the shortest code (Huffman 1952) of at most ``MAX_BITS``.

    >>> code_lengths(np.array([5, 1, 0, 1, 2])).tolist()
    [1, 3, 0, 3, 2]

    Args:
        counts: (alphabet,) how often each symbol occurs.
    """
    lengths = np.zeros(len(counts), dtype=np.uint8)
    used = np.flatnonzero(counts)
    if len(used) == 1:
        lengths[used] = ONLY
        return lengths
    weights = counts[used]
    found = _depths(weights)
    # Rare symbols of a long alphabet would take more bits: they count as less rare then.
    while found.max(initial=0) > MAX_BITS:
        weights = (weights + 1) // 2
        found = _depths(weights)
    lengths[used] = found
    return lengths


def num_bits(counts: NDArray[np.int64]) -> int:
    """Return the bits that symbols with these counts take."""
    lengths = code_lengths(counts).astype(np.int64)
    return 0 if ONLY in lengths else int((lengths * counts).sum())


def _depths(weights: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the depth of each leaf in the Huffman tree of these weights."""
    depths = np.zeros(len(weights), dtype=np.int64)
    # (weight, the least leaf, all leaves): the leaf makes the order the same everywhere.
    heap = [(int(weight), leaf, [leaf]) for leaf, weight in enumerate(weights)]
    heapq.heapify(heap)
    while len(heap) > 1:
        first, second = heapq.heappop(heap), heapq.heappop(heap)
        leaves = first[2] + second[2]
        depths[leaves] += 1
        heapq.heappush(heap, (first[0] + second[0], min(first[1], second[1]), leaves))
    return depths


def encode(symbols: NDArray[np.int64], alphabet: int) -> Stream:
    """Code symbols.

    Args:
        symbols: (n,) from 0 to ``alphabet`` - 1.
        alphabet: its number of symbols.
    """
    lengths = code_lengths(np.bincount(symbols, minlength=alphabet))
    if ONLY in lengths or not len(symbols):
        return Stream(lengths, np.empty(0, np.uint16), np.empty(0, np.uint8))
    bits_of = lengths[symbols].astype(np.int64)
    codes = _codes(lengths)[symbols]
    ends = np.cumsum(bits_of)
    bits = np.zeros(int(ends[-1]), dtype=np.uint8)
    for place in range(int(bits_of.max())):  # the first bit of all symbols, then the second ...
        has = np.flatnonzero(bits_of > place)
        shift = bits_of[has] - 1 - place
        bits[ends[has] - 1 - shift] = (codes[has] >> shift) & 1
    last_of_parts = np.minimum(np.arange(PART, len(symbols) + PART, PART), len(symbols)) - 1
    parts = np.diff(ends[last_of_parts], prepend=0).astype(np.uint16)
    return Stream(lengths, parts, np.packbits(bits))


def decode(stream: Stream, count: int) -> NDArray[np.int64]:
    """Return the symbols of a stream. Nothing in it is trusted.

    Args:
        stream: coded by ``encode``, or something else.
        count: number of symbols.

    Raises:
        ValueError: the stream does not hold as many symbols.
    """
    lengths = stream.lengths
    if ONLY in lengths:
        only = np.flatnonzero(lengths)
        if len(only) != 1 or len(stream.data) or len(stream.parts):
            raise ValueError("a code of one symbol has others beside it")
        return np.full(count, only[0], dtype=np.int64)
    if not count:
        return np.empty(0, dtype=np.int64)
    symbol_at, bits_at = _tables(lengths)
    num_parts = -(-count // PART)
    ends = np.cumsum(stream.parts.astype(np.int64))
    if len(ends) != num_parts or (int(ends[-1]) + 7) // 8 != len(stream.data):
        raise ValueError("the parts of a code do not fit its data")
    starts = ends - stream.parts
    found = np.empty((num_parts, PART), dtype=np.int64)
    # Three bytes hold any code, wherever it begins in the first of them.
    data = np.append(stream.data, np.zeros(3, np.uint8)).astype(np.uint32)
    places = starts.copy()
    in_last = count - (num_parts - 1) * PART
    for index in range(PART):
        live = num_parts if index < in_last else num_parts - 1
        here = places[:live]
        byte = np.minimum(here >> 3, len(stream.data))
        window = (data[byte] << 16) | (data[byte + 1] << 8) | data[byte + 2]
        window = (window >> (24 - MAX_BITS - (here & 7)).astype(np.uint32)) & ((1 << MAX_BITS) - 1)
        found[:live, index] = symbol_at[window]
        places[:live] += bits_at[window]
    if not np.array_equal(places, ends):
        raise ValueError("a code ends in the middle of a symbol")
    return found.ravel()[:count]


def _codes(lengths: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Return the canonical codes: shorter ones first, equal ones in the symbols' order."""
    codes = np.zeros(len(lengths), dtype=np.int64)
    code = 0
    for length in range(1, MAX_BITS + 1):
        code <<= 1
        for symbol in np.flatnonzero(lengths == length):
            codes[symbol] = code
            code += 1
    return codes


def _tables(lengths: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return symbol and length of the code that each ``MAX_BITS`` bits begin with.

    Raises:
        ValueError: these are not the lengths of a code.
    """
    used = np.flatnonzero(lengths)
    widths = 1 << (MAX_BITS - lengths[used].astype(np.int64))
    if lengths.max(initial=0) > MAX_BITS or widths.sum() != 1 << MAX_BITS:
        raise ValueError("these are not the lengths of a Huffman code")
    order = np.lexsort((used, lengths[used]))
    return np.repeat(used[order], widths[order]), np.repeat(
        lengths[used][order].astype(np.int64), widths[order]
    )
