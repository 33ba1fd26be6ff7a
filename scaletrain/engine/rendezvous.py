"""Where the workers of a job meet: one key-value store, joined from the launcher's own facts. No port is ever guessed.

- Our launchers bind a socket and hand it to who serves the store (``SCALETRAIN_STORE_FD``); all learn MASTER_ADDR and MASTER_PORT.
- Under torchrun the agent serves a store; its address is in MASTER_ADDR and MASTER_PORT.
- Under mpirun, srun and horovodrun nobody serves one: rank 0 binds a free port and publishes all of its addresses in RUN_DIR.
  The others try them and take the one where rank 0 proves to be there.
"""

import json
import os
import secrets
import socket
import time
from datetime import timedelta
from pathlib import Path

import psutil
import torch.distributed as dist

from scaletrain.errors import UserError
from scaletrain.run import progress
from scaletrain.run.atomic import write_json
from scaletrain.world import UNKNOWN, World

STORE_FD = "SCALETRAIN_STORE_FD"
_NONCE, _ADDRESS = "scaletrain/nonce", "scaletrain/address"
_PREFIX = "job"
_served: dist.TCPStore | None = (
    None  # lives as long as the process: other ranks may need it after this one is done with it
)


def join(world: World, run_dir: Path, timeout: timedelta) -> dist.Store:
    """The job's store, joined by every rank (collective: returns when all are there).

    The store starts empty; each restart under torchrun gets a part of its own. Also makes gloo use the interface over which this
    rank reaches rank 0 (GLOO_SOCKET_IFNAME of this process, unless set): host names may resolve to what others cannot reach.

    Raises:
        TimeoutError: not all ranks arrived; names those that did not.
        UserError: several addresses to choose from, or an interface that is not there.
    """
    store = connect(world, run_dir, timeout)
    _arrive(world, store, timeout)
    return store


@progress.waiting("the other workers")
def connect(world: World, run_dir: Path, timeout: timedelta) -> dist.Store:
    """The job's store, without waiting for the other ranks: each of them calls this."""
    if STORE_FD in os.environ:
        serve()
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if address and port and world.launcher in ("local", "rehearsal", "torchrun", "environment"):
        if not port.isdigit():
            raise UserError(f"MASTER_PORT={port!r}: expected a port number")
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store: dist.Store = dist.TCPStore(
            address,
            int(port),
            None,
            is_master=world.rank == 0 and not agent,
            timeout=timeout,
            wait_for_workers=False,
        )
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        _use_interface(_local_address(address, int(port)))
        return dist.PrefixStore(f"scaletrain/{attempt}", store)
    if world.size == 1:
        return dist.HashStore()
    if world.launcher == "environment":
        raise UserError(
            "RANK and WORLD_SIZE are set, MASTER_ADDR and MASTER_PORT are not: set where rank 0 is to be met"
        )
    return _publish(run_dir, world, timeout) if world.rank == 0 else _find(run_dir, world, timeout)


@progress.waiting("the other workers")
def place(world: World, store: dist.Store) -> World:
    """The world with ``local_rank``, ``local_size``, ``node`` and ``num_nodes`` filled in, from which ranks share a host (collective).

    What the launcher said stays. Nodes are numbered in the order of their lowest rank.
    """
    if UNKNOWN not in world:
        return world
    store.set(f"scaletrain/host/{world.rank}", _host())
    hosts = [store.get(f"scaletrain/host/{rank}").decode() for rank in range(world.size)]
    nodes = list(dict.fromkeys(hosts))
    here = [rank for rank, host in enumerate(hosts) if host == hosts[world.rank]]
    found = {
        "local_rank": here.index(world.rank),
        "local_size": len(here),
        "node": nodes.index(hosts[world.rank]),
        "num_nodes": len(nodes),
    }
    return world._replace(
        **{key: value for key, value in found.items() if getattr(world, key) == UNKNOWN}
    )


