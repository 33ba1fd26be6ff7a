"""Two levels: ranks of a host share out the message and add it up in memory; each slice then crosses between the hosts."""

from collections.abc import Callable
from importlib import import_module
from typing import Annotated, Literal

from annotated_types import Ge

from scaletrain.collectives.schedule import Schedule, Transfer


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
    """Consecutive ranks share a host; the last host may have fewer. A host's port carries its message once, however many ranks it has.

    Goyal et al. 2017, section 4 (reduce in the host, allreduce between hosts, broadcast in the host), with every local rank owning a slice, as
    NCCL and Horovod's hierarchical allreduce do.
    """
    hosts = [
        range(first, min(first + ranks_per_host, size)) for first in range(0, size, ranks_per_host)
    ]
    slices = min(len(host) for host in hosts)  # each host's first `slices` ranks own one
    factory: Callable[[int], Schedule] = import_module(f"scaletrain.collectives.{between}").schedule
    outer = factory(len(hosts))
    chunks = [range(s * outer.num_chunks, (s + 1) * outer.num_chunks) for s in range(slices)]
    gather = tuple(
        Transfer(r, host[s], c, True)
        for host in hosts
        for s in range(slices)
        for r in host
        if r != host[s]
        for c in chunks[s]
    )
    across = [
        tuple(
            Transfer(hosts[t.src][s], hosts[t.dst][s], chunks[s][t.chunk], t.add)
            for s in range(slices)
            for t in transfers
        )
        for transfers in outer.rounds
    ]
    spread = tuple(Transfer(t.dst, t.src, t.chunk, False) for t in gather)
    rounds = [gather, *across, spread] if gather else across
    return Schedule(size, slices * outer.num_chunks, tuple(rounds))
