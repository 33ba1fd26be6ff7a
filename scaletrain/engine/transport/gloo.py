"""TCP between any hosts, through gloo's point-to-point messages."""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from scaletrain.collectives import cost
from scaletrain.engine.transport import (
    Group,
    Pending,
    Receive,
    Reduce,
    Transport,
    apart,
    sends_go_first,
)
from scaletrain.engine.transport.landing import Landings

_OPERATIONS = {
    torch.add: dist.ReduceOp.SUM, torch.mul: dist.ReduceOp.PRODUCT,
    torch.minimum: dist.ReduceOp.MIN, torch.maximum: dist.ReduceOp.MAX,
}  # fmt: skip


class Gloo:
    """Point-to-point over gloo. Receives are posted before sends, or two ranks that send large messages to each other serialise."""

    receipts_from_bytes = cost.RECEIPTS_FROM_BYTES

    def __init__(self, group: Group):
        self.rank, self.size = group.rank, group.size
        self._timeout_s = group.timeout.total_seconds()
        try:
            self._pg = dist.ProcessGroupGloo(group.store, group.rank, group.size, group.timeout)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ConnectionError(
                f"gloo: rank {self.rank} is not connected with all {self.size} ranks: {reason}"
            ) from error
        self._landings = Landings()

    def start(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> Pending:
        sends = apart(sends, [receive for receive in receives if receive.reduce is None])
        sends_first = sends_go_first(sends, receives)
        borrowed = [
            None if r.reduce is None else self._landings.take(r.into.nbytes) for r in receives
        ]
        landings = [
            r.into if landing is None else landing.like(r.into)
            for r, landing in zip(receives, borrowed, strict=True)
        ]
        # A gloo Work that is dropped before it completes loses its message silently: all are kept until all are done.
        incoming = [
            (self._begin(self._pg.recv, landed, r.src), r, into, landed)
            for r, landing in zip(receives, landings, strict=True)
            for into, landed in zip(_pieces(r.into), _pieces(landing), strict=True)
        ]
        outgoing = [
            (peer, self._begin(self._pg.send, piece, peer))
            for peer, t in sends
            for piece in _pieces(t)
        ]

        def wait_for_sends() -> None:
            for peer, work in outgoing:
                self._wait(work, peer)

        def wait() -> None:
            if sends_first:
                wait_for_sends()
            for work, receive, into, landed in incoming:
                self._wait(work, receive.src)
                if receive.reduce is not None:
                    receive.reduce(into, landed, out=into)
            if not sends_first:
                wait_for_sends()
            for landing in borrowed:
                if landing is not None:
                    self._landings.give(landing)

        return wait

    def allreduce(self, tensor: Tensor, reduce: Reduce) -> None:
        """gloo's own allreduce."""
        options = dist.AllreduceOptions()
        options.reduceOp = _OPERATIONS[reduce]  # type: ignore[index]
        try:
            work = self._pg.allreduce([tensor], options)
        except RuntimeError as error:
            raise self._failure(error, None) from error
        self._wait(work, None)

    def _begin(
        self, start: Callable[[list[Tensor], int, int], dist.Work], tensor: Tensor, peer: int
    ) -> dist.Work:
        """Connects on first use; raises already here when the peer is known to be gone."""
        try:
            return start([tensor], peer, 0)
        except RuntimeError as error:
            raise self._failure(error, peer) from error

    def _wait(self, work: dist.Work, peer: int | None) -> None:
        try:
            work.wait()
        except RuntimeError as error:
            raise self._failure(error, peer) from error

    def _failure(self, error: RuntimeError, peer: int | None) -> Exception:
        who = "a peer" if peer is None else f"peer rank {peer}"
        if "timed out" in str(error).lower() or "timeout" in str(error).lower():
            return TimeoutError(f"{who} did not answer: timed out after {self._timeout_s:g} s")
        return ConnectionError(f"{who} is lost")

    def close(self) -> None:
        self._landings.clear()
        self._pg.shutdown()


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """A message travels in these: one is added while the next arrives."""
    number = -(-tensor.nbytes // cost.PIECE_BYTES)
    return (tensor,) if number == 1 else tensor.tensor_split(number)


def transport(group: Group) -> Transport:
    return Gloo(group)