def serve() -> int:
    """Serve the store on the socket that the launcher handed over; returns its port. Once a process."""
    global _served
    fd = int(os.environ.pop(STORE_FD))
    listening = socket.socket(fileno=fd)
    port = listening.getsockname()[1]
    os.set_inheritable(listening.detach(), False)  # libuv's server takes the descriptor over
    _served = dist.TCPStore(
        "127.0.0.1",
        port,
        None,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=fd,
        multi_tenant=False,
    )
    return port


def _host() -> str:
    """What ranks on the same host have in common: the name, and the network namespace (a rehearsed host is one)."""
    return f"{progress.host_name()}/{os.stat('/proc/self/ns/net').st_ino}"


@progress.waiting("the other workers")
def _arrive(world: World, store: dist.Store, timeout: timedelta) -> None:
    """Wait for every rank; on time-out say which are missing, instead of "wait timeout after 60000 ms"."""
    progress.alive("joining")
    store.set(f"scaletrain/arrived/{world.rank}", progress.host_name())
    keys = [f"scaletrain/arrived/{rank}" for rank in range(world.size)]
    try:
        store.wait(keys, timeout)
    except (RuntimeError, TimeoutError) as error:
        try:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        except RuntimeError:
            raise ConnectionError("rank 0, which serves the store, is gone") from error
        shown = ", ".join(map(str, missing[:16])) + (", ..." if len(missing) > 16 else "")
        raise TimeoutError(
            f"after {timeout.total_seconds():.0f} s ranks {shown} have not joined"
        ) from error
    progress.alive("joined")


# Publishing, for launchers that have no store


def _job_id(world: World) -> str:
    """What tells this job's file from an earlier job's in the same RUN_DIR; empty when the launcher names no job."""
    names = {
        "slurm": ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
        "openmpi": ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
    }.get(world.launcher, ())
    return ".".join(os.environ.get(name, "") for name in names).strip(".")


def _path(run_dir: Path) -> Path:
    return run_dir / "rendezvous.json"


def _publish(run_dir: Path, world: World, timeout: timedelta) -> dist.Store:
    """Rank 0 binds a free port on all interfaces, as torch's store always does, and writes where it may be found."""
    global _served
    run_dir.mkdir(parents=True, exist_ok=True)
    _path(run_dir).unlink(missing_ok=True)
    offered = [address for _, address in addresses_to_offer(world)]
    _served = dist.TCPStore(
        "0.0.0.0", 0, None, is_master=True, timeout=timeout, wait_for_workers=False
    )
    nonce = secrets.token_hex(16)
    _served.set(_NONCE, nonce)
    facts = {"job": _job_id(world), "addresses": offered, "port": _served.port, "nonce": nonce}
    write_json(_path(run_dir), facts)
    reached = _reached(_served, world, timeout)
    everywhere = [
        address for address in offered if all(address in answers for answers in reached.values())
    ]
    if not everywhere:
        _served.set(_ADDRESS, "")
        shown = "; ".join(f"rank {rank}: {', '.join(answers)}" for rank, answers in reached.items())
        raise UserError(
            f"no address of rank 0 is reached by every rank ({shown}): name the network with SCALETRAIN_INTERFACE"
        )
    _served.set(_ADDRESS, everywhere[0])
    _use_interface(everywhere[0])
    return dist.PrefixStore(_PREFIX, _served)


def _reached(store: dist.Store, world: World, timeout: timedelta) -> dict[int, list[str]]:
    """At which of rank 0's addresses each other rank finds it."""
    keys = {rank: f"scaletrain/reached/{rank}" for rank in range(1, world.size)}
    try:
        store.wait([*keys.values()], timeout)
    except RuntimeError:
        missing = ", ".join(str(rank) for rank, key in keys.items() if not store.check([key]))
        raise TimeoutError(
            f"after {timeout.total_seconds():.0f} s ranks {missing} have not found rank 0"
        ) from None
    return {rank: json.loads(store.get(key)) for rank, key in keys.items()}


