"""Memory shared by the ranks of one host: no copies through the kernel, nothing left over."""

import contextvars
import ctypes
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from scaletrain.engine.meeting import introduced
from scaletrain.engine.segment import Patience, Segment
from scaletrain.engine.transport import (
    Call,
    Group,
    Receive,
    Reduce,
    Transport,
    Wait,
    apart,
    mismatch,
)
from scaletrain.errors import UserError

_NUMPY_OPERATIONS: dict[Reduce, Any] = {
    torch.add: np.add,
    torch.mul: np.multiply,
    torch.minimum: np.minimum,
    torch.maximum: np.maximum,
}
# numpy reduces these as fast as torch does, with a third of the overhead of a call, and on one
# thread.
_NUMPY_DTYPES = {
    torch.float32: np.float32, torch.float64: np.float64,
    torch.int8: np.int8, torch.uint8: np.uint8,
    torch.int16: np.int16, torch.int32: np.int32, torch.int64: np.int64,
}  # fmt: skip
_NUM_SETS = 2  # of blocks: one is used while slow ranks still read the other
_NUM_SLOTS = 2  # of a mailbox: one is filled while the other is emptied
_LARGEST_SLOT_BYTES = 256 << 10
_SMALLEST_SLOT_BYTES = 4096
_ALL_SLOTS_BYTES = 32 << 20  # with many ranks, slots get smaller to stay within this

# The counters of each rank in the segment. The rank itself writes them; its peers read them.
_STAGE = 0  # phases of allreduces that the rank has behind it, over all allreduces
_WANTED = 1  # and 2: the call for which the rank uses this set of blocks (``Call.code``)
_PER_PEER = 2 + _NUM_SLOTS  # counters for each peer


def _sent_to(peer: int) -> int:
    """Return the number of the counter of pieces that its rank has sent to the peer."""
    return 1 + _NUM_SETS + _PER_PEER * peer


def _taken_from(peer: int) -> int:
    """Return the number of the counter of pieces that its rank has taken from the peer."""
    return _sent_to(peer) + 1


def _sent_for(peer: int, slot: int) -> int:
    """Return the number of the counter that says for which call its rank filled a slot."""
    return _sent_to(peer) + 2 + slot


def _num_counters(size: int) -> int:
    return _sent_to(size)


