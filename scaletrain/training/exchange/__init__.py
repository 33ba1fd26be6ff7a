"""The contract of an exchange: who owns the update, and how gradients travel. Every other file here is one exchange.

A plugin is a function ``exchange(world, setup, *, <options>) -> Exchange``, called once by every rank (collectively).
"""

import abc
import contextlib
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import nn

from scaletrain.world import World


class Setup(NamedTuple):
    """What a worker hands to an exchange besides who it is."""

    store: torch.distributed.Store  # the job's key-value store, already joined by all ranks
    device: torch.device
    timeout: timedelta  # of every collective and message
    run_dir: Path


class Exchange(abc.ABC):
    """One worker's end of the exchange. All methods are called by all ranks, in the same order, unless said otherwise."""

    world: World

    @abc.abstractmethod
    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Make every rank's weights equal rank 0's, and return the module whose forward and backward exchange gradients."""

    @abc.abstractmethod
    def step(self, lr: float) -> None:
        """After backward: bring the weights to the next step.

        Allreduce styles run the local optimizer, whose gradients are already the mean over all ranks; a parameter server waits for the new
        weights.
        """

    @abc.abstractmethod
    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of a small CPU tensor (evaluation counts); returned on every rank."""

    def accumulate(self) -> contextlib.AbstractContextManager[None]:
        """Backward passes inside do not exchange: they only add to the gradients."""
        return contextlib.nullcontext()

    def skip(self, most: int) -> int:
        """How many of the next ``most`` steps this rank has to leave out: the job did them without it (it came late, or its gradients did).

        Local; called by each rank when it likes.
        """
        return 0

    def live_workers(self) -> int:
        """How many workers train, as far as this rank has heard: some exchanges go on without one that died. Local."""
        return self.world.size

    def record(self) -> dict[str, float]:
        """The exchange's own numbers of the last step, for the StepRecord. Local: does not communicate."""
        return {}

    def chosen(self) -> dict[str, Any]:
        """What was chosen where the configuration says ``auto``, as JSON-able values for the summary. Local."""
        return {}

    def close(self) -> None:  # noqa: B027 (most have nothing to do)
        """Leave in good order: waits for what is under way. Not called after a failure."""
