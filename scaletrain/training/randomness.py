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
