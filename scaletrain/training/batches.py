"""Which samples make up a step: a fixed order that does not depend on the number of workers."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from scaletrain.errors import UserError


class GlobalBatches:
    """The global batch of every step, and each rank's share of it.

    Every epoch is a new permutation of the data, drawn from (seed, epoch). Its batches are
    consecutive slices; the samples left over at its end are dropped. N workers split the batch
    that one worker would take: rank r gets slice r of N, and sizes differ by at most one.

    Args:
        num_samples: in the training set.
        batch_size: samples a step, of all workers.
        seed: of the run.

    Raises:
        UserError: the batch is larger than the training set.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int):
        if batch_size > num_samples:
            raise UserError(
                f"batch_size: {batch_size} is more than the {num_samples} training samples"
                f" (allowed: 1 to {num_samples})"
            )
        self.batch_size = batch_size
        self.steps_per_epoch = num_samples // batch_size
        self._num_samples = num_samples
        self._seed = seed
        self._epoch = -1  # whose order is kept
        self._order = torch.empty(0, dtype=torch.int64)

    def indices(self, step: int) -> torch.Tensor:
        """Return the samples of a step's global batch: (batch_size,) int64."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            # 20 bits for the epoch, so that seed 1 does not repeat the orders of seed 0.
            generator = torch.Generator().manual_seed((self._seed << 20) + epoch)
            self._order = torch.randperm(self._num_samples, generator=generator)
            self._epoch = epoch
        first = batch * self.batch_size
        return self._order[first : first + self.batch_size]

    def share(self, step: int, rank: int, size: int) -> torch.Tensor:
        """Return a rank's slice of the step's global batch."""
        # Rank r ends where rank r + 1 begins, so the slices cover the batch without gaps.
        first = rank * self.batch_size // size
        end = (rank + 1) * self.batch_size // size
        return self.indices(step)[first:end]


def load(
    dataset: Dataset,
    shares: Iterator[torch.Tensor],
    num_loaders: int,
    collate: Callable[[list[Any]], Any] | None = None,
) -> Iterator[Any]:
    """Return the batches of the samples that ``shares`` names.

    A TensorDataset is indexed at once; any other map-style data set is read sample by sample and
    collated.

    Args:
        dataset: of (input, target) samples.
        shares: indices of each batch, int64.
        num_loaders: processes that read ahead; 0: read in line.
        collate: samples -> batch; None: torch's default.
    """
    if isinstance(dataset, TensorDataset) and num_loaders == 0 and collate is None:
        return (dataset[share] for share in shares)
    loader = DataLoader(
        dataset, batch_sampler=_Lists(shares), num_workers=num_loaders, collate_fn=collate
    )
    return iter(loader)


class _Lists:
    """The shares as lists of int, as DataLoader wants them."""

    def __init__(self, shares: Iterator[torch.Tensor]):
        self._shares = shares

    def __iter__(self) -> Iterator[list[int]]:
        for share in self._shares:
            yield share.tolist()
