"""Keeps an exponential moving average of the weights; evaluations use it."""

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Lt
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from scaletrain.run.records import StepRecord
from scaletrain.training import statistics
from scaletrain.training.callbacks import Callback
from scaletrain.training.checkpoint import plain_name

if TYPE_CHECKING:
    from scaletrain.training.trainer import Trainer


class Ema(Callback):
    """Averages parameters and buffers after each step, on each rank for itself.

    Replicas are equal, so their averages are. Averages of running statistics differ, and become
    the mean of all ranks before an evaluation or a checkpoint.
    """

    def __init__(self, trainer: "Trainer", decay: float, every: int):
        self._module = trainer.module
        self._ranks = trainer.exchange.group
        self._every = every
        self._averaged = AveragedModel(
            trainer.module, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True
        )
        self._averaged.eval()

    def after_step(self, record: StepRecord) -> None:
        """Move the averages towards the new weights."""
        if not record.skipped and (record.step + 1) % self._every == 0:
            self._averaged.update_parameters(self._module)

    def meet(self) -> None:
        """Average the running statistics over the ranks."""
        statistics.average(self._averaged.module, self._ranks)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Put the averages in the place of the weights, and put these back, bit by bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # The tensors stay where they are: exchanges and optimizers hold on to them.
        for tensor, average in zip(
            _tensors(self._module), _tensors(self._averaged.module), strict=True
        ):
            weights = tensor.clone()
            tensor.copy_(average)
            average.copy_(weights)

    def state_dict(self) -> Mapping[str, Any]:
        """Return the averages, by the names of the plain model, and how many updates they had."""
        weights = self._averaged.module.state_dict()
        return {
            "updates": self._averaged.n_averaged,
            "weights": {plain_name(name): value for name, value in weights.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint's averages."""
        module = self._averaged.module
        weights = {name: state["weights"][plain_name(name)] for name in module.state_dict()}
        module.load_state_dict(weights)
        self._averaged.n_averaged.copy_(state["updates"])


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """Return parameters and buffers, tied ones once."""
    return itertools.chain(module.parameters(), module.buffers())


def callback(
    trainer: "Trainer",
    *,
    decay: Annotated[float, Ge(0), Lt(1)] = 0.999,
    every: Annotated[int, Ge(1)] = 1,
) -> Callback:
    """Return the callback.

    Args:
        decay: the share of the average that an update keeps.
        every: steps between updates.
    """
    return Ema(trainer, decay, every)
