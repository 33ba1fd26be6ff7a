"""torch.distributed's own allreduce under DDP: NCCL between GPUs, gloo between CPUs."""

from typing import Annotated

from annotated_types import Gt

from scaletrain.training.ddp import AllreduceExchange
from scaletrain.training.exchange import Exchange, Setup
from scaletrain.world import World


def exchange(world: World, setup: Setup, *, bucket_mb: Annotated[float, Gt(0)] = 25.0) -> Exchange:
    backend = "nccl" if setup.device.type == "cuda" else "gloo"
    return AllreduceExchange(world, setup, backend=backend, bucket_mb=bucket_mb)
