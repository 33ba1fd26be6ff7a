"""The contract of an exchange: the owner of the update, and how gradients travel.

Every other file here is one exchange: a function ``exchange(world, setup, *, <options>) ->
Exchange``, called once by every rank (collective).
"""

import abc
import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed
from torch import nn

from scaletrain.errors import UserError
from scaletrain.timeouts import Timeouts
from scaletrain.world import World


class Setup(NamedTuple):
    """The job's facts that a worker hands to an exchange."""

    store: torch.distributed.Store  # the job's key-value store, already joined by all ranks
    device: torch.device
    timeouts: Timeouts
    run_dir: Path


def attached(models: Mapping[nn.Module, Any], model: nn.Module | None) -> nn.Module:
    """Return the one of several attached models that is meant.

    Args:
        models: by the modules that ``attach`` returned.
        model: one of them; None: the only one.

    Raises:
        UserError: several are attached, and none of them is named.
    """
    if model is None and len(models) == 1:
        return next(iter(models))
    if model in models:
        return model  # type: ignore[return-value]
    raise UserError(
        f"exchange: {len(models)} models are attached (allowed: step(model) and accumulate(model),"
        " with the module that attach returned)"
    )


class Sums(Protocol):
    """One worker's end of sums over some ranks.

    Attributes:
        world: this worker's place among these ranks.
        averages: as of an ``Exchange``.
    """

    world: World
    averages: bool = True

    @abc.abstractmethod
    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks of a small CPU tensor, such as evaluation counts."""

    def begin_sum(self, values: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin a sum, and return the function that waits for it. Not where ``averages`` is False.

        Between the two this rank may run forward, and nothing else that communicates.
        """
        total = self.sum(values)
        return lambda: total


class Exchange(Sums, Protocol):
    """One worker's end of the exchange.

    A protocol: an exchange may derive from it, for its defaults, or simply have its methods.

    All ranks call all methods in the same order, unless a method says otherwise.

    Attributes:
        world: this worker's place.
        averages: whether every step's gradient is the mean over all ranks. Then a rank may weigh
            its loss by the counts of all, and all see the same gradient before the update.
        groups: the workers are split into so many groups of consecutive ranks. Each has a model of
            its own, and gradients are the mean over a group's ranks.
    """

    groups: int = 1

    @property
    def group(self) -> Sums:
        """This worker's end of sums over its group: the exchange itself if there is one group."""
        return self

    @abc.abstractmethod
    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Put the exchange under a model, and make every rank's weights equal rank 0's.

        Some exchanges take several models, each with its optimizer, such as the two of a GAN.

        Args:
            model: on this worker's device.
            optimizer: over the model's parameters. ``step`` runs it, or a server does its work with
                the learning rate of its parameter groups.

        Returns:
            The module to train with: its forward and backward exchange gradients.

        Raises:
            UserError: this exchange trains one model, and has one already.
        """

    def hold_gradients(self) -> None:
        """Let gradients that are changed between backward and ``step`` count as they are then.

        It is called once, after ``attach``, if something will change them. By default it does
        nothing: ``step`` takes gradients as they are.

        Raises:
            UserError: no worker has the gradient that an update takes.
        """
        return

    def clip(self, norm: float | None = None, value: float | None = None) -> bool:
        """Clip the gradient of every update from now on, if no worker has it.

        It is called at most once, after ``attach``.

        Args:
            norm: the largest Euclidean norm of all gradients together; None: any.
            value: the largest absolute value of a gradient's element, afterwards; None: any.

        Returns:
            False if workers have the gradients of updates, and clip them before ``step``.

        Raises:
            UserError: it was called before.
        """
        return False

    def synchronise(self, model: nn.Module | None = None) -> None:
        """Wait until a model's gradients are those that ``step`` will use.

        Call it after backward if something looks at gradients before ``step``, as clipping does. By
        default it does nothing: gradients are ready when backward ends, or have left for the
        servers.

        Args:
            model: as for ``step``.
        """
        return

    @abc.abstractmethod
    def step(self, model: nn.Module | None = None) -> None:
        """Bring the weights of a model to the next step, after backward.

        Allreduce styles run the local optimizer: the gradients are already the mean over all ranks.
        A parameter server waits for the new weights.

        Args:
            model: as ``attach`` returned it; None: the only one.
        """

    def accumulate(self, model: nn.Module | None = None) -> contextlib.AbstractContextManager[None]:
        """Return a context in which backward only adds to the gradients, and exchanges nothing.

        Args:
            model: as for ``step``.
        """
        return contextlib.nullcontext()

    def skip(self, most: int) -> int:
        """Return how many of the next ``most`` steps this rank has to leave out.

        The job has done those steps without it: the rank came late, or its gradients did. Local:
        each rank may call it at any time.
        """
        return 0

    def owes_meeting(self) -> bool:
        """Return True if this rank came late, and has to begin with a meeting.

        ``skip`` has led it to a step after which the others have not met yet (in an evaluation, or
        before a checkpoint). Local.
        """
        return False

    def live_workers(self) -> int:
        """Return how many workers train, as far as this rank knows. Local.

        Some exchanges go on without a worker that died.
        """
        return self.world.size

    def record(self) -> dict[str, float]:
        """Return the exchange's own numbers of the last step, for the StepRecord. Local."""
        return {}

    def chosen(self) -> dict[str, Any]:
        """Return the choices of ``auto``, for the summary. Local."""
        return {}

    def describe(self) -> list[str]:
        """Return lines for people about what was chosen before the first step. Local."""
        return []

    def close(self) -> None:
        """Leave in good order: wait for work under way. Not called after a failure."""
