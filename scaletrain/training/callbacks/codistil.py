"""Groups of workers learn from each other's predictions, by copies of weights that are stale."""

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge, Gt
from torch import Tensor, nn
from torch.nn import functional

from scaletrain.errors import UserError
from scaletrain.run.records import StepRecord
from scaletrain.training.callbacks import Callback
from scaletrain.training.checkpoint import plain_name
from scaletrain.training.ddp import AllreduceExchange
from scaletrain.training.workload import IGNORED, Supervised

if TYPE_CHECKING:
    from scaletrain.training.trainer import Trainer

_NAME = "codistillation"  # of the loss's part


class Codistil(Callback):
    """Adds to the loss the cross entropy against what the other groups' models say.

    The chances of the other groups are averaged. They come from copies of their models, which are
    as old as the last exchange: predictions change more slowly than weights, so they may be. Only
    these exchanges cross from group to group, once every some hundred steps.

    Source: Anil et al. 2018 (arXiv 1804.03235), algorithm 1. In the paper workers read each
    other's checkpoints when they are there; here all exchange after the same step, so that a run
    can be repeated.

    Args:
        trainer: whose loss gets the term.
        exchange: with groups.
        every: steps between exchanges.
        weight: of the term.
        burn_in: steps before the first exchange, without the term.
    """

    def __init__(
        self,
        trainer: "Trainer",
        exchange: AllreduceExchange,
        every: int,
        weight: float,
        burn_in: int,
    ):
        self._module = trainer.module
        self._exchange = exchange
        self._every = every
        self._weight = weight
        self._burn_in = burn_in
        self._ignored = trainer.config.loss.options.get("ignore_index", IGNORED)
        self._group_size = exchange.group.world.size
        own = trainer.world.group_number(exchange.groups)
        # By group, of all others: their models as of the last exchange.
        self._teachers: dict[int, nn.Module] = {}
        for group in range(exchange.groups):
            if group != own:
                teacher = copy.deepcopy(trainer.module)
                self._teachers[group] = teacher.requires_grad_(False).eval()
        self._has_exchanged = False
        assert isinstance(trainer.workload, Supervised)
        trainer.workload.terms[_NAME] = self._term

    def after_step(self, record: StepRecord) -> None:
        """Exchange the models of all groups, if it is time to (collective over all groups)."""
        since = record.step + 1 - self._burn_in
        if since < 0 or since % self._every:
            return
        for group in range(self._exchange.groups):
            # Of the group itself, these are the weights that its first rank sends.
            model = self._teachers.get(group, self._module)
            tensors = [each.detach() for each in (*model.parameters(), *model.buffers())]
            if model is self._module:  # buffers of the ranks of a group may differ
                tensors = [each.clone() for each in tensors]
            self._exchange.broadcast(tensors, group * self._group_size)
        self._has_exchanged = True

    def state_dict(self) -> Mapping[str, Any]:
        """Return the copies of the other groups' models, if there are any yet."""
        teachers: dict[str, dict[str, Any]] = {}
        if self._has_exchanged:
            for group, teacher in self._teachers.items():
                weights = teacher.state_dict()
                teachers[str(group)] = {plain_name(name): each for name, each in weights.items()}
        return {"teachers": teachers}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a checkpoint's copies.

        Raises:
            UserError: they are of other groups.
        """
        teachers = state["teachers"]
        self._has_exchanged = bool(teachers)
        if not teachers:
            return
        if teachers.keys() != {str(group) for group in self._teachers}:
            raise UserError(
                f"callbacks: codistil: the checkpoint is of {1 + len(teachers)} groups, not of"
                f" {self._exchange.groups} (allowed: exchange.groups: {1 + len(teachers)})"
            )
        for group, teacher in self._teachers.items():
            weights = teachers[str(group)]
            names = teacher.state_dict()
            teacher.load_state_dict({name: weights[plain_name(name)] for name in names})

    def _term(self, inputs: Any, output: Tensor, targets: Tensor) -> Tensor:
        """Return the weighted sum of the cross entropies against the others' mean chances."""
        if not self._has_exchanged:
            return output.new_zeros(())
        with torch.no_grad():
            chances = [teacher(inputs).float().softmax(1) for teacher in self._teachers.values()]
            mean = torch.stack(chances).mean(0)
        losses = functional.cross_entropy(output, mean, reduction="none")
        if not targets.is_floating_point():
            losses = losses * (targets != self._ignored)
        return self._weight * losses.sum()


def callback(
    trainer: "Trainer",
    *,
    every: Annotated[int, Ge(1)] = 100,
    weight: Annotated[float, Gt(0)] = 1.0,
    burn_in: Annotated[int, Ge(1)] = 100,
) -> Callback:
    """Return the callback.

    Args:
        every: steps between exchanges of weights.
        weight: of the term that compares with the other groups.
        burn_in: steps before the first exchange; until then the models train alone.

    Raises:
        UserError: there is one group, or the loss does not compare chances of classes.
    """
    exchange = trainer.exchange
    if not isinstance(exchange, AllreduceExchange) or exchange.groups == 1:
        raise UserError(
            "callbacks: codistil: there is one group of workers, which has nobody to learn from"
            " (allowed: an exchange with groups, such as --set exchange.groups=2)"
        )
    loss = trainer.config.loss.name
    if loss != "cross_entropy":
        raise UserError(
            f"callbacks: codistil: compares chances of classes, and the loss is {loss} (allowed:"
            " loss: cross_entropy)"
        )
    return Codistil(trainer, exchange, every, weight, burn_in)
