"""Shared memory between ranks of one host, gloo (TCP) or MPI between hosts: the wire for two_level."""

import math
from collections.abc import Sequence
from typing import Literal

import torch.distributed as dist
from torch import Tensor

from scaletrain.engine.segment import same_host
from scaletrain.engine.transport import Group, Pending, Receive, Transport, apart


class Mixed:
    """Each message takes the wire of its two ends."""

    def __init__(self, group: Group, between: str):
        from scaletrain import plugins

        self.rank, self.size = group.rank, group.size
        hosts = same_host(group)
        here = [rank for rank, host in enumerate(hosts) if host == hosts[group.rank]]
        self._between: Transport = plugins.load("transport", between)(
            group._replace(store=dist.PrefixStore("between/", group.store))
        )
        self.receipts_from_bytes = getattr(self._between, "receipts_from_bytes", math.inf)
        self._local: dict[int, int] = {}  # rank: its number on this host
        self._within: Transport | None = None
        if len(here) > 1:
            self._local = {rank: number for number, rank in enumerate(here)}
            store = dist.PrefixStore(f"within/{here[0]}/", group.store)
            names = tuple(map(group.name, here))
            local = Group(store, self._local[group.rank], len(here), group.timeout, names)
            self._within = plugins.load("transport", "shared_memory")(local)

    def start(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> Pending:
        sends = apart(sends, receives)
        far = self._between.start(
            [(peer, t) for peer, t in sends if peer not in self._local],
            [r for r in receives if r.src not in self._local],
        )
        if self._within is None:
            return far
        near = self._within.start(
            [(self._local[peer], t) for peer, t in sends if peer in self._local],
            [r._replace(src=self._local[r.src]) for r in receives if r.src in self._local],
        )

        def wait() -> None:
            near()  # no schedule of ours mixes both wires in one chunk's sum
            far()

        return wait

    def close(self) -> None:
        if self._within is not None:
            self._within.close()
        self._between.close()


def transport(group: Group, *, between: Literal["gloo", "mpi"] = "gloo") -> Transport:
    return Mixed(group, between)
