"""Prunes weights: the smallest of each layer become zero, and stay it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from scaletrain.needs import Needs
from scaletrain.run.records import StepRecord
from scaletrain.training.callbacks import Callback
from scaletrain.training.layer_weights import by_layer, layer_weights

if TYPE_CHECKING:
    from scaletrain.training.trainer import Trainer

NEEDS = Needs(own_weights=True)


class Prune(Callback):
    """Keeps the largest weights of each layer (Han et al. 2015, arXiv 1506.02626).

    The share that is kept falls from 1 to its end along a cubic (Zhu and Gupta 2017, arXiv
    1710.01878, equation 1): fast while many weights are useless, slowly at the end. All ranks have
    the same weights, so they choose the same ones, and none communicates.

    Args:
        trainer: whose model's weights are pruned: parameters of two or more dimensions.
        keep: share of each layer's weights that stays.
        layers: likewise, by patterns of names.
        begin: step after which pruning begins.
        end: step after which no more weights are pruned.
        every: steps between two choices.
    """

    changes_gradients = True

    def __init__(
        self,
        trainer: "Trainer",
        keep: float,
        layers: Mapping[str, float],
        begin: int,
        end: int,
        every: int,
    ):
        self._weights = layer_weights(trainer.module)
        self._keep = by_layer(self._weights, keep, layers, "callbacks: prune.layers")
        self._begin, self._end, self._every = begin, max(begin, end), every
        self._masks: dict[str, Tensor] = {}  # of bools: which weights stay
        if begin == 0 and trainer.next_step == 0:
            self._choose(0)

    def after_backward(self) -> None:
        """Let no gradient reach a pruned weight, and with it no momentum."""
        for name, mask in self._masks.items():
            gradient = self._weights[name].grad
            if gradient is not None:
                gradient.mul_(mask)

    def after_step(self, record: StepRecord) -> None:
        """Choose anew, when it is time, and keep pruned weights at zero."""
        done = record.step + 1
        is_due = (done - self._begin) % self._every == 0 or done == self._end
        if self._begin <= done <= self._end and is_due:
            self._choose(done)
        with torch.no_grad():
            for name, mask in self._masks.items():
                self._weights[name].mul_(mask)

    def state_dict(self) -> Mapping[str, Any]:
        """Return the masks."""
        return {"masks": self._masks}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a checkpoint's masks."""
        for name, mask in state["masks"].items():
            self._masks[name] = mask.to(self._weights[name].device)

    @torch.no_grad()
    def _choose(self, done: int) -> None:
        """Choose the weights that stay after so many steps, and make the others zero."""
        span = self._end - self._begin
        left = 1 - (done - self._begin) / span if span else 0.0
        for name, weight in self._weights.items():
            share = self._keep[name] + (1 - self._keep[name]) * left**3
            num_pruned = weight.numel() - max(1, round(share * weight.numel()))
            sizes = weight.abs().flatten()
            if name in self._masks:
                # Pruned ones come first, whatever a step did to them.
                sizes = torch.where(self._masks[name].flatten(), sizes, -1.0)
            pruned = sizes.argsort(stable=True)[:num_pruned]
            mask = torch.ones_like(sizes, dtype=torch.bool)
            mask[pruned] = False
            self._masks[name] = mask.view_as(weight)
            weight.mul_(self._masks[name])


def callback(
    trainer: "Trainer",
    *,
    keep: Annotated[float, Gt(0), Le(1)] = 0.1,
    layers: dict[str, Annotated[float, Gt(0), Le(1)]] = {},  # noqa: B006 (never changed)
    begin: Annotated[int, Ge(0)] = 0,
    end: Annotated[int, Ge(0)] = 0,
    every: Annotated[int, Ge(1)] = 10,
) -> Callback:
    """Return the callback.

    Args:
        keep: share of each layer's weights that stays.
        layers: likewise, by patterns of names, such as {conv1: 0.8}.
        begin: steps before the first weights are pruned.
        end: steps after which no more are; up to then their number grows.
        every: steps between two choices.
    """
    return Prune(trainer, keep, layers, begin, end, every)
