"""The contract of a transport; every other file here is one wire.

A plugin is a function ``transport(group, *, <options>) -> Transport``, called by every rank of the group (collectively).
"""

from collections.abc import Sequence
from datetime import timedelta
from typing import NamedTuple, Protocol

import torch.distributed as dist
from torch import Tensor


class Group(NamedTuple):
    """The ranks that a transport connects, and where they meet."""

    store: dist.Store  # this group's own; keys may be chosen freely
    rank: int
    size: int
    timeout: timedelta  # after which a swap raises


class Receive(NamedTuple):
    """What to do with what ``src`` sends: ``into`` is replaced by it, or, with ``reduce``, ``reduce(into, received, out=into)``."""

    src: int
    into: Tensor
    reduce: "Reduce | None" = None


class Reduce(Protocol):
    """``torch.add``, ``torch.maximum``, ...: writes f(a, b) to ``out``."""

    def __call__(self, a: Tensor, b: Tensor, *, out: Tensor) -> Tensor: ...


class Transport(Protocol):
    """Moves the transfers of one round. One thread at a time may use it."""

    rank: int
    size: int

    def swap(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> None:
        """Send and receive at the same time; returns when all has happened. Tensors are one-dimensional, contiguous and not empty.

        Between two ranks, messages match in the order in which they are listed, over all swaps (there are no tags: NCCL has none). What
        is sent is read before anything is written: a swap may send and receive the same elements.

        Raises:
            TimeoutError: a peer did not take part in time; names it.
            ConnectionError: a peer is gone; names it.
        """

    def close(self) -> None:
        """Give back what was taken from the machine. Not collective."""
