"""Publishing and finding rank 0, under launchers that serve no store.

1. Rank 0 serves a store at a free port, and writes all of its addresses to a file in the run
   directory (``RunDir.rendezvous``).
2. Every other rank tries each address, and takes it for rank 0 if a random number (nonce) from the
   file is in the store there: an address may lead elsewhere, and a file may be old.
3. It writes to the store at which addresses it found rank 0.
4. Rank 0 takes the first address that every rank reached, and writes it to the store.
5. All ranks use that address.
"""

import json
import os
import secrets
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist

from scaletrain.engine.rendezvous.sealed import sealed
from scaletrain.engine.rendezvous.serve import serve_at
from scaletrain.errors import UserError
from scaletrain.host import addresses
from scaletrain.host.addresses import InterfaceAddress
from scaletrain.run import progress
from scaletrain.run.atomic import write_json
from scaletrain.run.layout import RunDir
from scaletrain.world import UNKNOWN, World

# Keys of the store. Rank 0 writes these two, and rank r > 0 writes scaletrain/reached/r.
_NONCE = "scaletrain/nonce"
_ADDRESS = "scaletrain/address"  # the address in use; empty: there is none that all ranks reach

_PREFIX = "job"  # of the job's own keys
_LOOK_S = 0.05  # between looks at the file
# Variables that name the job, by launcher: they separate its file from an earlier job's in the same
# run directory.
_JOB_VARIABLES = {
    "slurm": ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"),
    "openmpi": ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"),
}
_INTERFACE_VARIABLES = ("SCALETRAIN_INTERFACE", "GLOO_SOCKET_IFNAME")


class _MeetingPoint(NamedTuple):
    """The contents of the file ``RunDir.rendezvous``. Rank 0 writes it, the others read it."""

    job: str  # the launcher's name of the job, empty if it has none
    addresses: list[str]  # at which rank 0 may be reached
    port: int
    nonce: str

    @classmethod
    def read(cls, run_dir: Path) -> "_MeetingPoint | None":
        """Return the meeting point in a run directory; None if there is none, or half a file."""
        try:
            facts = json.loads(RunDir(run_dir).rendezvous.read_text(encoding="utf-8"))
            return cls(**{field: facts[field] for field in cls._fields})
        except (OSError, ValueError, KeyError):
            return None


def publish(run_dir: Path, world: World, timeout: timedelta) -> dist.Store:
    """Serve the store and publish where. Rank 0 calls it, while the others call ``find``.

    Returns:
        The store, sealed by the job's key in the run directory. The nonce tells its values from
        those of earlier jobs with the same key.

    Raises:
        TimeoutError: some ranks did not find this one; names them.
        UserError: no address is reached by every rank.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = RunDir(run_dir).rendezvous
    path.unlink(missing_ok=True)  # of an earlier job
    offered = [address for _, address in addresses_to_offer(world)]
    # On one host nobody outside has any business here.
    served = serve_at("127.0.0.1" if world.local_size == world.size else "0.0.0.0", 0, timeout)
    nonce = secrets.token_hex(16)
    served.set(_NONCE, nonce)
    store = sealed(served, run_dir, nonce)
    # The file comes last: whoever reads it finds a store that holds the nonce.
    write_json(path, _MeetingPoint(_job_name(world), offered, served.port, nonce)._asdict())
    reached = _wait_for_reached(store, world, timeout)
    for address in offered:
        if all(address in reached_by_rank for reached_by_rank in reached.values()):
            break
    else:
        # The others wait for an answer: without this one they would run into their time-out.
        store.set(_ADDRESS, "")
        findings = []
        for rank, reached_addresses in reached.items():
            findings.append(f"rank {rank}: {', '.join(reached_addresses)}")
        raise UserError(
            f"no address of rank 0 is reached by every rank ({'; '.join(findings)}):"
            " name the network with SCALETRAIN_INTERFACE"
        )
    store.set(_ADDRESS, address)
    use_interface_of(address)
    return sealed(dist.PrefixStore(_PREFIX, served), run_dir, nonce)


def _wait_for_reached(store: dist.Store, world: World, timeout: timedelta) -> dict[int, list[str]]:
    """Return the addresses at which each other rank found this one."""
    keys = {rank: f"scaletrain/reached/{rank}" for rank in range(1, world.size)}
    try:
        store.wait([*keys.values()], timeout)
    except RuntimeError:
        missing = [str(rank) for rank, key in keys.items() if not store.check([key])]
        raise TimeoutError(
            f"after {timeout.total_seconds():.0f} s ranks {', '.join(missing)}"
            " have not found rank 0"
        ) from None
    return {rank: json.loads(store.get(key)) for rank, key in keys.items()}


def find(run_dir: Path, world: World, timeout: timedelta) -> dist.Store:
    """Return the store that rank 0 serves and publishes. All other ranks call it.

    Raises:
        TimeoutError: rank 0 is not found in time.
        ConnectionError: rank 0 has given up, or no address is reached by every rank.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    file_name = RunDir(run_dir).rendezvous.name
    seen = f"no {file_name}"  # for the message of a time-out
    while time.monotonic() < deadline:
        progress.alive(progress.LOOKING_FOR_RANK_0)
        time.sleep(_LOOK_S)
        point = _MeetingPoint.read(run_dir)
        if point is None:
            continue
        if point.job != _job_name(world):
            seen = f"only an earlier job's {file_name} ({point.job})"
            continue
        left = timedelta(seconds=max(1.0, deadline - time.monotonic()))
        stores = _stores_at(point, left)
        if stores:
            return _agree(stores, point, world, run_dir)
        seen = (
            f"{file_name}, but rank 0 answers at none of {', '.join(point.addresses)},"
            f" port {point.port}"
        )
    raise TimeoutError(
        f"rank {world.rank} did not find rank 0 within {timeout.total_seconds():.0f} s:"
        f" in {run_dir} there is {seen} (is it a folder that all hosts share?)"
    )


