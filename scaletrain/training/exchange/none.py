"""No communication: every worker trains alone, for measuring the cost of communication."""

import contextlib

import torch
import torch.distributed as dist
from torch import nn

from scaletrain.training.ddp import AllreduceExchange
from scaletrain.training.exchange import Exchange, Setup
from scaletrain.world import World


class NoExchange(AllreduceExchange):
    """Workers start from the same weights and drift apart. Only evaluation counts are summed.

    Exposed communication is a step with an exchange minus a step with this one.
    """

    averages = False

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Make every rank's weights equal rank 0's."""
        # The model stays without DDP, which would exchange. Its constructor would also have made
        # the weights equal, so that is done here.
        self._optimizers[model] = optimizer
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.data, 0)
        return model

    def accumulate(self, model: nn.Module | None = None) -> contextlib.AbstractContextManager[None]:
        """Return a context that does nothing: backward never exchanges."""
        return contextlib.nullcontext()


def exchange(world: World, setup: Setup) -> Exchange:
    """Return the exchange of a worker that trains alone."""
    # gloo for CUDA tensors, too: it accepts workers that share a GPU, and steps do not use it.
    return NoExchange(world, setup, backend="gloo", bucket_mb=25.0)
