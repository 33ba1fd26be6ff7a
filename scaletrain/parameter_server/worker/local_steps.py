"""Local SGD: workers step by themselves, and synchronise every few steps.

The modes ``local_sgd`` and ``post_local``; ``gradients`` has the others.
"""

import contextlib
from typing import NamedTuple

import torch

from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.worker.client import PushResult
from scaletrain.parameter_server.worker.replica import Replica


class Rounds(NamedTuple):
    """When workers synchronise.

    They do so after every step up to ``single_steps``, then after every ``local_steps`` steps.

    >>> rounds = Rounds(local_steps=4, single_steps=2)
    >>> [rounds.after(steps) for steps in (1, 2, 3, 5, 6, 10)]
    [1, 2, 2, 2, 3, 4]
    >>> rounds.steps_before(3)
    6
    """

    local_steps: int
    single_steps: int

    @classmethod
    def of(cls, settings: Settings) -> "Rounds":
        """Return the rounds of a job in one of the local modes."""
        if settings.mode == "post_local":
            return cls(settings.local_steps, settings.local_after)
        return cls(settings.local_steps, 0)

    def after(self, steps: int) -> int:
        """Return how many rounds the first ``steps`` steps of the job contain."""
        single = min(steps, self.single_steps)
        return single + (steps - single) // self.local_steps

    def steps_before(self, rounds: int) -> int:
        """Return the number of steps after which ``rounds`` rounds are complete."""
        single = min(rounds, self.single_steps)
        return single + (rounds - single) * self.local_steps


class LocalSteps:
    """Steps with the worker's own optimizer, and pushes how far it went at the end of a round.

    The servers' optimizer takes the mean of all workers' ways as its gradient.

    Args:
        settings: of the job.
        replica: connected, with the weights of the servers.
        optimizer: the worker's own. Its rate is the one that its groups hold.
    """

    def __init__(self, settings: Settings, replica: Replica, optimizer: torch.optim.Optimizer):
        self._replica = replica
        self._optimizer = optimizer
        self._rounds = Rounds.of(settings)
        # Averaging is a plain step of rate 1 (``replica._outer_optimizer``).
        self._outer_lr = settings.outer_lr if settings.outer == "nesterov" else 1.0
        self._step = 0  # of the job, done next
        # The weights at the begin of the round, for each parameter.
        self._anchors = [parameter.detach().clone() for parameter in replica.parameters]

    def begin(self, step: int) -> None:
        """Make the job's step ``step`` the next one."""
        self._step = step
        self._replica.begin()

    def accumulate(self) -> contextlib.AbstractContextManager[None]:
        """Let backward passes inside only add to the gradients, as they do anyway."""
        return contextlib.nullcontext()

    def hold(self) -> None:
        """Do nothing: this worker's optimizer takes gradients as they are."""

    def finish(self) -> list[PushResult]:
        """Step, after backward. At the end of a round push, and return the results of all blocks.

        1. Take a step with the worker's optimizer. Without the end of a round this is all.
        2. Push the way from the anchors to the weights, its sign turned like a gradient's.
        3. Take the new weights, which are everybody's, and make them the anchors.
        """
        self._optimizer.step()
        rounds = self._rounds.after(self._step)
        if rounds == self._rounds.after(self._step + 1):
            return []
        replica = self._replica
        with torch.no_grad():
            for index, parameter in enumerate(replica.parameters):
                way = self._anchors[index] - parameter
                replica.push(index, way, rounds, self._outer_lr)
            # All pushes are on their way before the first answer is waited for.
            results = [replica.take(block) for block in reversed(replica.blocks)]
            for anchor, parameter in zip(self._anchors, replica.parameters, strict=True):
                anchor.copy_(parameter)
        return results

    def close(self) -> None:
        """Do nothing: the model and the optimizer have no hooks."""
