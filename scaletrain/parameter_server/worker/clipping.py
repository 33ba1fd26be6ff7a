"""Clipping of the mean gradient of all workers, which only the servers have (mode ``sync``).

A server knows the mean gradient of its blocks, and no process knows all of them. So a step has two
halves. The servers hold the updates back, and tell the workers the norm of each block's mean
gradient. Each worker adds them up and tells all servers the factor, the same one as all others. The
first one counts, so a worker may die at any moment.
"""

import math

import torch

from scaletrain.parameter_server.protocol.consistency import Scaling
from scaletrain.parameter_server.worker.client import Client


class ClippedSteps:
    """Clips the mean gradient of each step: by its norm over all parameters, then each value.

    The result is that of ``clip_grad_norm_`` and ``clip_grad_value_`` of torch on the whole batch.
    It does not depend on how the model is cut.

    Args:
        client: whose gradients are held from now on.
        norm: the largest norm; None: any.
        value: the largest absolute value of an element; None: any.
    """

    def __init__(self, client: Client, norm: float | None, value: float | None):
        self._client = client
        self._norm = norm
        self._limit = math.inf if value is None else value
        client.hold()

    def release(self, step: int) -> None:
        """Let the servers make the updates of a step, once all gradients of it were pushed.

        Raises:
            ServerError: a server is lost, or training cannot go on.
        """
        if self._norm is None:
            scaling = Scaling(step, 1.0, self._limit)
        else:
            scaling = self._find_scaling(step, self._norm)
        self._client.scale(scaling)

    def _find_scaling(self, step: int, largest: float) -> Scaling:
        """Return the scaling that brings the gradient of a step to the largest norm."""
        norms = self._client.norms(step)
        # A worker that lags behind hears of a later step.
        step = max([step, *[block.step for block in norms]])
        total = 0.0
        for block in norms:
            if not block.made:
                total += block.value
            elif not math.isnan(block.value):
                # Others were faster: this block's update is made.
                return Scaling(step, block.value, self._limit)
        # As torch does it, in float32: rounded there, the sum does not depend on its blocks.
        norm = torch.tensor(math.sqrt(total), dtype=torch.float32)
        factor = torch.clamp(largest / (norm + 1e-6), max=1.0)
        return Scaling(step, factor.item(), self._limit)
