"""TCP between any hosts, through gloo's point-to-point messages."""

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from scaletrain.collectives import cutting
from scaletrain.engine.meeting import values_of_all
from scaletrain.engine.transport import (
    Call,
    Group,
    Receive,
    Reduce,
    Transport,
    Wait,
    apart,
    sends_go_first,
)
from scaletrain.engine.transport.landing import Landing, Landings
from scaletrain.run.progress import library_limit

_OPERATIONS: dict[Reduce, Any] = {
    torch.add: dist.ReduceOp.SUM, torch.mul: dist.ReduceOp.PRODUCT,
    torch.minimum: dist.ReduceOp.MIN, torch.maximum: dist.ReduceOp.MAX,
}  # fmt: skip
_LARGEST_TAG = 2**31 - 1  # gloo's are of 32 bits; a prime number, so that codes spread over them


class _Incoming(NamedTuple):
    """One piece of a message that is being received."""

    work: dist.Work
    receive: Receive
    into: Tensor  # the piece of ``receive.into``
    landed: Tensor  # where gloo puts it: ``into`` itself, or a landing if it is reduced


class Gloo:
    """Point-to-point messages over gloo. Collective.

    Receives are posted before sends. Otherwise two ranks that send large messages to each other
    would take turns.

    Raises:
        ConnectionError: not all ranks of the group were reached.
    """

    receipts_from_bytes = cutting.RECEIPTS_FROM_BYTES

    def __init__(self, group: Group):
        self.rank = group.rank
        self.size = group.size
        limit = library_limit(group.timeout)
        self._timeout_s = limit.total_seconds()
        self._landings = Landings()
        self._tag = 0  # of all messages of the present call: messages of another never match
        # torch's stubs lack the methods of its backends.
        self._gloo: Any = None
        # gloo waits for the others in C++, where neither a signal nor an abort ends it: first all
        # of them have to be here.
        values_of_all(group, "gloo", "")
        try:
            self._gloo = dist.ProcessGroupGloo(group.store, group.rank, group.size, limit)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConnectionError(
                f"gloo: rank {self.rank} is not connected with all {self.size} ranks: {reason}"
            ) from error

    def announce(self, call: Call) -> None:
        """Take this rank's next call. See ``Comparing.announce``."""
        self._tag = call.code() % _LARGEST_TAG

    def start(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> Wait:
        """Start to send and receive at once. See ``Transport.start``."""
        sends = apart(sends, [receive for receive in receives if receive.reduce is None])
        sends_first = sends_go_first(sends, receives)
        # gloo silently loses the message of a Work that is dropped before it completes: all are
        # kept until all are done.
        borrowed: list[Landing] = []
        incoming: list[_Incoming] = []
        for receive in receives:
            incoming += self._receive(receive, borrowed)
        outgoing: list[tuple[int, dist.Work]] = []
        for peer, tensor in sends:
            for piece in _pieces(tensor):
                outgoing.append((peer, self._begin(self._gloo.send, piece, peer)))

        def wait() -> None:
            # Reducing writes to elements that gloo may still be sending.
            if sends_first:
                self._wait_for_sends(outgoing)
            self._wait_for_receives(incoming)
            if not sends_first:
                self._wait_for_sends(outgoing)
            for landing in borrowed:
                self._landings.give(landing)

        return wait

    def _receive(self, receive: Receive, borrowed: list[Landing]) -> list[_Incoming]:
        """Post a receive, piece by piece. A landing that it takes is added to ``borrowed``."""
        into = receive.into
        landed = into
        if receive.reduce is not None:
            landing = self._landings.take(into.nbytes)
            borrowed.append(landing)
            landed = landing.like(into)
        incoming = []
        for piece, landed_piece in zip(_pieces(into), _pieces(landed), strict=True):
            work = self._begin(self._gloo.recv, landed_piece, receive.src)
            incoming.append(_Incoming(work, receive, piece, landed_piece))
        return incoming

    def _wait_for_sends(self, outgoing: list[tuple[int, dist.Work]]) -> None:
        for peer, work in outgoing:
            self._wait(work, peer)

    def _wait_for_receives(self, incoming: list[_Incoming]) -> None:
        """Wait for each piece in turn, and reduce it while the next one arrives."""
        for work, receive, into, landed in incoming:
            self._wait(work, receive.src)
            if receive.reduce is not None:
                receive.reduce(into, landed, out=into)

    def allreduce(self, tensor: Tensor, reduce: Reduce) -> None:
        """Run gloo's own allreduce, in place. Collective."""
        options = dist.AllreduceOptions()
        options.reduceOp = _OPERATIONS[reduce]
        try:
            work = self._gloo.allreduce([tensor], options)
        except RuntimeError as error:
            raise self._failure(error, None) from error
        self._wait(work, None)

    def _begin(
        self, start: Callable[[list[Tensor], int, int], dist.Work], tensor: Tensor, peer: int
    ) -> dist.Work:
        """Start a send or a receive.

        The first one connects, and raises already here if the peer is known to be gone.
        """
        try:
            # Messages of a call match in order (see ``Transport.start``).
            return start([tensor], peer, self._tag)
        except RuntimeError as error:
            raise self._failure(error, peer) from error

    def _wait(self, work: dist.Work, peer: int | None) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._failure(error, peer) from error

    def _failure(self, error: RuntimeError, peer: int | None) -> Exception:
        """Return our error for gloo's. ``peer`` is None if it may be any of them."""
        name = "a peer" if peer is None else f"peer rank {peer}"
        # Both are RuntimeErrors: only the text tells a late peer from a lost one.
        text = str(error).lower()
        if "timed out" in text or "timeout" in text:
            return TimeoutError(f"{name} did not answer: timed out after {self._timeout_s:g} s")
        return ConnectionError(f"{name} is lost")

    def limit(self, timeout: timedelta) -> None:
        """Change the group's timeout. See ``Transport.limit``."""
        limit = library_limit(timeout)
        self._timeout_s = limit.total_seconds()
        self._gloo._set_default_timeout(limit)

    def close(self) -> None:
        """End gloo's threads and connections. Not collective."""
        self._landings.clear()
        self._gloo.shutdown()


def _pieces(tensor: Tensor) -> Sequence[Tensor]:
    """Return the pieces in which a message travels: one is added while the next arrives."""
    # Both ends cut alike, since a message has the same size on both.
    num_pieces = -(-tensor.nbytes // cutting.PIECE_BYTES)
    if num_pieces == 1:
        return (tensor,)
    return tensor.tensor_split(num_pieces)


def transport(group: Group) -> Transport:
    """Connect the ranks through TCP. Collective.

    Raises:
        ConnectionError: not all ranks of the group were reached.
    """
    return Gloo(group)
