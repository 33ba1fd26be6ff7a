"""Servers own weights and optimizer: sync, backup workers, async, bounded staleness, local SGD."""

from typing import Any

from scaletrain.parameter_server.protocol import placement
from scaletrain.parameter_server.protocol.settings import (
    ParameterServerOptions,
    settings_from_options,
)
from scaletrain.parameter_server.worker.exchange import ParameterServerExchange
from scaletrain.training.exchange import Exchange, Setup
from scaletrain.world import World

# The options that people set, each with its meaning. ``plugins.options`` reads them from this line.
OPTIONS = ParameterServerOptions


def exchange(world: World, setup: Setup, **options: Any) -> Exchange:
    """Return this worker's end of the exchange, not attached yet.

    Args:
        world: this worker's place.
        setup: the job's store, device, timeout and run directory.
        options: the fields of ``OPTIONS``.

    Raises:
        UserError: options that contradict each other.
    """
    hosts = placement.hosts(world.launcher, world.num_nodes)
    timeout_s = setup.timeouts.step_s
    settings = settings_from_options(options, world.size, timeout_s, hosts)
    return ParameterServerExchange(settings, world, setup.run_dir, setup.store)
