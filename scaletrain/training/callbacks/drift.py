"""Compares the weights of all ranks now and then, and names the first parameter that differs."""

import hashlib
from typing import TYPE_CHECKING, Annotated

import torch
from annotated_types import Ge

from scaletrain.errors import TrainingError
from scaletrain.needs import Needs
from scaletrain.run.records import StepRecord
from scaletrain.training.callbacks import Callback

if TYPE_CHECKING:
    from scaletrain.training.trainer import Trainer

NEEDS = Needs(equal_replicas=True)


class Drift(Callback):
    """Stops the run when replicas are not bitwise equal, as an exchange promises.

    Each rank hashes its parameters; one small sum brings all hashes to all ranks.
    """

    def __init__(self, trainer: "Trainer", every: int):
        self._ranks = trainer.exchange.group  # those that train the same model
        self._first_rank = trainer.world.rank - self._ranks.world.rank
        self._named = [*trainer.module.named_parameters()]
        self._every = every

    def after_step(self, record: StepRecord) -> None:
        """Compare, if it is time to.

        Raises:
            TrainingError: a parameter differs; the message names it and the ranks.
        """
        if (record.step + 1) % self._every:
            return
        rank, size = self._ranks.world.rank, self._ranks.world.size
        hashes = torch.zeros(size, len(self._named), dtype=torch.float64)
        for index, (_, parameter) in enumerate(self._named):
            hashes[rank, index] = _hash(parameter.detach())
        hashes = self._ranks.sum(hashes.flatten()).view(size, -1)
        differs = (hashes != hashes[0]).any(0)
        if not differs.any():
            return
        first = int(differs.nonzero()[0])
        others = (hashes[:, first] != hashes[0, first]).nonzero().flatten() + self._first_rank
        raise TrainingError(
            f"step {record.step}: the weights have drifted apart: {self._named[first][0]} of rank"
            f" {', '.join(map(str, others.tolist()))} is not that of rank {self._first_rank}"
            f" ({int(differs.sum())} of {len(self._named)} parameters differ)"
        )


def _hash(tensor: torch.Tensor) -> int:
    """Return 48 bits of a tensor's bytes, which a float64 holds exactly."""
    flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
    digest = hashlib.blake2b(flat.numpy().data, digest_size=6).digest()
    return int.from_bytes(digest, "little")


def callback(trainer: "Trainer", *, every: Annotated[int, Ge(1)] = 100) -> Callback:
    """Return the callback.

    Args:
        every: steps between comparisons.
    """
    return Drift(trainer, every)
