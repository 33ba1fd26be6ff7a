"""Randomness from place: a random draw depends on where in the run it happens, and on nothing else.

A generator that runs on from draw to draw gives other numbers after a resume, in another process or
on another number of workers. Here every place of a run (the forward of a step on a rank, a sample
of an epoch) has a seed of its own, and the generators are seeded when the run gets there. So
checkpoints hold no generator's state.

The generators are the global ones of torch, ``random`` and numpy, since people's models and data
sets draw from these. Nobody restores them: a worker's process owns its generators.
"""

import hashlib
import random
from collections.abc import Sized
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

_NUMPY_SEEDS = 2**32  # numpy's global generator takes an int of 32 bits, or a slow array


def seed_of(*place: int | str) -> int:
    """Return the 64-bit seed of a place, the same on every machine and in every process.

    >>> seed_of(0, "forward", 12, 3)
    3945506436694785588

    Args:
        place: the run's seed first, by custom; then names and numbers of any size.
    """
    digest = hashlib.blake2b(digest_size=8)
    for part in place:
        # The kind and the end of each part are written down, so no two places look alike.
        if isinstance(part, str):
            text = part.encode()
            digest.update(b"s%d:%b" % (len(text), text))
        else:
            # Hexadecimal: Python refuses to write very long decimal numbers.
            digest.update(b"i%x;" % part)
    return int.from_bytes(digest.digest(), "little")


def mixed_bits(values: NDArray[np.int64], keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return 64 well-mixed bits of each value under each key: the finaliser of SplitMix64.

    Written out, since numpy's and torch's generators may draw other numbers in other versions.
    Source: G. Steele, D. Lea, C. Flood, "Fast splittable pseudorandom number generators", 2014.

    Args:
        values: (n,) int64, not negative.
        keys: (k, 1) uint64.

    Returns:
        (k, n) uint64.
    """
    # Arithmetic of numpy's arrays wraps around at 2**64, which is wanted.
    mixed = values.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + keys
    mixed ^= mixed >> np.uint64(30)
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return mixed


def seed_generators(seed: int) -> None:
    """Seed the global generators of torch (CPU), ``random`` and numpy.

    Args:
        seed: of 64 bits, not negative.
    """
    # ``torch.manual_seed`` would also visit every kind of accelerator, which takes 318 us.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % _NUMPY_SEEDS)


def seed_forward(device: torch.device, seed: int, step: int, rank: int) -> None:
    """Seed the global generators, and the device's, for a rank's forward passes of a step.

    Every rank draws its own dropout masks, and a resumed run draws those of the undisturbed one.

    Args:
        device: of the model; a CUDA device must be in use already.
        seed: of the run.
        step: of the optimizer, from 0.
        rank: of this worker.
    """
    # 14 us a step on a CPU: 6 of them ``random.seed``, 2 numpy's, 1 torch's, 3 the hash.
    place_seed = seed_of(seed, "forward", step, rank)
    seed_generators(place_seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(place_seed)


class Placed(Dataset):
    """A map-style data set that reads each sample under the seed of its place.

    The generators are seeded by (seed, epoch, index) before each sample, in the process that reads
    it. So a sample's augmentation depends on neither workers, loader processes nor resumes.

    It is indexed by (epoch, index) pairs: loader processes read ahead across the end of an epoch,
    so no attribute could tell them which epoch an index belongs to.

    Args:
        dataset: map-style.
        seed: of the run.
    """

    def __init__(self, dataset: Dataset, seed: int):
        self.dataset = dataset
        self.seed = seed

    def __len__(self) -> int:
        return len(cast(Sized, self.dataset))

    def __getitem__(self, place: tuple[int | str, int]) -> Any:
        """Return a sample.

        Args:
            place: the epoch, or the name of a pass outside of training such as "test"; and the
                sample's index.
        """
        epoch, index = place
        seed_generators(seed_of(self.seed, epoch, index))
        return self.dataset[index]
