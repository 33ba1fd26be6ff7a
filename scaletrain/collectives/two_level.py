"""Two levels: a host adds up slices in memory, and each slice crosses between hosts."""

from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Literal

from annotated_types import Ge

from scaletrain.collectives.schedule import Schedule, Transfer, sent_back


def schedule(
    size: int,
    *,
    ranks_per_host: Annotated[int, Ge(1)] = 2,
    between: Literal[
        "ring",
        "tree",
        "halving_doubling",
        "recursive_doubling",
        "direct",
        "double_tree",
        "pipelined_tree",
        "star",
    ] = "ring",
) -> Schedule:
    """Return an allreduce that crosses a host's port once, however many ranks the host has.

    1. Each local rank that owns a slice gathers it from the ranks of its host.
    2. The owners of a slice reduce it between the hosts.
    3. Each owner sends the result to the ranks of its host.

    Source: Goyal et al. 2017, section 4 (reduce in the host, allreduce between hosts, broadcast in
    the host), with every local rank owning a slice, as NCCL and Horovod's hierarchical allreduce
    do.

    Args:
        size: number of ranks.
        ranks_per_host: consecutive ranks that share a host; the last host may have fewer.
        between: the algorithm between the hosts.
    """
    hosts = []
    for first in range(0, size, ranks_per_host):
        hosts.append(range(first, min(first + ranks_per_host, size)))
    num_slices = min(len(host) for host in hosts)  # each host's first ranks own one each
    factory: Callable[[int], Schedule] = import_module(f"scaletrain.collectives.{between}").schedule
    outer = factory(len(hosts))
    gather = _gather(hosts, num_slices, outer.num_chunks)
    rounds = []
    for transfers in outer.rounds:
        # All slices cross at once: the k-th ranks of all hosts run the outer schedule on slice k.
        across = []
        for owner in range(num_slices):
            for src, dst, chunk, add in transfers:
                chunk_of_slice = owner * outer.num_chunks + chunk
                across.append(Transfer(hosts[src][owner], hosts[dst][owner], chunk_of_slice, add))
        rounds.append(tuple(across))
    if gather:
        rounds = [gather, *rounds, sent_back(gather)]
    return Schedule(size, num_slices * outer.num_chunks, tuple(rounds))


def _gather(hosts: list[range], num_slices: int, chunks_per_slice: int) -> tuple[Transfer, ...]:
    """Return the round in which each owner of a slice adds up the slices of its host."""
    transfers = []
    for host in hosts:
        for number in range(num_slices):
            owner = host[number]
            for rank in host:
                if rank != owner:
                    first = number * chunks_per_slice
                    for chunk in range(first, first + chunks_per_slice):
                        transfers.append(Transfer(rank, owner, chunk, True))
    return tuple(transfers)
