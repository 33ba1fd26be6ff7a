"""Our collective engine under DDP: choose algorithm (tree, ring, ...) and wire, or `auto`."""

from typing import Annotated, Any

import torch
import torch.distributed as dist
from annotated_types import Ge, Gt

from scaletrain.engine.backend import calls_of
from scaletrain.engine.choice import Options
from scaletrain.errors import UserError
from scaletrain.training.ddp import AllreduceExchange
from scaletrain.training.exchange import Exchange, Setup
from scaletrain.world import World


class ScheduledExchange(AllreduceExchange):
    """DDP over the backend ``scaletrain``.

    The wires are opened at once: one that is not available here is reported before training begins.
    """

    def __init__(
        self,
        world: World,
        setup: Setup,
        *,
        bucket_mb: float,
        find_unused_parameters: bool,
        groups: int,
        options: Options,
    ):
        super().__init__(
            world,
            setup,
            backend="scaletrain",
            bucket_mb=bucket_mb,
            find_unused_parameters=find_unused_parameters,
            groups=groups,
            options=options,
        )
        try:
            # The backend opens its wires with the first collective, so there is a small one now.
            dist.all_reduce(torch.zeros(1, device=setup.device))
            dist.all_reduce(torch.zeros(1, device=setup.device), group=self.process_group)
        except RuntimeError as error:  # torch wraps what a backend raises
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise

    def chosen(self) -> dict[str, Any]:
        """Return the algorithm and the wire of each size of message."""
        calls = calls_of(self.process_group)
        assert calls is not None
        return calls.record()


def exchange(
    world: World,
    setup: Setup,
    *,
    collective: str = "auto",
    transport: str = "auto",
    bucket_mb: Annotated[float, Gt(0)] = 25.0,
    find_unused_parameters: bool = False,
    groups: Annotated[int, Ge(1)] = 1,
) -> Exchange:
    """Return DDP over our engine.

    Args:
        collective: the allreduce algorithm, with its options: ``pipelined_tree:segments=8``.
        transport: the wire, with its options.
        bucket_mb: size of a gradient bucket in MiB.
        find_unused_parameters: for models of which some parameters get no gradient in some steps.
        groups: of consecutive ranks, each with a model of its own; see the callback codistil.
    """
    options = Options(collective=collective, transport=transport)
    return ScheduledExchange(
        world,
        setup,
        bucket_mb=bucket_mb,
        find_unused_parameters=find_unused_parameters,
        groups=groups,
        options=options,
    )
