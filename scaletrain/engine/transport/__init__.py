"""The contract of a transport; every other file here is one wire.

A plugin is a function ``transport(group, *, <options>) -> Transport``. Every rank of the group
calls it (collective).
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from scaletrain.collectives.one_hop import COLLECTIVES, ROOTED


class Member(NamedTuple):
    """A rank's process, as the other ranks need to know it."""

    host: str  # ranks with equal names share memory and a network
    pid: int
    started: int  # in clock ticks since boot: with the id, it identifies the process for good
    cores: tuple[int, ...]  # that it may use


class Group(NamedTuple):
    """The ranks that a transport connects, and the store where they meet."""

    store: dist.Store  # this group's own: keys may be chosen freely
    rank: int
    size: int
    timeout: timedelta  # after which waiting for a peer raises
    names: tuple[int, ...] = ()  # the numbers by which errors call the ranks; empty: 0, 1, 2, ...
    members: tuple[Member, ...] = ()  # by rank; empty: not known yet
    # Set by the thread that aborts the group, read by threads that wait for peers.
    ended: threading.Event | None = None

    def name(self, rank: int) -> int:
        """Return the number by which an error message calls a rank of this group."""
        return self.names[rank] if self.names else rank

    def check_not_ended(self) -> None:
        """Raise ConnectionError if this rank has ended the group."""
        if self.ended is not None and self.ended.is_set():
            raise ConnectionError("this rank has ended the group (abort)")


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


class Call(NamedTuple):
    """A rank's request for a collective: the same on all ranks, unless a program is wrong."""

    number: int  # of the collective in its group
    num_elements: int  # of this rank's tensor; UNEVEN where ranks' sizes may differ
    dtype: torch.dtype | None  # None: the collective has no data
    reduce: Reduce | None = None  # None: nothing is reduced
    collective: str = "allreduce"
    root: int = 0  # the rank that sends or receives everything, where there is one

    def words(self) -> tuple[int, int]:
        """Return the call as two numbers of 63 bits, never 0; other calls have other numbers."""
        kind = _COLLECTIVES[self.collective] << 8 | _REDUCTIONS[self.reduce] << 5
        kind |= _DTYPES_OF_CALLS[self.dtype]
        return (self.number & _LARGEST) << 28 | kind << 16 | self.root, self.num_elements

    def code(self) -> int:
        """Return the call as one number."""
        first, second = self.words()
        return first << 63 | second

    @classmethod
    def of_words(cls, first: int, second: int) -> "Call":
        """Return the call of two numbers that ``words`` returned."""
        kind = first >> 16 & 0xFFF
        return cls(
            number=first >> 28,
            num_elements=second,
            dtype=([*_DTYPES_OF_CALLS])[kind & 0x1F],
            reduce=([*_REDUCTIONS])[kind >> 5 & 0x7],
            collective=([*_COLLECTIVES])[kind >> 8],
            root=first & 0xFFFF,
        )

    def name(self) -> str:
        """Return the collective and its number, such as ``allreduce #7``."""
        return f"{self.collective} #{self.number}"

    def wanted(self) -> str:
        """Return the request in words, such as ``of 1,000 float32 (add)``."""
        if self.dtype is None:
            return ""
        words = f"of {str(self.dtype).removeprefix('torch.')}"
        if self.num_elements != UNEVEN:
            words = f"of {self.num_elements:,} {str(self.dtype).removeprefix('torch.')}"
        if self.reduce is not None:
            words += f" ({self.reduce.__name__})"  # type: ignore[attr-defined]
        if self.collective in ROOTED:
            words += f", root {self.root}"
        return words


UNEVEN = (1 << 62) - 1  # ``Call.num_elements`` where each pair of ranks has a size of its own
_LARGEST = (1 << 35) - 1
_COLLECTIVES = {name: number for number, name in enumerate(("allreduce", *COLLECTIVES))}
# What a collective may have, each with its number in ``Call.words``.
_REDUCTIONS: dict[Any, int] = {
    None: 0, torch.add: 1, torch.mul: 2, torch.minimum: 3, torch.maximum: 4,
}  # fmt: skip
DTYPES = {
    torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3,
    torch.int8: 4, torch.uint8: 5, torch.int16: 6, torch.int32: 7, torch.int64: 8,
}  # fmt: skip
# bool is copied, never reduced. None: no data.
_DTYPES_OF_CALLS: dict[Any, int] = {**DTYPES, torch.bool: 9, None: 10}

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

    def limit(self, timeout: timedelta) -> None:
        """Change the group's timeout, for all that is started from now on. Not collective."""

    def close(self) -> None:
        """Give back everything that was taken from the machine. Not collective."""


class Lingering(Protocol):
    """An attribute of transports where a send is done before its message has left the host.

    A socket of Linux holds up to 4 MiB by default. Messages of at least ``receipts_from_bytes`` are
    then answered by a receipt where the schedule relies on one message having arrived before the
    next one is sent.
    """

    receipts_from_bytes: float


class Comparing(Protocol):
    """A method of transports that notice when the ranks' calls do not match."""

    def announce(self, call: Call) -> None:
        """Take the call to which all messages belong until the next announcement.

        The messages of a rank with another call are never mixed with this rank's.
        """


class OneHop(Protocol):
    """A method of transports that run the collectives of ``collectives.one_hop`` themselves."""

    def exchange(self, call: Call, ends: "Ends") -> None:
        """Run a collective. Collective.

        Args:
            call: the request.
            ends: where this rank's chunks come from and go to.

        Raises:
            TimeoutError: a rank is late; names it.
            ConnectionError: a rank is gone; names it.
            RuntimeError: a rank makes another call; names both calls.
        """


class Ends(NamedTuple):
    """Where a rank's chunks of a one-hop collective come from, and where they go.

    Each is one-dimensional, contiguous and on the CPU. Chunks have the numbers of the schedule.
    """

    sources: Mapping[int, Tensor]  # by chunk: what this rank contributes, sent or not
    targets: Mapping[int, Tensor]  # by chunk: where the result goes


class OwnAllreduce(Protocol):
    """A method of transports that have an allreduce of their own: the collective ``native``."""

    def allreduce(self, tensor: Tensor, reduce: Reduce) -> None:
        """Reduce a tensor over all ranks, in place; as ``execute``. Collective."""


def mismatch(mine: Call, other: Call, rank: int, peer: int) -> RuntimeError:
    """Return the error that says two ranks want different things.

    Args:
        mine: this rank's call.
        other: the peer's.
        rank: this rank.
        peer: the peer.
    """
    return RuntimeError(
        f"the ranks' calls do not match: rank {rank} is in {mine.name()} {mine.wanted()},"
        f" rank {peer} in {other.name()} {other.wanted()}"
    )


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
