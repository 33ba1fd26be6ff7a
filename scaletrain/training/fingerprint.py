"""A number that tells whether two processes have the same data set, from a few of its samples."""

import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from scaletrain.training.batches import read_sample
from scaletrain.training.randomness import Placed
from scaletrain.training.stream import Stream, is_stream

_SAMPLES = 8  # that are looked at: the first, the last and some between
_BYTES = 6  # 48 bits, which a float64 holds exactly


def fingerprint(dataset: Any, leaves_out: bool = False) -> int:
    """Return 48 bits of a data set's length and of some of its samples.

    Of a stream it reads the first ones.

    The samples are read under fixed seeds, so an augmentation that draws from the global generators
    changes nothing. An augmentation with a generator of its own changes the result if that is
    seeded differently.

    Args:
        dataset: with [index] and len(), or a stream.
        leaves_out: go on after a sample that cannot be read.

    Raises:
        UnreadableSample: reading a sample raised.
    """
    digest = hashlib.blake2b(digest_size=_BYTES)
    if is_stream(dataset):
        samples = Stream(dataset, 0, leaves_out).first(_SAMPLES)
        digest.update(b"stream")
    else:
        placed = Placed(dataset, seed=0)
        digest.update(b"%d" % len(placed))
        samples = []
        for index in _spread(len(placed)):
            samples.append(read_sample(placed, "fingerprint", index, leaves_out))
    for sample in samples:
        for part in _parts(sample):
            # The length of each part comes first, so that parts cannot run into each other.
            digest.update(b"%d:" % len(part))
            digest.update(part)
    return int.from_bytes(digest.digest(), "little")


def _spread(length: int) -> list[int]:
    """Return up to ``_SAMPLES`` different indices, from the first to the last."""
    count = min(length, _SAMPLES)
    if count < 2:
        return list(range(count))
    return [place * (length - 1) // (count - 1) for place in range(count)]


def _parts(tree: Any) -> Iterator[bytes | memoryview]:
    """Yield the parts of a sample, leaf by leaf, and its structure."""
    if isinstance(tree, Mapping):
        yield b"mapping of %d" % len(tree)
        for key, value in tree.items():
            yield repr(key).encode()
            yield from _parts(value)
    elif isinstance(tree, list | tuple):
        yield b"sequence of %d" % len(tree)
        for value in tree:
            yield from _parts(value)
    elif isinstance(tree, torch.Tensor) and tree.layout is torch.strided:
        yield f"{tree.dtype} {tuple(tree.shape)}".encode()
        # As bytes: numpy lacks some of torch's types.
        flat = tree.detach().cpu().contiguous().reshape(-1)
        yield flat.view(torch.uint8).numpy().data
    elif isinstance(tree, np.ndarray) and not tree.dtype.hasobject:
        yield f"{tree.dtype} {tree.shape}".encode()
        yield tree.tobytes()
    elif isinstance(tree, set | frozenset):
        # The order of a set of strings differs from process to process.
        yield repr(sorted(map(repr, tree))).encode()
    else:
        # Addresses in memory differ from process to process.
        yield re.sub("0x[0-9A-Fa-f]+", "0x", repr(tree)).encode()
