"""An exchange in a person's own training loop: ``model, exchange = scaletrain.attach(model, optimizer, exchange="ring")``."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scaletrain import config, plugins
from scaletrain.engine import rendezvous
from scaletrain.training.exchange import Exchange, Setup
from scaletrain.world import World


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    exchange: str = "native",
    *,
    timeout_s: float = 60.0,
    run_dir: str | Path | None = None,
    **options: Any,
) -> tuple[nn.Module, Exchange]:
    """Join the other workers and put an exchange under ``model``. Every rank calls it (collectively), under any launcher.

    Args:
        model: on this worker's device, the same on every rank.
        optimizer: over the model's parameters. ``exchange.step(lr)`` runs it (or the parameter server does).
        exchange: as on the command line: ``native``, ``ring``, ``scheduled:tree@gloo``, ...
        run_dir: where rank 0 publishes its address when the launcher serves no store (mpirun, srun by hand): a folder that all hosts share.
        options: further options of the exchange.

    Returns:
        The module to call in forward, and the exchange: after ``backward`` call ``exchange.step(lr)``, at the end ``exchange.close()``.

    Raises:
        UserError: no such exchange or option; conflicting rank variables.
        TimeoutError: not all ranks arrived; names those missing.
    """
    tree = config.expand_exchange(exchange) | options
    name = tree.pop("name")
    checked = config.plugin_options("exchange", name, tree, "attach")
    timeout, world = timedelta(seconds=timeout_s), World.from_env()
    shared = Path(run_dir or os.environ.get("SCALETRAIN_RUN_DIR") or Path.cwd())
    store = rendezvous.join(world, shared, timeout)
    world = rendezvous.place(world, store)
    device = next(model.parameters()).device
    joined: Exchange = plugins.load("exchange", name)(
        world, Setup(store, device, timeout, shared), **checked
    )
    return joined.attach(model, optimizer), joined
