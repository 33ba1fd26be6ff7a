"""Our collective engine under DDP: the algorithm (tree, ring, star, ...) and the wire are chosen, or `auto`."""

from typing import Annotated, Any

import torch.distributed as dist
from annotated_types import Gt

from scaletrain.engine.process_group import Options
from scaletrain.training.ddp import AllreduceExchange
from scaletrain.training.exchange import Exchange, Setup
from scaletrain.world import World


class ScheduledExchange(AllreduceExchange):
    """DDP over the backend ``scaletrain``."""

    def chosen(self) -> dict[str, Any]:
        return dist.group.WORLD.record()  # type: ignore[union-attr]


def exchange(
    world: World,
    setup: Setup,
    *,
    collective: str = "auto",
    transport: str = "auto",
    bucket_mb: Annotated[float, Gt(0)] = 25.0,
) -> Exchange:
    options = Options(collective=collective, transport=transport)
    return ScheduledExchange(world, setup, backend="scaletrain", bucket_mb=bucket_mb, options=options)