def _stores_at(point: _MeetingPoint, timeout: timedelta) -> dict[str, dist.TCPStore]:
    """Return the job's store by each address at which it is reached."""
    stores = {}
    for address in point.addresses:
        store = store_with_nonce(address, point.port, point.nonce, timeout)
        if store is not None:
            stores[address] = store
    return stores


def _agree(
    stores: dict[str, dist.TCPStore], point: _MeetingPoint, world: World, run_dir: Path
) -> dist.Store:
    """Tell rank 0 where it was found, and return the store at the address that it takes."""
    any_store = sealed(next(iter(stores.values())), run_dir, point.nonce)
    any_store.set(f"scaletrain/reached/{world.rank}", json.dumps([*stores]))
    try:
        address = any_store.get(_ADDRESS).decode()
    except RuntimeError as error:
        raise ConnectionError("rank 0 has given up: not all ranks found it in time") from error
    if not address:
        raise ConnectionError("no address of rank 0 is reached by every rank")
    use_interface_of(addresses.source_address(address, point.port))
    return sealed(dist.PrefixStore(_PREFIX, stores[address]), run_dir, point.nonce)


def store_with_nonce(
    address: str, port: int, nonce: str, timeout: timedelta
) -> dist.TCPStore | None:
    """Return the store at an address if it holds the nonce; None: it is not our job's."""
    # A plain connection shows quickly that nobody listens. torch's store would try for long.
    if not addresses.source_address(address, port):
        return None
    try:
        store = dist.TCPStore(
            address, port, None, is_master=False, timeout=timeout, wait_for_workers=False
        )
        if store.check([_NONCE]) and store.get(_NONCE).decode() == nonce:
            return store
    except RuntimeError:
        pass  # nobody serves a store there
    return None


def _job_name(world: World) -> str:
    """Return the launcher's name of this job; empty if it has none."""
    variables = _JOB_VARIABLES.get(world.launcher, ())
    return ".".join(os.environ.get(name, "") for name in variables).strip(".")


def addresses_to_offer(world: World) -> list[InterfaceAddress]:
    """Return the addresses at which other ranks may find this one.

    They are all that are up, or those of the interface that a person named. All of them are
    published and the others try each: none is taken because it came first.

    Raises:
        UserError: the named interface is not up, or has no IPv4 address.
    """
    up = addresses.ipv4_addresses()
    named = _named_interfaces()
    if named:
        chosen = [entry for entry in up if entry.interface in named.split(",")]
        if not chosen:
            existing = ", ".join(f"{name} {address}" for name, address in up)
            raise UserError(
                f"SCALETRAIN_INTERFACE or GLOO_SOCKET_IFNAME: no interface {named!r} is up"
                f" with an IPv4 address (there are: {existing})"
            )
        return chosen
    loopback = [entry for entry in up if entry.is_loopback]
    if world.local_size == world.size:
        return loopback
    others = [entry for entry in up if not entry.is_loopback]
    if world.local_size == UNKNOWN:
        # A rank on this host may use 127.0.0.1. Elsewhere, it leads to nobody or fails the proof.
        return [*others, *loopback]
    return others


def _named_interfaces() -> str:
    """Return the interfaces that a person named, separated by commas; empty: none."""
    for variable in _INTERFACE_VARIABLES:
        if os.environ.get(variable):
            return os.environ[variable]
    return ""


def use_interface_of(address: str) -> None:
    """Make gloo use the interface that has this address, unless a person named one.

    Args:
        address: one of this machine's; empty: leave it to gloo.
    """
    if not address or os.environ.get("GLOO_SOCKET_IFNAME"):
        return
    interface = addresses.interface_of(address)
    if interface:
        os.environ["GLOO_SOCKET_IFNAME"] = interface
