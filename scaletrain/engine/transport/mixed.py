"""Shared memory between ranks of one host, gloo (TCP) or MPI between hosts: for two_level."""

import math
from collections.abc import Sequence
from datetime import timedelta
from typing import Literal

import torch.distributed as dist
from torch import Tensor

from scaletrain import plugins
from scaletrain.engine.meeting import host_of_each_rank, introduced
from scaletrain.engine.transport import Call, Group, Receive, Transport, Wait, apart


class Mixed:
    """Each message takes the wire of its two ends. Collective.

    Args:
        between: the transport between hosts.

    Raises:
        As the two transports.
    """

    def __init__(self, group: Group, between: str):
        self.rank = group.rank
        self.size = group.size
        group = introduced(group)
        hosts = host_of_each_rank(group)
        my_host = hosts[group.rank]
        neighbours = [rank for rank, host in enumerate(hosts) if host == my_host]
        store = dist.PrefixStore("between/", group.store)
        # It connects all ranks, which keep their numbers. Only messages between hosts use it.
        self._between: Transport = plugins.load("transport", between)(group._replace(store=store))
        self.receipts_from_bytes = getattr(self._between, "receipts_from_bytes", math.inf)
        self._local_ranks: dict[int, int] = {}  # the number on this host of each rank on it
        self._within: Transport | None = None
        # A rank alone on its host has no neighbour: all its messages take the other wire.
        if len(neighbours) > 1:
            self._local_ranks = {rank: number for number, rank in enumerate(neighbours)}
            local_group = Group(
                # Each host meets under keys of its own, named after its lowest rank.
                store=dist.PrefixStore(f"within/{neighbours[0]}/", group.store),
                rank=self._local_ranks[group.rank],
                size=len(neighbours),
                timeout=group.timeout,
                # Errors name the ranks by their numbers in the whole group.
                names=tuple(group.name(rank) for rank in neighbours),
                members=tuple(group.members[rank] for rank in neighbours),
                ended=group.ended,
            )
            self._within = plugins.load("transport", "shared_memory")(local_group)

    def announce(self, call: Call) -> None:
        """Take this rank's next call. See ``Comparing.announce``."""
        for wire in self._wires():
            if hasattr(wire, "announce"):
                wire.announce(call)

    def _wires(self) -> list[Transport]:
        return [self._between] if self._within is None else [self._within, self._between]

    def start(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> Wait:
        """Start to send and receive at once. See ``Transport.start``."""
        near_sends: list[tuple[int, Tensor]] = []
        far_sends: list[tuple[int, Tensor]] = []
        for peer, tensor in apart(sends, receives):
            if peer in self._local_ranks:
                near_sends.append((self._local_ranks[peer], tensor))
            else:
                far_sends.append((peer, tensor))
        near_receives: list[Receive] = []
        far_receives: list[Receive] = []
        for receive in receives:
            if receive.src in self._local_ranks:
                near_receives.append(receive._replace(src=self._local_ranks[receive.src]))
            else:
                far_receives.append(receive)

        wait_for_far = self._between.start(far_sends, far_receives)
        if self._within is None:
            return wait_for_far
        wait_for_near = self._within.start(near_sends, near_receives)

        def wait() -> None:
            # The order is free: no schedule of ours mixes both wires in one chunk's sum.
            wait_for_near()
            wait_for_far()

        return wait

    def limit(self, timeout: timedelta) -> None:
        """Change the group's timeout. See ``Transport.limit``."""
        for wire in self._wires():
            wire.limit(timeout)

    def close(self) -> None:
        """Give back both wires. Not collective."""
        for wire in self._wires():
            wire.close()


def transport(group: Group, *, between: Literal["gloo", "mpi"] = "gloo") -> Transport:
    """Connect the ranks. Collective.

    Args:
        group: the ranks.
        between: the transport between hosts.
    """
    return Mixed(group, between)