def _find(run_dir: Path, world: World, timeout: timedelta) -> dist.Store:
    """The other ranks read where rank 0 may be found, try every address, and use the one that all ranks reach."""
    until = time.monotonic() + timeout.total_seconds()
    seen = "no rendezvous.json"
    while time.monotonic() < until:
        progress.alive(progress.LOOKING_FOR_RANK_0)
        time.sleep(0.05)
        try:
            facts = json.loads(_path(run_dir).read_text(encoding="utf-8"))
            job, addresses, port, nonce = (
                facts[key] for key in ("job", "addresses", "port", "nonce")
            )
        except (OSError, ValueError, KeyError):
            continue
        if job != _job_id(world):
            seen = f"only an earlier job's rendezvous.json ({job})"
            continue
        left = timedelta(seconds=max(1.0, until - time.monotonic()))
        stores = {
            address: store
            for address in addresses
            if (store := _proved(address, port, nonce, left))
        }
        if not stores:
            seen = f"rendezvous.json, but rank 0 answers at none of {', '.join(addresses)}, port {port}"
            continue
        any_store = next(iter(stores.values()))
        any_store.set(f"scaletrain/reached/{world.rank}", json.dumps([*stores]))
        try:
            address = any_store.get(_ADDRESS).decode()
        except RuntimeError as error:
            raise ConnectionError("rank 0 has given up: not all ranks found it in time") from error
        if not address:
            raise ConnectionError("no address of rank 0 is reached by every rank")
        _use_interface(_local_address(address, port))
        return dist.PrefixStore(_PREFIX, stores[address])
    raise TimeoutError(
        f"rank {world.rank} did not find rank 0 within {timeout.total_seconds():.0f} s: in {run_dir} there is {seen}"
        " (is it a folder that all hosts share?)"
    )


def _proved(address: str, port: int, nonce: str, timeout: timedelta) -> dist.TCPStore | None:
    """The store at an address, if it is our job's: an address may lead elsewhere, and a file may be old."""
    if not _local_address(address, port):
        return None
    try:
        store = dist.TCPStore(
            address, port, None, is_master=False, timeout=timeout, wait_for_workers=False
        )
        return store if store.check([_NONCE]) and store.get(_NONCE).decode() == nonce else None
    except RuntimeError:
        return None


def address_of(store: dist.Store) -> tuple[str, int]:
    """Host and port of the store's server; of a world of one that has none, a free store is served."""
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        global _served
        _served = store = dist.TCPStore(
            "127.0.0.1", 0, None, is_master=True, wait_for_workers=False
        )
    return "127.0.0.1" if store.host == "0.0.0.0" else store.host, store.port


def addresses_to_offer(world: World) -> list[tuple[str, str]]:
    """(interface, IPv4 address) pairs at which other ranks may find this one: all that are up, or the one that a person named.

    All of them are published and the others try each: none is taken because it came first.
    """
    named = next(
        (
            os.environ[key]
            for key in ("SCALETRAIN_INTERFACE", "GLOO_SOCKET_IFNAME")
            if os.environ.get(key)
        ),
        "",
    )
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    found = [
        (name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and name in up
    ]
    if named:
        chosen = [(name, address) for name, address in found if name in named.split(",")]
        if not chosen:
            raise UserError(
                f"SCALETRAIN_INTERFACE or GLOO_SOCKET_IFNAME: no interface {named!r} is up with an IPv4 address"
                f" (there are: {', '.join(f'{name} {address}' for name, address in found)})"
            )
        return chosen
    loopback = [(name, address) for name, address in found if address.startswith("127.")]
    others = [(name, address) for name, address in found if not address.startswith("127.")]
    if world.local_size == world.size:
        return loopback
    # 127.0.0.1 leads every host to itself: a rank here may use it, one elsewhere meets nobody or fails the proof.
    return [*others, *(loopback if world.local_size == UNKNOWN else [])]


def _local_address(address: str, port: int) -> str:
    """Which of our addresses a connection to ``address`` leaves from; empty when nobody answers there."""
    try:
        with socket.create_connection((address, port), timeout=3) as connection:
            return connection.getsockname()[0]
    except OSError:
        return ""


def _use_interface(address: str) -> None:
    if not address or os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return
