"""Servers own weights and optimizer: sync, backup workers, async, bounded staleness, local SGD."""

from typing import Annotated, Literal

from annotated_types import Ge, Gt, Lt

from scaletrain.parameter_server.protocol import placement as where
from scaletrain.parameter_server.protocol import settings
from scaletrain.parameter_server.worker.exchange import ParameterServerExchange
from scaletrain.training.exchange import Exchange, Setup
from scaletrain.world import World


def exchange(
    world: World,
    setup: Setup,
    *,
    mode: Literal["sync", "async", "bounded", "local_sgd", "post_local"] = "sync",
    servers: Annotated[int, Ge(1)] = 1,
    placement: Literal["auto", "dedicated", "beside"] = "auto",
    backup_workers: Annotated[int, Ge(0)] = 0,
    staleness: Annotated[int, Ge(0)] = 3,
    divide_lr: bool = True,
    min_workers: Annotated[int, Ge(1)] | None = None,
    local_steps: Annotated[int, Ge(1)] = 16,
    local_after: Annotated[int, Ge(0)] = 0,
    outer: Literal["average", "nesterov"] = "average",
    outer_lr: Annotated[float, Gt(0)] = 0.7,
    outer_momentum: Annotated[float, Ge(0), Lt(1)] = 0.5,
    server_lr: dict | None = None,
    wire: Literal["float32", "bf16", "fp16", "trunc16"] = "float32",
    link: Literal["auto", "unix", "tcp"] = "auto",
    security: Literal["auto", "curve", "trusted_network"] = "auto",
    connections: Annotated[int, Ge(0)] = 0,
    block_mb: Annotated[float, Ge(0)] = 0.0,
    snapshot_updates: Annotated[int, Ge(1)] | None = None,
    snapshot_s: Annotated[float, Gt(0)] | None = None,
    restart_servers: Annotated[int, Ge(0)] = 0,
) -> Exchange:
    options = {key: value for key, value in locals().items() if key not in ("world", "setup")}
    hosts = where.hosts(world.launcher, world.num_nodes)
    made = settings.settings(options, world.size, setup.timeout.total_seconds(), hosts)
    return ParameterServerExchange(made, world, setup.run_dir, setup.store)
