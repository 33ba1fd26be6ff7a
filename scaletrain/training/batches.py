"""Which samples make up step i: a fixed order that does not depend on the number of workers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from scaletrain.errors import UserError


class GlobalBatches:
    """The global batch of every step, and each rank's share of it.

    Every epoch is a new permutation of the data, drawn from (seed, epoch); its batches are consecutive slices, what is left over at
    its end is dropped. N workers split the very batch that one worker would take: rank r gets slice r of N, sizes differ by at
    most one.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int):
        if batch_size > num_samples:
            raise UserError(
                f"batch_size: {batch_size} is more than the {num_samples} training samples (allowed: 1 to {num_samples})"
            )
        self.batch_size = batch_size
        self.steps_per_epoch = num_samples // batch_size
        self._num_samples = num_samples
        self._seed = seed
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> torch.Tensor:
        """The samples of a step's global batch: (batch_size,) int64."""
        epoch, at = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            random = torch.Generator().manual_seed((self._seed << 20) + epoch)
            self._order, self._epoch = torch.randperm(self._num_samples, generator=random), epoch
        return self._order[at * self.batch_size : (at + 1) * self.batch_size]

    def share(self, step: int, rank: int, size: int) -> torch.Tensor:
        """Rank's slice of the step's global batch."""
        return self.indices(step)[
            rank * self.batch_size // size : (rank + 1) * self.batch_size // size
        ]


def load(
    dataset: Dataset, shares: Iterator[torch.Tensor], workers: int
) -> Iterator[tuple[Any, Any]]:
    """(input, target) batches of the samples that ``shares`` names. ``workers`` processes read ahead (0: none, read in line).

    A TensorDataset is indexed at once; any other map-style dataset is read sample by sample and collated.
    """
    if isinstance(dataset, TensorDataset) and workers == 0:
        return (dataset[share] for share in shares)
    return iter(DataLoader(dataset, batch_sampler=_Lists(shares), num_workers=workers))


class _Lists:
    """DataLoader wants lists of ints."""

    def __init__(self, shares: Iterator[torch.Tensor]):
        self._shares = shares

    def __iter__(self) -> Iterator[list[int]]:
        return (share.tolist() for share in self._shares)
