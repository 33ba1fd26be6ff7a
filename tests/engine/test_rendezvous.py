"""Tests engine/rendezvous/: ranks meet by the facts that their launcher sets.

These are a handed-over socket, an agent's store, or rank 0's file in the run directory.
"""

import json
import os
import socket
import subprocess
import time
from datetime import timedelta
from pathlib import Path

import pytest

from scaletrain.engine import rendezvous
from scaletrain.engine.rendezvous import publish
from scaletrain.errors import UserError
from scaletrain.world import UNKNOWN, World
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow
SOON = timedelta(seconds=20)


def world_of(rank: int, size: int, **place) -> World:
    return World(rank, size, UNKNOWN, UNKNOWN, UNKNOWN, UNKNOWN, "openmpi")._replace(**place)


def meet(rank: int, size: int, run_dir: Path) -> dict:
    """Publish or find; then every rank tells the others something only it knows."""
    os.environ.pop("GLOO_SOCKET_IFNAME", None)
    os.environ["PMIX_NAMESPACE"] = "this-job"
    world = world_of(rank, size)
    store = rendezvous.join(world, run_dir, SOON)
    store.set(f"secret/{rank}", str(rank * 7))
    heard = [int(store.get(f"secret/{other}")) for other in range(size)]
    placed = rendezvous.place(world, store)
    store.add("done", 1)
    while rank == 0 and store.add("done", 0) < size:
        pass
    return {"heard": heard, "place": placed, "interface": os.environ.get("GLOO_SOCKET_IFNAME")}


def test_rank_0_publishes_and_the_others_find_it(tmp_path: Path):
    found = run_ranks(meet, 3, tmp_path)
    assert [f["heard"] for f in found] == [[0, 7, 14]] * 3
    assert [f["place"] for f in found] == [World(r, 3, r, 3, 0, 1, "openmpi") for r in range(3)]
    assert len({f["interface"] for f in found}) == 1 and found[0]["interface"]
    published = json.loads((tmp_path / "rendezvous.json").read_text())
    assert published["port"] > 0 and published["job"].startswith("this-job")


@pytest.mark.parametrize(
    "old",
    [
        {"job": "an-earlier-job", "port": 9, "addresses": ["127.0.0.1"], "nonce": "x"},
        {
            "job": "this-job",
            "port": 9,
            "addresses": ["127.0.0.1"],
            "nonce": "x",
        },  # nobody answers there
        {"half": "a file"},
    ],
)
def test_an_old_meeting_point_is_not_taken(tmp_path: Path, old: dict):
    (tmp_path / "rendezvous.json").write_text(json.dumps(old))
    assert [f["heard"] for f in run_ranks(meet, 2, tmp_path)] == [[0, 7]] * 2


def meet_impostor(rank: int, size: int, run_dir: Path, port: int) -> str:
    """Another job's store answers at the port of an old file: it does not know the nonce."""
    store = publish.store_with_nonce(
        "127.0.0.1", port, "the nonce of this job", timedelta(seconds=5)
    )
    return "taken" if store else "refused"


def test_another_jobs_store_is_not_taken(tmp_path: Path):
    import torch.distributed as dist

    theirs = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    theirs.set("scaletrain/nonce", "another nonce")
    assert run_ranks(meet_impostor, 1, tmp_path, theirs.port) == ["refused"]


def missing(rank: int, size: int, run_dir: Path) -> str:
    """Rank 2 of 3 never comes."""
    with pytest.raises(TimeoutError if rank == 0 else ConnectionError) as late:
        rendezvous.join(world_of(rank, size + 1), run_dir, timedelta(seconds=3))
    return str(late.value)


def test_who_is_missing_is_told(tmp_path: Path):
    messages = run_ranks(missing, 2, tmp_path)
    assert "ranks 2 have not" in messages[0] and "given up" in messages[1], messages


def handed(rank: int, size: int, run_dir: Path, port: int, fd: int) -> int:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    if rank == 0:
        os.environ[rendezvous.STORE_FD] = str(fd)
    store = rendezvous.join(World(rank, size, launcher="local"), run_dir, SOON)
    return store.add("sum", rank + 1)


def test_a_socket_that_was_bound_before(tmp_path: Path):
    """In one process here: the socket is the launcher's, the port was never chosen by anybody."""
    listening = socket.create_server(("127.0.0.1", 0))
    before = dict(os.environ)
    try:
        assert handed(0, 1, tmp_path, listening.getsockname()[1], listening.detach()) == 1
        assert rendezvous.STORE_FD not in os.environ, "a child process would serve the store again"
    finally:
        os.environ.clear()
        os.environ.update(before)


def paused(rank: int, size: int, run_dir: Path, port: int) -> None:
    """Rank 0 is stopped for longer than its limit while it waits; rank 1 comes after that."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if rank == 0:
        stop = f"sleep 0.5; kill -STOP {os.getpid()}; sleep 5; kill -CONT {os.getpid()}"
        subprocess.Popen(["sh", "-c", stop])
    else:
        time.sleep(6.5)
    store = rendezvous.join(World(rank, size, launcher="local"), run_dir, timedelta(seconds=4))
    store.add("done", 1)
    while rank == 0 and store.add("done", 0) < size:
        pass


def test_a_pause_is_left_out_of_the_wait_for_all_ranks(tmp_path: Path):
    """Bug it catches: torch's store counts it, and a healthy job ends as it starts."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    run_ranks(paused, 2, tmp_path, port, timeout_s=30)


def test_nobody_told_where_rank_0_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR"):
        rendezvous.join(World(0, 2, launcher="environment"), tmp_path, SOON)


def test_all_addresses_are_offered_or_the_one_that_was_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.delenv("SCALETRAIN_INTERFACE", raising=False)
    one_host = World(0, 2, 0, 2, 0, 1, "openmpi")
    assert all(address.startswith("127.") for _, address in publish.addresses_to_offer(one_host))
    two_hosts = World(0, 2, 0, 1, UNKNOWN, UNKNOWN, "openmpi")
    assert not any(
        address.startswith("127.") for _, address in publish.addresses_to_offer(two_hosts)
    )
    monkeypatch.setenv("SCALETRAIN_INTERFACE", "lo")
    assert {name for name, _ in publish.addresses_to_offer(two_hosts)} == {"lo"}
    monkeypatch.setenv("SCALETRAIN_INTERFACE", "nonet7")
    with pytest.raises(UserError, match=r"nonet7.*there are: .*127\.0\.0\.1"):
        publish.addresses_to_offer(two_hosts)
