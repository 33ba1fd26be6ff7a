"""The contract of a transport; every other file here is one wire.

A plugin is a function ``transport(group, *, <options>) -> Transport``. Every rank of the group
calls it (collective).
"""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor


class Group(NamedTuple):
    """The ranks that a transport connects, and the store where they meet."""

    store: dist.Store  # this group's own: keys may be chosen freely
    rank: int
    size: int
    timeout: timedelta  # after which waiting for a peer raises
    names: tuple[int, ...] = ()  # the numbers by which errors call the ranks; empty: 0, 1, 2, ...

    def name(self, rank: int) -> int:
        """Return the number by which an error message calls a rank of this group."""
        return self.names[rank] if self.names else rank


class Reduce(Protocol):
    """``torch.add``, ``torch.maximum``, ...: writes f(a, b) to ``out`` and returns it."""

    def __call__(self, a: Tensor, b: Tensor, /, *, out: Tensor) -> Tensor:
        """Reduce two tensors of the same shape and dtype; ``out`` may be one of them."""


class Receive(NamedTuple):
    """One message to receive, and where it goes.

    Without ``reduce``, the message replaces ``into``. With it, ``reduce(into, message, out=into)``.
    """

    src: int
    into: Tensor  # one-dimensional, contiguous, not empty
    reduce: Reduce | None = None


Wait = Callable[[], None]  # call it to wait until everything that was started has happened


class Transport(Protocol):
    """Moves the transfers of one round. One thread at a time may use it."""

    rank: int
    size: int

    def start(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> Wait:
        """Start to send and receive at once. Return a function that waits for the end.

        Between two ranks, messages match in the order in which they are listed, over all starts:
        there are no tags, since NCCL has none. Received messages are reduced in the order in which
        they are listed. Everything that is sent is read before anything is written: one start may
        send and receive the same elements. Several starts may be open at once if their elements are
        apart.

        Args:
            sends: (peer, tensor) pairs. Tensors are one-dimensional, contiguous and not empty; they
                stay untouched until waited for.
            receives: the messages to receive.

        Raises (here or in waiting):
            TimeoutError: a peer did not take part in time; names it.
            ConnectionError: a peer is gone; names it.
        """

    def close(self) -> None:
        """Give back everything that was taken from the machine. Not collective."""


class Lingering(Protocol):
    """An attribute of transports where a send is done before its message has left the host.

    A socket of Linux holds up to 4 MiB by default. Messages of at least ``receipts_from_bytes`` are
    then answered by a receipt where the schedule relies on one message having arrived before the
    next one is sent.
    """

    receipts_from_bytes: float


class OwnAllreduce(Protocol):
    """A method of transports that have an allreduce of their own: the collective ``native``."""

    def allreduce(self, tensor: Tensor, reduce: Reduce) -> None:
        """Reduce a tensor over all ranks, in place; as ``execute``. Collective."""


def overlap(a: Tensor, b: Tensor) -> bool:
    """Return True if two contiguous tensors share memory."""
    return a.data_ptr() < b.data_ptr() + b.nbytes and b.data_ptr() < a.data_ptr() + a.nbytes


def apart(
    sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]
) -> list[tuple[int, Tensor]]:
    """Return the sends, copied where a message is received into the same elements.

    The received message may be there before the other has left.
    """
    written = [receive.into for receive in receives]
    separate = []
    for peer, tensor in sends:
        if any(overlap(tensor, into) for into in written):
            tensor = tensor.clone()
        separate.append((peer, tensor))
    return separate


def sends_go_first(sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> bool:
    """Return True if a message is reduced into elements that are also sent.

    Where messages land in buffers of their own, no copy is needed: reducing waits until the sends
    have left.
    """
    reduced = [receive.into for receive in receives if receive.reduce is not None]
    return any(overlap(tensor, into) for into in reduced for _, tensor in sends)
