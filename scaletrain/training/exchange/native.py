"""torch.distributed's own allreduce under DDP: NCCL between GPUs, gloo between CPUs."""

from typing import Annotated

import torch.distributed as dist
from annotated_types import Ge, Gt

from scaletrain.engine.accelerator import shared
from scaletrain.engine.transport import Group
from scaletrain.errors import UserError
from scaletrain.training.ddp import AllreduceExchange
from scaletrain.training.exchange import Exchange, Setup
from scaletrain.world import World


def exchange(
    world: World,
    setup: Setup,
    *,
    bucket_mb: Annotated[float, Gt(0)] = 25.0,
    find_unused_parameters: bool = False,
    groups: Annotated[int, Ge(1)] = 1,
) -> Exchange:
    """Return DDP over torch's own backend.

    Args:
        bucket_mb: size of a gradient bucket in MiB.
        find_unused_parameters: for models of which some parameters get no gradient in some steps.
        groups: of consecutive ranks, each with a model of its own; see the callback codistil.

    Raises:
        UserError: workers share a GPU.
    """
    backend = "nccl" if setup.device.type == "cuda" else "gloo"
    if backend == "nccl":
        # A prefix of its own keeps these keys apart from the process group's.
        store = dist.PrefixStore("native/", setup.store)
        if shared(Group(store, world.rank, world.size, setup.timeouts.first_collective)):
            raise UserError(
                "exchange: 'native' is NCCL on GPUs, which refuses workers that share one; use"
                " exchange: scheduled, which goes through shared memory then, or one worker a GPU"
            )
    return AllreduceExchange(
        world,
        setup,
        backend=backend,
        bucket_mb=bucket_mb,
        find_unused_parameters=find_unused_parameters,
        groups=groups,
    )
