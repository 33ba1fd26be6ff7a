"""Tests engine/transport/: every algorithm over every transport, against one process.

Results have the same bits on every rank and in every run.
"""

import os
import threading
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scaletrain import plugins
from scaletrain.engine.transport import mixed
from tests.engine import conformance
from tests.ranks import run_ranks

PROCESSES = ["gloo", "mixed", "shared_memory"]
ELSEWHERE = {"threads": "below", "mpi": "test_transports_mpi.py", "nccl": "tests/gpu"}
SIZES = [1, 2, 3, 5, 7, 8]


def test_every_transport_on_disk_is_covered():
    assert set(plugins.names("transport")) == {*PROCESSES, *ELSEWHERE}


def same_bits(found: list[dict[str, bytes]]) -> None:
    for rank, results in enumerate(found):
        assert results.keys() == found[0].keys()
        for what, bits in results.items():
            assert bits == found[0][what], f"{what}: rank {rank} has other bits than rank 0"


def on_threads(function, size: int) -> list:
    """``function("threads", store, rank, size)`` by ranks that are threads."""
    shared = dist.PrefixStore("group/", dist.HashStore())
    results: list = [None] * size

    def one(rank: int) -> None:
        try:
            results[rank] = function(rank, shared)
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a rank hangs"
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize("size", SIZES)
def test_threads(size: int):
    def rank_of(rank: int, store: dist.Store) -> dict[str, bytes]:
        group = conformance.Group(store, rank, size, timedelta(seconds=20))
        transport = plugins.load("transport", "threads")(group)
        found = dict(conformance.every_allreduce(transport))
        conformance.messages_in_order(transport)
        return {what: tensor.numpy().tobytes() for what, tensor in found.items()}

    same_bits(on_threads(rank_of, size))


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_collectives_of_one_hop(size: int):
    """In shared memory, by threads, through blocks that are small: many pieces."""

    def rank_of(rank: int, store: dist.Store) -> list[str]:
        group = conformance.Group(store, rank, size, timedelta(seconds=20))
        transport = plugins.load("transport", "shared_memory")(group, block_bytes=4096)
        return list(conformance.every_one_hop(transport))

    first, *others = on_threads(rank_of, size)
    assert first and all(other == first for other in others)


def _conform(rank: int, size: int, name: str, path: str) -> dict[str, bytes]:
    return conformance.conform(name, dist.FileStore(path, size), rank, size)


def _late(rank: int, size: int, name: str, path: str) -> str:
    return conformance.late(name, dist.FileStore(path, size), rank, size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])  # threads try 7, too
@pytest.mark.parametrize("name", PROCESSES)
def test_processes(name: str, size: int, tmp_path: Path):
    same_bits(run_ranks(_conform, size, name, str(tmp_path / "store"), timeout_s=90))


@pytest.mark.parametrize("name", PROCESSES)
def test_a_late_rank_is_named(name: str, tmp_path: Path):
    messages = run_ranks(_late, 3, name, str(tmp_path / "store"))
    assert all("rank 2" in message for message in messages[:2]), messages


@pytest.mark.parametrize("name", PROCESSES)
def test_nothing_is_left_open(name: str, tmp_path: Path):
    """A transport gives back its memory, sockets and threads: what is open does not grow with the
    number of groups made.
    """
    before, after = run_ranks(_make_and_close, 1, name, str(tmp_path / "store"))[0]
    assert after <= before + 2


def _make_and_close(rank: int, size: int, name: str, path: str) -> tuple[int, int]:
    store = dist.FileStore(path, size)
    counts = []
    for index in range(6):
        group = conformance.Group(
            dist.PrefixStore(f"{index}/", store), rank, size, timedelta(seconds=5)
        )
        plugins.load("transport", name)(group).close()
        counts.append(len(os.listdir("/proc/self/fd")))
    return counts[1], counts[-1]


def _two_hosts(rank: int, size: int, path: str) -> tuple[float, str]:
    """Ranks 0 and 1 as if on one host, 2 and 3 on another: each sends its number on; then rank 3
    ends, for which rank 2 still waits.
    """
    mixed.host_of_each_rank = lambda group: ["a", "a", "b", "b"]  # this process is the rank's own
    group = conformance.Group(dist.FileStore(path, size), rank, size, timedelta(seconds=20))
    wire = plugins.load("transport", "mixed")(group)
    mine, came = torch.full((5000,), float(rank)), torch.empty(5000)
    wire.start([((rank + 1) % size, mine)], [conformance.Receive((rank - 1) % size, came)])()
    told = ""
    if rank == 2:
        try:
            wire.start([], [conformance.Receive(3, came.clone())])()
        except ConnectionError as error:
            told = str(error)
    return came[0].item(), told


@pytest.mark.slow
def test_a_mixed_wire_between_hosts_names_ranks_by_their_own_numbers(tmp_path: Path):
    found = run_ranks(_two_hosts, 4, str(tmp_path / "store"))
    assert [value for value, _ in found] == [3.0, 0.0, 1.0, 2.0]
    assert "peer rank 3" in found[2][1], found
