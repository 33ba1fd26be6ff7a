"""The contract of a transport; every other file here is one wire.

A plugin is a function ``transport(group, *, <options>) -> Transport``, called by every rank of the group (collectively).
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor


class Group(NamedTuple):
    """The ranks that a transport connects, and where they meet."""

    store: dist.Store  # this group's own; keys may be chosen freely
    rank: int
    size: int
    timeout: timedelta  # after which waiting for a peer raises
    names: tuple[int, ...] = ()  # what errors call the ranks, where not by these numbers

    def name(self, rank: int) -> int:
        return self.names[rank] if self.names else rank


class Reduce(Protocol):
    """``torch.add``, ``torch.maximum``, ...: writes f(a, b) to ``out``."""

    def __call__(self, a: Tensor, b: Tensor, *, out: Tensor) -> Tensor: ...


class Receive(NamedTuple):
    """What to do with what ``src`` sends: ``into`` is replaced by it, or, with ``reduce``, ``reduce(into, received, out=into)``."""

    src: int
    into: Tensor
    reduce: Reduce | None = None


Pending = Callable[[], None]  # call it to wait until what was started has happened


class Transport(Protocol):
    """Moves the transfers of one round. One thread at a time may use it."""

    rank: int
    size: int

    def start(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> Pending:
        """Start to send and receive at once. Tensors are one-dimensional, contiguous and not empty; they stay untouched until waited for.

        Between two ranks, messages match in the order in which they are listed, over all starts (there are no tags: NCCL has none).
        Receives are reduced in the order in which they are listed. What is sent is read before anything is written: one start may send and
        receive the same elements. Several starts may be open when their elements are apart.

        Raises (here or in waiting):
            TimeoutError: a peer did not take part in time; names it.
            ConnectionError: a peer is gone; names it.
        """

    def close(self) -> None:
        """Give back what was taken from the machine. Not collective."""


class Lingering(Protocol):
    """What a transport has besides when a send is done before the message has left this host: a socket holds up to 4 MiB as Linux comes.

    Messages of at least ``receipts_from_bytes`` are then answered by a receipt where the schedule means that one follows another.
    """

    receipts_from_bytes: float


class OwnAllreduce(Protocol):
    """What a transport has besides when the wire brings an allreduce of its own: the collective ``native``."""

    def allreduce(self, tensor: Tensor, reduce: Reduce) -> None:
        """In place; as ``execute`` (collective)."""


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two contiguous tensors share memory."""
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def apart(
    sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]
) -> list[tuple[int, Tensor]]:
    """The sends, copied where one of ``receives`` writes into the same elements: it may be there first."""
    written = [receive.into for receive in receives]
    return [
        (peer, t.clone() if any(overlap(t, into) for into in written) else t) for peer, t in sends
    ]


def sends_go_first(sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> bool:
    """Whether what is sent is also reduced into. Where messages land in buffers of their own, no copy is needed: only to wait until it has left."""
    return any(overlap(t, r.into) for r in receives if r.reduce is not None for _, t in sends)
