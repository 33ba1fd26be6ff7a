"""Several optimizers as one, for schedules and checkpoints."""

from collections.abc import Callable, Mapping
from typing import Any

import torch


class JointOptimizer(torch.optim.Optimizer):
    """The optimizers of models that train together, such as the two of a GAN.

    It has their groups and their state, in order, and takes no step: each of them steps by itself.

    Args:
        optimizers: by the names of their models.
    """

    def __init__(self, optimizers: Mapping[str, torch.optim.Optimizer]):
        self._optimizers = dict(optimizers)
        # Under names of their own, for the facts of a run.
        self.defaults: dict[str, Any] = {}
        for name, optimizer in optimizers.items():
            self.defaults[name] = type(optimizer).__name__
            for key, value in optimizer.defaults.items():
                self.defaults[f"{name}.{key}"] = value

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of all of them. Loading a state makes new ones."""
        return [group for each in self._optimizers.values() for group in each.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return their states as one. Parameters are counted on from one to the next."""
        state: dict[int, Any] = {}
        groups: list[dict[str, Any]] = []
        first = 0
        for optimizer in self._optimizers.values():
            own = optimizer.state_dict()
            for index, entries in own["state"].items():
                state[first + index] = entries
            for group in own["param_groups"]:
                groups.append(group | {"params": [first + index for index in group["params"]]})
            first += _num_parameters(optimizer)
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give each of them its part of a state that ``state_dict`` returned."""
        groups = iter(state_dict["param_groups"])
        first = 0
        for optimizer in self._optimizers.values():
            end = first + _num_parameters(optimizer)
            state = {}
            for index, entries in state_dict["state"].items():
                if first <= index < end:
                    state[index - first] = entries
            own_groups = []
            for _ in optimizer.param_groups:
                group = next(groups)
                own_groups.append(group | {"params": [index - first for index in group["params"]]})
            optimizer.load_state_dict({"state": state, "param_groups": own_groups})
            first = end

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Not for a call: an exchange steps each optimizer after the backward of its model."""
        raise NotImplementedError("each of the optimizers steps by itself")


def _num_parameters(optimizer: torch.optim.Optimizer) -> int:
    return sum(len(group["params"]) for group in optimizer.param_groups)
