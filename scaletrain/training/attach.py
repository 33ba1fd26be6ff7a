"""An exchange in a person's own training loop.

>>> model, exchange = scaletrain.attach(model, optimizer, exchange="ring")  # doctest: +SKIP
"""

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scaletrain import config, plugins
from scaletrain.engine import rendezvous
from scaletrain.timeouts import Timeouts
from scaletrain.training.exchange import Exchange, Setup
from scaletrain.world import World


def join(
    exchange: str = "native",
    *,
    device: torch.device | str = "cpu",
    timeout_s: float = 60.0,
    run_dir: str | Path | None = None,
    **options: Any,
) -> Exchange:
    """Join the other workers, without a model yet (collective, under any launcher).

    The exchange's ``attach`` then takes models: one, or several that have an optimizer each.

    Args:
        exchange: as on the command line: ``native``, ``ring``, ``scheduled:tree@gloo``, ...
        device: this worker's, where its models will be.
        timeout_s: how long a rank may be silent between two steps, in seconds. Collectives and the
            start get more time (``timeouts``).
        run_dir: a directory that all hosts share. The job's key lies there (``run.job_key``), and
            rank 0 publishes its address there if the launcher serves no store (mpirun or srun by
            hand).
        options: further options of the exchange.

    Raises:
        UserError: there is no such exchange or option, or the rank variables contradict each other.
        TimeoutError: not all ranks arrived; it names those missing.

    Example:
        .. code-block:: python

            exchange = scaletrain.join("ring")
            critic = exchange.attach(critic, critic_optimizer)
            artist = exchange.attach(artist, artist_optimizer)
            ...
            exchange.step(critic)  # after the backward of its loss
    """
    chosen = config.expand_exchange(exchange) | options
    name = chosen.pop("name")
    # Before anything meets other ranks: a wrong option is an error here, not a hang elsewhere.
    checked = config.plugin_options("exchange", name, chosen, "attach")
    timeouts = Timeouts(timeout_s)
    world = World.from_env()
    named = run_dir or os.environ.get("SCALETRAIN_RUN_DIR")
    shared = Path(named or Path.cwd())
    # Ranks whose directories differ share no key: the current ones, or those of several hosts that
    # nobody has named. A parameter server needs a shared one in any case.
    on_one_host = bool(named) and world.num_nodes == 1
    is_private = bool(run_dir) or on_one_host or name == "parameter_server"
    store = rendezvous.join(world, shared, timeouts.join, is_private=is_private)
    world = rendezvous.place(world, store)
    setup = Setup(store, torch.device(device), timeouts, shared)
    joined: Exchange = plugins.load("exchange", name)(world, setup, **checked)
    return joined


def attach(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    exchange: str = "native",
    **options: Any,
) -> tuple[nn.Module, Exchange]:
    """Join the other workers, and put an exchange under a model (collective, under any launcher).

    Args:
        model: on this worker's device, the same on every rank.
        optimizer: over the model's parameters. ``exchange.step()`` runs it, or the parameter server
            does its work with the learning rate that the optimizer's groups hold.
        exchange: as on the command line: ``native``, ``ring``, ``scheduled:tree@gloo``, ...
        options: as for ``join``: ``timeout_s``, ``run_dir``, and options of the exchange.

    Returns:
        The module to call in forward, and the exchange.

    Raises:
        UserError: there is no such exchange or option, or the rank variables contradict each other.
        TimeoutError: not all ranks arrived; it names those missing.

    Example:
        .. code-block:: python

            model, exchange = scaletrain.attach(model, optimizer, exchange="ring")
            for inputs, targets in batches:  # this rank's share
                model.zero_grad()
                loss(model(inputs), targets).backward()
                exchange.step()
            exchange.close()
    """
    joined = join(exchange, device=next(model.parameters()).device, **options)
    return joined.attach(model, optimizer), joined
