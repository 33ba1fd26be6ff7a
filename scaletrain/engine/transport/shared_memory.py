"""Memory shared by the ranks of one host: no copies through the kernel, no names left behind."""

import contextvars
from collections import deque
from collections.abc import Sequence
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from scaletrain.engine.segment import Patience, Segment, same_host
from scaletrain.engine.transport import Group, Pending, Receive, Reduce, Transport, apart
from scaletrain.errors import UserError

_STAGE = 0  # this rank's counter of phases behind it, over all allreduces
_NUMPY = {
    torch.add: np.add,
    torch.mul: np.multiply,
    torch.minimum: np.minimum,
    torch.maximum: np.maximum,
}
# numpy reduces these as fast as torch does, with a third of the overhead of a call, and on one thread.
_NUMPY_DTYPES = {
    torch.float32: np.float32, torch.float64: np.float64, torch.int32: np.int32, torch.int64: np.int64,
    torch.int8: np.int8, torch.uint8: np.uint8, torch.int16: np.int16,
}  # fmt: skip
_SLOTS = 2  # of a mailbox: one is filled while the other is emptied


class SharedMemory:
    """An allreduce in shared memory, and mailboxes between every two ranks for schedules.

    The data area holds two sets of blocks, one a rank, used in turn. Nobody writes to a set before everybody has entered the next use of
    the other one, that is, has left this one: no barrier at the end.
    """

    def __init__(self, group: Group, block_bytes: int, at_once_bytes: int):
        self.rank, self.size = group.rank, group.size
        self._block_bytes = block_bytes = -(-block_bytes // 128) * 128
        self._at_once_bytes = min(at_once_bytes // self.size, block_bytes)
        blocks_bytes = 2 * self.size * block_bytes
        self._slot_bytes = max(
            4096, min(256 << 10, (32 << 20) // (_SLOTS * self.size**2) // 64 * 64)
        )
        mail_bytes = self.size**2 * _SLOTS * self._slot_bytes
        # Counters: the stage, then for each peer what was sent to it and what was taken from it.
        self._segment = Segment(group, 1 + 2 * self.size, blocks_bytes + mail_bytes)
        self._blocks = np.frombuffer(self._segment.data, np.uint8, blocks_bytes).reshape(
            2, self.size, block_bytes
        )
        self._torch_blocks = torch.from_numpy(self._blocks)
        mail = np.frombuffer(self._segment.data, np.uint8, mail_bytes, blocks_bytes)
        self._mail = torch.from_numpy(mail.reshape(self.size, self.size, _SLOTS, self._slot_bytes))
        # Overflow is as silent as torch's. A context that keeps this setting is entered in 0.1 us, numpy's errstate in 2.4.
        self._quietly = contextvars.Context()
        self._quietly.run(np.seterr, all="ignore")
        self._stage = 0
        self._use = 0  # how often a set of blocks was used
        self._views: dict[Any, list[Any]] = {}
        self._sending: dict[int, deque[_Parcel]] = {}
        self._receiving: dict[int, deque[_Parcel]] = {}
        self._sent = [0] * self.size  # pieces, by peer
        self._taken = [0] * self.size

    def allreduce(self, tensor: Tensor, reduce: Reduce) -> None:
        """Each rank owns a slice of every block, reduces it and offers the result (the schedule ``direct``). Small tensors: everyone
        reads and reduces everything, in the same order, after one wait instead of two. Blocks are small enough to stay in the caches, of which
        the ranks have no more when they are more: so their size does not depend on how many there are."""
        dtype = _NUMPY_DTYPES.get(tensor.dtype)
        if dtype is not None and reduce in _NUMPY:
            flat, operation, views = tensor.numpy(), _NUMPY[reduce], self._typed(dtype)  # type: ignore[index]
            copy = np.copyto
        else:
            flat, operation, views, copy = tensor, reduce, self._typed(tensor.dtype), _torch_copy
        count = len(flat)
        if tensor.nbytes <= self._at_once_bytes:
            self._quietly.run(self._at_once, flat, operation, views, copy)
            return
        # Equal blocks: a short last one would cost as much waiting as a full one.
        parts = -(-tensor.nbytes // self._block_bytes)
        for part in range(parts):
            block = flat[part * count // parts : (part + 1) * count // parts]
            self._quietly.run(self._by_slices, block, operation, views, copy)

    def _at_once(self, flat: Any, operation: Any, views: list[Any], copy: Any) -> None:
        count = len(flat)
        blocks = views[self._use & 1]
        self._use += 1
        copy(blocks[self.rank][:count], flat)
        self._stage += 1
        self._segment.write(_STAGE, self._stage)
        for step in range(1, self.size):
            self._segment.wait((self.rank + step) % self.size, _STAGE, self._stage)
        operation(blocks[0][:count], blocks[1][:count], out=flat)
        for rank in range(2, self.size):
            operation(flat, blocks[rank][:count], out=flat)

    def _by_slices(self, flat: Any, operation: Any, views: list[Any], copy: Any) -> None:
        count, size, me = len(flat), self.size, self.rank
        blocks = views[self._use & 1]
        self._use += 1
        edges = [rank * count // size for rank in range(size + 1)]
        low, high = edges[me], edges[me + 1]
        mine = blocks[me]
        # Others reduce all but this rank's own slice, which stays where it is.
        if low:
            copy(mine[:low], flat[:low])
        if high < count:
            copy(mine[high:count], flat[high:])
        segment = self._segment
        segment.write(_STAGE, self._stage + 1)
        own = flat[low:high]
        for step in range(1, size):
            rank = (me + step) % size
            segment.wait(rank, _STAGE, self._stage + 1)
            theirs = blocks[rank][low:high]
            operation(own, theirs, out=own)
        # The sum takes the place of what was added last, which this core has just fetched, and which nobody else needs.
        copy(theirs, own)
        self._stage += 2
        segment.write(_STAGE, self._stage)
        for step in range(1, size):
            rank = (me + step) % size
            segment.wait(rank, _STAGE, self._stage)
            copy(
                flat[edges[rank] : edges[rank + 1]], blocks[rank - 1][edges[rank] : edges[rank + 1]]
            )

    def _typed(self, dtype: Any) -> list[Any]:
        """``[set][rank]``: the blocks as arrays, or tensors, of ``dtype``."""
        views = self._views.get(dtype)
        if views is None:
            blocks = self._torch_blocks if isinstance(dtype, torch.dtype) else self._blocks
            views = self._views[dtype] = [
                [blocks[s][r].view(dtype) for r in range(self.size)] for s in range(2)
            ]
        return views

    # Mailboxes

    def start(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> Pending:
        sends = apart(sends, receives)
        parcels = []
        for peer, tensor in sends:
            parcels.append(parcel := _Parcel(peer, tensor.view(torch.uint8), None, None))
            self._sending.setdefault(peer, deque()).append(parcel)
        before = None
        for receive in receives:
            # One after the other: a sum does not depend on who was faster.
            before = _Parcel(receive.src, receive.into, receive.reduce, before)
            parcels.append(before)
            self._receiving.setdefault(receive.src, deque()).append(before)
        self._progress()

        def wait() -> None:
            while open_parcels := [parcel for parcel in parcels if not parcel.done]:
                if not self._progress():
                    # A message that waits behind another one may be here already, and its sender gone.
                    first = {
                        parcel.peer
                        for parcel in open_parcels
                        if parcel.after is None or parcel.after.done
                    }
                    patience = Patience(self._segment, tuple(sorted(first)))
                    while not self._progress():
                        patience.pause()

        return wait

    def _progress(self) -> bool:
        """Move whatever can be moved now; whether anything was."""
        moved = False
        for peer, queue in self._sending.items():
            while queue and self._sent[peer] - self._segment.read(peer, 2 + 2 * self.rank) < _SLOTS:
                parcel = queue[0]
                piece = parcel.data[parcel.at : parcel.at + self._slot_bytes]
                self._mail[self.rank, peer, self._sent[peer] % _SLOTS, : piece.numel()] = piece
                self._sent[peer] += 1
                self._segment.write(1 + 2 * peer, self._sent[peer])
                parcel.at += piece.numel()
                if parcel.at == parcel.data.numel():
                    parcel.done = True
                    queue.popleft()
                moved = True
        for peer, queue in self._receiving.items():
            while queue and self._segment.read(peer, 1 + 2 * self.rank) > self._taken[peer]:
                parcel = queue[0]
                if parcel.after is not None and not parcel.after.done:
                    break
                step = self._slot_bytes // parcel.data.element_size()
                into = parcel.data[parcel.at : parcel.at + step]
                slot = self._mail[peer, self.rank, self._taken[peer] % _SLOTS]
                came = slot[: into.nbytes].view(into.dtype)
                if parcel.reduce is None:
                    into.copy_(came)
                else:
                    parcel.reduce(into, came, out=into)
                self._taken[peer] += 1
                self._segment.write(2 + 2 * peer, self._taken[peer])
                parcel.at += into.numel()
                if parcel.at == parcel.data.numel():
                    parcel.done = True
                    queue.popleft()
                moved = True
        return moved

    def close(self) -> None:
        self._views.clear()
        del self._blocks, self._torch_blocks, self._mail
        self._segment.close()


class _Parcel:
    """A message under way, moved in pieces of a mailbox slot."""

    __slots__ = ("after", "at", "data", "done", "peer", "reduce")

    def __init__(self, peer: int, data: Tensor, reduce: Reduce | None, after: "_Parcel | None"):
        self.peer, self.data, self.reduce, self.after = peer, data, reduce, after
        self.at, self.done = 0, False


def _torch_copy(into: Tensor, source: Tensor) -> None:
    into.copy_(source)


def transport(
    group: Group,
    *,
    block_bytes: Annotated[int, Ge(4096)] = 1_048_576,  # reduced at a time, by all ranks together
    at_once_bytes: Annotated[
        int, Ge(0)
    ] = 524_288,  # of all ranks together, up to which each reduces everything
) -> Transport:
    hosts = len(set(same_host(group)))
    if (
        hosts > 1
    ):  # rehearsed hosts have one kernel: it would work, and go round the network that is being rehearsed
        raise UserError(
            f"transport: 'shared_memory' joins ranks of one host, these lie on {hosts} (allowed: auto, mixed, gloo)"
        )
    return SharedMemory(group, block_bytes, at_once_bytes)
