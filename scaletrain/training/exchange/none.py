"""No communication: every worker trains alone. A step with an exchange minus a step with none is exposed communication."""

import contextlib

import torch
import torch.distributed as dist
from torch import nn

from scaletrain.training.ddp import AllreduceExchange
from scaletrain.training.exchange import Exchange, Setup
from scaletrain.world import World


class NoExchange(AllreduceExchange):
    """Workers start from the same weights and drift apart; only evaluation counts are summed."""

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        self._optimizer = optimizer
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor.data, 0)
        return model

    def accumulate(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


def exchange(world: World, setup: Setup) -> Exchange:
    # gloo for CUDA tensors, too: it takes workers that share a GPU, and steps do not use it.
    return NoExchange(world, setup, backend="gloo", bucket_mb=25.0)