class SharedMemory:
    """An allreduce in shared memory, and mailboxes between every two ranks for schedules.

    The data area holds two parts. First come two sets of blocks, one block a rank, used in turn by
    ``allreduce``. A rank writes its own block and reads all the others. No rank writes to a set
    before all ranks have entered the next use of the other set, and so has left this one. That
    spares a barrier at the end. The mailboxes follow: for every two ranks some slots, filled by the
    sender and emptied by the receiver.

    Args:
        block_bytes: size of a block.
        at_once_bytes: bytes of all ranks together up to which each rank reduces everything.

    Raises:
        As ``Segment``.
    """

    def __init__(self, group: Group, block_bytes: int, at_once_bytes: int):
        self.rank = group.rank
        self.size = group.size
        self._name = group.name
        self._block_bytes = -(-block_bytes // 128) * 128
        self._at_once_bytes = min(at_once_bytes // self.size, self._block_bytes)
        self._slot_bytes = _slot_bytes(self.size)
        blocks_bytes = _NUM_SETS * self.size * self._block_bytes
        mail_bytes = self.size**2 * _NUM_SLOTS * self._slot_bytes
        self._segment = Segment(group, _num_counters(self.size), blocks_bytes + mail_bytes)
        blocks = np.frombuffer(self._segment.data, np.uint8, blocks_bytes)
        self._blocks = blocks.reshape(_NUM_SETS, self.size, self._block_bytes)
        self._torch_blocks = torch.from_numpy(self._blocks)
        mail = np.frombuffer(self._segment.data, np.uint8, mail_bytes, blocks_bytes)
        # Shape: sender, receiver, slot, byte.
        self._mail = torch.from_numpy(
            mail.reshape(self.size, self.size, _NUM_SLOTS, self._slot_bytes)
        )
        # Overflow is as silent as torch's. A context that keeps this setting is entered in 0.1 us,
        # numpy's errstate in 2.4.
        self._quietly = contextvars.Context()
        self._quietly.run(np.seterr, all="ignore")
        # All of the following belong to this rank alone.
        self._call = 0  # this rank's present call, as ``Call.code``
        self._stage = 0  # the value of this rank's counter _STAGE
        self._num_uses = 0  # how often a set of blocks was used; all ranks count alike
        self._views: dict[Any, list[Any]] = {}  # the blocks of each set and rank, by dtype
        self._outgoing: dict[int, deque[_Parcel]] = {}  # by receiver, in the order of the starts
        self._incoming: dict[int, deque[_Parcel]] = {}  # by sender, likewise
        self._num_sent = [0] * self.size  # pieces put into the mailbox of each peer
        self._num_taken = [0] * self.size  # pieces taken from each peer
        self._taken_from_me = _taken_from(self.rank)
        self._sent_to_me = _sent_to(self.rank)

    def announce(self, call: Call) -> None:
        """Take this rank's next call. See ``Comparing.announce``."""
        self._call = call.code()

    def _check_same(self, rank: int, wanted: int) -> None:
        """Raise RuntimeError unless a rank makes the same call as this one."""
        if wanted != self._call:
            raise mismatch(self._name(self.rank), self._call, self._name(rank), wanted)

    # The allreduce

    def allreduce(self, tensor: Tensor, reduce: Reduce) -> None:
        """Reduce a tensor over all ranks, in place. Collective.

        Each rank owns a slice of every block, reduces it, and offers the result (the schedule
        ``direct``). Of a small tensor, every rank reads and reduces everything, in the same order,
        after one wait instead of two.

        Blocks are small enough to stay in the caches. More ranks do not have more cache, so the
        size of a block does not depend on their number.

        Args:
            tensor: one-dimensional, contiguous, on the CPU; the same dtype and number of elements
                on every rank.
            reduce: associative and commutative.

        Raises:
            TimeoutError: a rank is late; names it.
            ConnectionError: a rank is gone; names it.
            RuntimeError: a rank makes another call; names both calls.
        """
        dtype = _NUMPY_DTYPES.get(tensor.dtype)
        flat: Any = tensor
        operation: Any = reduce
        copy: Callable[[Any, Any], None] = _copy_tensor
        if dtype is not None and reduce in _NUMPY_OPERATIONS:
            flat = _array(tensor, dtype)
            operation = _NUMPY_OPERATIONS[reduce]
            copy = np.copyto
            views = self._blocks_of(dtype)
        else:
            views = self._blocks_of(tensor.dtype)
        if tensor.nbytes <= self._at_once_bytes:
            self._quietly.run(self._reduce_at_once, flat, operation, views, copy)
            return
        # Equal blocks: a short last one would cost as much waiting as a full one.
        count = len(flat)
        num_blocks = -(-tensor.nbytes // self._block_bytes)
        for index in range(num_blocks):
            block = flat[index * count // num_blocks : (index + 1) * count // num_blocks]
            self._quietly.run(self._reduce_by_slices, block, operation, views, copy)

    def _reduce_at_once(self, flat: Any, operation: Any, views: list[Any], copy: Any) -> None:
        """Reduce a small block: every rank reduces all of it.

        1. Copy this rank's values into its block, and say so.
        2. Wait until every rank has.
        3. Reduce the blocks of all ranks, in the order of the ranks.
        """
        count = len(flat)
        wanted = self._want()
        blocks = views[self._num_uses & 1]
        self._num_uses += 1
        copy(blocks[self.rank][:count], flat)
        self._stage += 1
        self._segment.write(_STAGE, self._stage)
        for distance in range(1, self.size):
            rank = (self.rank + distance) % self.size
            self._segment.wait(rank, _STAGE, self._stage)
            self._check_same(rank, self._segment.read(rank, wanted))
        operation(blocks[0][:count], blocks[1][:count], out=flat)
        for rank in range(2, self.size):
            operation(flat, blocks[rank][:count], out=flat)

    def _reduce_by_slices(self, flat: Any, operation: Any, views: list[Any], copy: Any) -> None:
        """Reduce a block: every rank reduces its slice.

        1. Copy the slices that others reduce into this rank's block, and say so.
        2. Take this rank's slice from each other rank as soon as that rank has done step 1.
        3. Offer the sum, and say so.
        4. Take the sum of each other slice as soon as its rank has done step 3.
        """
        count = len(flat)
        size = self.size
        me = self.rank
        segment = self._segment
        wanted = self._want()
        blocks = views[self._num_uses & 1]
        self._num_uses += 1
        edges = [rank * count // size for rank in range(size + 1)]
        low, high = edges[me], edges[me + 1]
        my_block = blocks[me]
        # Others reduce everything except this rank's own slice, which stays where it is.
        if low:
            copy(my_block[:low], flat[:low])
        if high < count:
            copy(my_block[high:count], flat[high:])
        segment.write(_STAGE, self._stage + 1)
        my_slice = flat[low:high]
        for distance in range(1, size):
            rank = (me + distance) % size
            segment.wait(rank, _STAGE, self._stage + 1)
            self._check_same(rank, segment.read(rank, wanted))
            added = blocks[rank][low:high]
            operation(my_slice, added, out=my_slice)
        # The sum takes the place of the slice that was added last: this core has just fetched it,
        # and nobody else needs it. It lies in the block of the rank before this one.
        copy(added, my_slice)
        self._stage += 2
        segment.write(_STAGE, self._stage)
        for distance in range(1, size):
            rank = (me + distance) % size
            segment.wait(rank, _STAGE, self._stage)
            low, high = edges[rank], edges[rank + 1]
            copy(flat[low:high], blocks[rank - 1][low:high])

    def _want(self) -> int:
        """Write this rank's call beside the next set of blocks; return the counter's number."""
        counter = _WANTED + (self._num_uses & 1)
        self._segment.put(counter, self._call)
        return counter

    def _blocks_of(self, dtype: Any) -> list[Any]:
        """Return the blocks, by set and rank, as numpy's arrays or torch's tensors of a dtype."""
        views = self._views.get(dtype)
        if views is None:
            blocks: Any = self._torch_blocks if isinstance(dtype, torch.dtype) else self._blocks
            views = []
            for number in range(_NUM_SETS):
                views.append([blocks[number][rank].view(dtype) for rank in range(self.size)])
            self._views[dtype] = views
        return views

    # The mailboxes

    def start(self, sends: Sequence[tuple[int, Tensor]], receives: Sequence[Receive]) -> Wait:
        """Start to send and receive at once. See ``Transport.start``."""
        sends = apart(sends, receives)
        parcels = []
        for peer, tensor in sends:
            parcel = _Parcel(peer, tensor.view(torch.uint8), None, None)
            parcels.append(parcel)
            self._outgoing.setdefault(peer, deque()).append(parcel)
        earlier = None
        for receive in receives:
            # One after the other: a sum must not depend on which sender was faster.
            earlier = _Parcel(receive.src, receive.into, receive.reduce, earlier)
            parcels.append(earlier)
            self._incoming.setdefault(receive.src, deque()).append(earlier)
        self._progress()

        def wait() -> None:
            while unfinished := [parcel for parcel in parcels if not parcel.done]:
                if not self._progress():
                    self._wait_for_progress(unfinished)

        return wait

    def _wait_for_progress(self, unfinished: list["_Parcel"]) -> None:
        """Wait until anything can be moved, watching the peers that could move it."""
        # A message that waits behind another one may be here already, and its sender gone.
        peers = {parcel.peer for parcel in unfinished if parcel.is_first()}
        patience = Patience(self._segment, tuple(sorted(peers)))
        while not self._progress():
            patience.pause()

    def _progress(self) -> bool:
        """Move everything that can be moved now. Return True if anything was."""
        moved = False
        for peer, queue in self._outgoing.items():
            while queue and self._slot_is_free(peer):
                self._send_piece(peer, queue)
                moved = True
        for peer, queue in self._incoming.items():
            while queue and self._piece_is_there(peer) and queue[0].is_first():
                self._take_piece(peer, queue)
                moved = True
        return moved

    def _slot_is_free(self, peer: int) -> bool:
        """Return True if the peer has emptied a slot of the mailbox that this rank fills."""
        num_emptied = self._segment.read(peer, self._taken_from_me)
        return self._num_sent[peer] - num_emptied < _NUM_SLOTS

    def _piece_is_there(self, peer: int) -> bool:
        """Return True if the peer has filled a slot that this rank has not emptied yet."""
        return self._segment.read(peer, self._sent_to_me) > self._num_taken[peer]

    def _send_piece(self, peer: int, queue: deque["_Parcel"]) -> None:
        """Copy the next piece of the first parcel into a free slot, and say so."""
        parcel = queue[0]
        piece = parcel.data[parcel.position : parcel.position + self._slot_bytes]
        num_sent = self._num_sent[peer]
        slot = num_sent % _NUM_SLOTS
        self._mail[self.rank, peer, slot, : piece.numel()] = piece
        self._segment.put(_sent_for(peer, slot), self._call)
        self._num_sent[peer] = num_sent + 1
        self._segment.write(_sent_to(peer), num_sent + 1)
        parcel.advance(piece.numel(), queue)

    def _take_piece(self, peer: int, queue: deque["_Parcel"]) -> None:
        """Take the next piece of the first parcel out of its slot, and say so."""
        parcel = queue[0]
        num_elements = self._slot_bytes // parcel.data.element_size()
        into = parcel.data[parcel.position : parcel.position + num_elements]
        num_taken = self._num_taken[peer]
        slot = num_taken % _NUM_SLOTS
        self._check_same(peer, self._segment.read(peer, _sent_for(self.rank, slot)))
        received = self._mail[peer, self.rank, slot, : into.nbytes].view(into.dtype)
        if parcel.reduce is None:
            into.copy_(received)
        else:
            parcel.reduce(into, received, out=into)
        self._num_taken[peer] = num_taken + 1
        self._segment.write(_taken_from(peer), num_taken + 1)
        parcel.advance(into.numel(), queue)

    def limit(self, timeout: timedelta) -> None:
        """Change the group's timeout. See ``Transport.limit``."""
        self._segment.timeout_s = timeout.total_seconds()

    def close(self) -> None:
        """Give the memory back. Not collective."""
        self._views.clear()
        del self._blocks, self._torch_blocks, self._mail
        self._segment.close()


class _Parcel:
    """A message under way, moved in pieces of a mailbox slot.

    Args:
        data: the tensor to send, as bytes; or the tensor to receive into.
        reduce: how a received piece is reduced into ``data``; None: it replaces it.
        earlier: the parcel that must be received completely before this one.
    """

    __slots__ = ("data", "done", "earlier", "peer", "position", "reduce")

    def __init__(self, peer: int, data: Tensor, reduce: Reduce | None, earlier: "_Parcel | None"):
        self.peer = peer
        self.data = data
        self.reduce = reduce
        self.earlier = earlier
        self.position = 0  # elements that have been moved
        self.done = False

    def is_first(self) -> bool:
        """Return True if no other parcel must be received before this one."""
        return self.earlier is None or self.earlier.done

    def advance(self, count: int, queue: deque["_Parcel"]) -> None:
        """Note that ``count`` elements were moved. A finished parcel leaves its queue."""
        self.position += count
        if self.position == self.data.numel():
            self.done = True
            queue.popleft()


def _slot_bytes(size: int) -> int:
    """Return the size of a mailbox slot for this many ranks."""
    # Whole cache lines of 64 bytes.
    share = _ALL_SLOTS_BYTES // (_NUM_SLOTS * size**2) // 64 * 64
    return max(_SMALLEST_SLOT_BYTES, min(_LARGEST_SLOT_BYTES, share))


def _array(tensor: Tensor, dtype: Any) -> np.ndarray:
    """Return the elements of a contiguous tensor, for as long as the caller holds the tensor.

    ``Tensor.numpy`` would keep the tensor's storage from being resized ever after.
    """
    memory: Any = (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())
    return np.frombuffer(memory, dtype)


def _copy_tensor(into: Tensor, source: Tensor) -> None:
    into.copy_(source)


def transport(
    group: Group,
    *,
    block_bytes: Annotated[int, Ge(4096)] = 1_048_576,
    at_once_bytes: Annotated[int, Ge(0)] = 524_288,
) -> Transport:
    """Connect the ranks of one host. Collective.

    Args:
        group: the ranks.
        block_bytes: size of the part of a tensor that all ranks together reduce at a time.
        at_once_bytes: bytes of all ranks together up to which each rank reduces everything.

    Raises:
        UserError: the ranks lie on several hosts, or as ``Segment``.
    """
    group = introduced(group)
    num_hosts = len({member.host for member in group.members})
    # Emulated hosts have one kernel: it would work, and bypass the network that is being emulated.
    if num_hosts > 1:
        raise UserError(
            "transport: 'shared_memory' joins ranks of one host,"
            f" these lie on {num_hosts} (allowed: auto, mixed, gloo)"
        )
    return SharedMemory(group, block_bytes, at_once_bytes)
