"""Joining the job's store, and finding out which ranks share a host."""

import os
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist

from scaletrain.engine.meeting import owners_of_missing, wait_for_keys
from scaletrain.engine.rendezvous import publish
from scaletrain.engine.rendezvous.sealed import sealed
from scaletrain.engine.rendezvous.serve import STORE_FD, serve, serve_at
from scaletrain.engine.transport import Group
from scaletrain.errors import UserError
from scaletrain.host import addresses
from scaletrain.host.names import host_name
from scaletrain.run import progress
from scaletrain.world import UNKNOWN, World

# Launchers under which somebody serves the store, and MASTER_ADDR and MASTER_PORT say where.
_WITH_STORE = ("local", "rehearsal", "torchrun", "environment")
_ALL_ARRIVED = "scaletrain/all arrived"
_MOST_SHOWN = 16  # ranks in an error message


def join(world: World, run_dir: Path, timeout: timedelta, *, is_private: bool = True) -> dist.Store:
    """Return the job's store, when every rank has joined it. Collective.

    The store starts empty; each restart under torchrun gets a part of its own. This also makes gloo
    use the interface over which this rank reaches rank 0 (GLOO_SOCKET_IFNAME of this process,
    unless it is set): host names may resolve to addresses that others cannot reach.

    Args:
        world: this worker's place.
        run_dir: the run directory, on several hosts a shared one.
        timeout: the time in which all ranks must come.
        is_private: take only values that the job's key in ``run_dir`` has sealed. False: torch's
            plain store, for processes that share no directory.

    Raises:
        TimeoutError: not all ranks arrived; names those that did not.
        ConnectionError: rank 0 is gone, or has given up.
        UserError: a variable is missing or wrong, several networks to choose from, or an interface
            that does not exist.
    """
    store = connect(world, run_dir, timeout, is_private=is_private)
    _wait_for_all(world, store, timeout)
    return store


@progress.waiting("the other workers")
def connect(
    world: World, run_dir: Path, timeout: timedelta, *, is_private: bool = True
) -> dist.Store:
    """Return the job's store, without waiting for the other ranks. Each of them calls this.

    Args, Raises: as ``join``.
    """
    # First: rank 0 connects below to the store that it serves itself.
    if STORE_FD in os.environ:
        serve()
    address = os.environ.get("MASTER_ADDR", "")
    port = os.environ.get("MASTER_PORT", "")
    if address and port and world.launcher in _WITH_STORE:
        if not port.isdigit():
            raise UserError(f"MASTER_PORT={port!r}: expected a port number")
        store = _connect_to(address, int(port), world, timeout)
        # One key may serve several jobs of torchrun in one directory: their values differ in this.
        scope = os.environ.get("TORCHELASTIC_RUN_ID", "")
        return sealed(store, run_dir, scope) if is_private else store
    if world.size == 1:
        return dist.HashStore()
    if world.launcher == "environment":
        raise UserError(
            "RANK and WORLD_SIZE are set, MASTER_ADDR and MASTER_PORT are not:"
            " set where rank 0 is to be met"
        )
    if world.rank == 0:
        return publish.publish(run_dir, world, timeout)
    return publish.find(run_dir, world, timeout)


def _connect_to(address: str, port: int, world: World, timeout: timedelta) -> dist.Store:
    """Connect to the store at MASTER_ADDR and MASTER_PORT.

    Rank 0 serves it there, unless the launcher or an agent does.
    """
    limit = progress.library_limit(timeout)
    served_by_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    # Not waiting for workers here: ``_wait_for_all`` does, and names those that are missing.
    if world.rank == 0 and not served_by_agent:
        store = serve_at(address, port, limit)
    else:
        store = dist.TCPStore(address, port, None, timeout=limit, wait_for_workers=False)
    publish.use_interface_of(addresses.source_address(address, port))
    # Under an agent's store, keys of a failed attempt outlive it. They must not be taken for new.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"scaletrain/{attempt}", store)


@progress.waiting("the other workers")
def _wait_for_all(world: World, store: dist.Store, timeout: timedelta) -> None:
    """Wait for every rank. Collective.

    torch would say "wait timeout after 60000 ms". This names the ranks that are missing.
    """
    progress.alive("joining")
    try:
        _meet(Group(store, world.rank, world.size, timeout))
    except ConnectionError as error:
        raise ConnectionError("rank 0, which serves the store, is gone") from error
    progress.alive("joined")


def _meet(group: Group) -> None:
    group.store.set(f"scaletrain/arrived/{group.rank}", host_name())
    keys = [f"scaletrain/arrived/{rank}" for rank in range(group.size)]
    try:
        # Rank 0 looks for all, and the others for its word: N ranks would ask for N keys each.
        if group.rank == 0:
            wait_for_keys(group, keys, range(group.size))
            group.store.set(_ALL_ARRIVED, "")
        else:
            wait_for_keys(group, [_ALL_ARRIVED], [0])
    except TimeoutError as error:
        missing = owners_of_missing(group.store, keys, range(group.size))
        names = ", ".join(map(str, missing[:_MOST_SHOWN]))
        if len(missing) > _MOST_SHOWN:
            names += ", ..."
        raise TimeoutError(
            f"after {group.timeout.total_seconds():.0f} s ranks {names} have not joined"
        ) from error


@progress.waiting("the other workers")
def place(world: World, store: dist.Store) -> World:
    """Return the world with the fields that follow from which ranks share a host. Collective.

    They are ``local_rank``, ``local_size``, ``node`` and ``num_nodes``. Facts from the launcher
    stay. Nodes are numbered in the order of their lowest rank.
    """
    # The launcher tells all ranks alike: either all of them exchange their hosts, or none does.
    if UNKNOWN not in world:
        return world
    store.set(f"scaletrain/host/{world.rank}", _host())
    hosts = [store.get(f"scaletrain/host/{rank}").decode() for rank in range(world.size)]
    my_host = hosts[world.rank]
    neighbours = [rank for rank, host in enumerate(hosts) if host == my_host]
    nodes = list(dict.fromkeys(hosts))
    return world._replace(
        local_rank=_known(world.local_rank, neighbours.index(world.rank)),
        local_size=_known(world.local_size, len(neighbours)),
        node=_known(world.node, nodes.index(my_host)),
        num_nodes=_known(world.num_nodes, len(nodes)),
    )


def _known(from_launcher: int, from_ranks: int) -> int:
    return from_ranks if from_launcher == UNKNOWN else from_launcher


def _host() -> str:
    """Return a text that ranks on the same host have in common.

    It is the host's name and the network namespace: an emulated host is a namespace.
    """
    return f"{host_name()}/{os.stat('/proc/self/ns/net').st_ino}"
