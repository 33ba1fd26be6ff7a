"""Our collective engine under DDP: the algorithm (tree, ring, star, ...) and the wire are chosen, or `auto`."""

from typing import Annotated

from annotated_types import Gt

from scaletrain.training.ddp import AllreduceExchange
from scaletrain.training.exchange import Exchange, Setup
from scaletrain.world import World


def exchange(
    world: World,
    setup: Setup,
    *,
    collective: str = "auto",
    transport: str = "auto",
    bucket_mb: Annotated[float, Gt(0)] = 25.0,
) -> Exchange:
    from scaletrain.engine.process_group import Options

    options = Options(collective=collective, transport=transport)
    return AllreduceExchange(world, setup, backend="scaletrain", bucket_mb=bucket_mb, options=options)
