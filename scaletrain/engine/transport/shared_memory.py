"""Memory shared by the ranks of one host: no copies through the kernel, nothing left over."""

from collections import deque
from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge
from torch import Tensor

from scaletrain.engine import blocks
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

_NUM_SLOTS = 2  # of a mailbox: one is filled while the other is emptied
_LARGEST_SLOT_BYTES = 256 << 10
_SMALLEST_SLOT_BYTES = 4096
_ALL_SLOTS_BYTES = 32 << 20  # with many ranks, slots get smaller to stay within this

_PER_PEER = 2  # counters for each peer, after those of the blocks


def _sent_to(peer: int, size: int) -> int:
    """Return the number of the counter of pieces that its rank has sent to the peer.

    The words beside it say for which call each slot was filled (``Call.words``).
    """
    return blocks.num_counters(size) + _PER_PEER * peer


def _taken_from(peer: int, size: int) -> int:
    """Return the number of the counter of pieces that its rank has taken from the peer."""
    return _sent_to(peer, size) + 1


class SharedMemory:
    """Collectives in shared memory, and mailboxes between every two ranks for schedules.

    The data area holds the blocks of the collectives (``Blocks``). The mailboxes follow: for every
    two ranks some slots, filled by the sender and emptied by the receiver.

    Args:
        block_bytes: size of a block.
        at_once_bytes: bytes of all ranks together up to which each rank reduces everything.

    Raises:
        As ``Segment``.
    """

    def __init__(self, group: Group, block_bytes: int, at_once_bytes: int):
        self.rank = group.rank
        self.size = size = group.size
        self._name = group.name
        block_bytes = -(-block_bytes // 128) * 128
        self._slot_bytes = _slot_bytes(size)
        blocks_bytes = blocks.num_bytes(size, block_bytes)
        mail_bytes = size**2 * _NUM_SLOTS * self._slot_bytes
        num_counters = blocks.num_counters(size) + _PER_PEER * size
        self._segment = Segment(group, num_counters, blocks_bytes + mail_bytes)
        self._blocks = blocks.Blocks(
            self._segment,
            np.frombuffer(self._segment.data, np.uint8, blocks_bytes),
            block_bytes,
            min(at_once_bytes // size, block_bytes),
            group.name,
        )
        mail = np.frombuffer(self._segment.data, np.uint8, mail_bytes, blocks_bytes)
        # Shape: sender, receiver, slot, byte.
        self._mail = torch.from_numpy(mail.reshape(size, size, _NUM_SLOTS, self._slot_bytes))
        # All of the following belong to this rank alone.
        self._call = (0, 0)  # this rank's present call, as ``Call.words``
        self._outgoing: dict[int, deque[_Parcel]] = {}  # by receiver, in the order of the starts
        self._incoming: dict[int, deque[_Parcel]] = {}  # by sender, likewise
        self._num_sent = [0] * size  # pieces put into the mailbox of each peer
        self._num_taken = [0] * size  # pieces taken from each peer
        self._taken_from_me = _taken_from(self.rank, size)
        self._sent_to_me = _sent_to(self.rank, size)
        self.allreduce = self._blocks.allreduce
        self.exchange = self._blocks.exchange

    def announce(self, call: Call) -> None:
        """Take this rank's next call. See ``Comparing.announce``."""
        self._call = call.words()
        self._blocks.announce(self._call)

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
        counter = _sent_to(peer, self.size)
        words = self._segment.words
        place = self._segment.place(self.rank, counter) + _of_slot(slot)
        words[place], words[place + 1] = self._call
        self._num_sent[peer] = num_sent + 1
        self._segment.write(counter, num_sent + 1)
        parcel.advance(piece.numel(), queue)

    def _take_piece(self, peer: int, queue: deque["_Parcel"]) -> None:
        """Take the next piece of the first parcel out of its slot, and say so."""
        parcel = queue[0]
        num_elements = self._slot_bytes // parcel.data.element_size()
        into = parcel.data[parcel.position : parcel.position + num_elements]
        num_taken = self._num_taken[peer]
        slot = num_taken % _NUM_SLOTS
        self._check_same(peer, slot)
        received = self._mail[peer, self.rank, slot, : into.nbytes].view(into.dtype)
        if parcel.reduce is None:
            into.copy_(received)
        else:
            parcel.reduce(into, received, out=into)
        self._num_taken[peer] = num_taken + 1
        self._segment.write(_taken_from(peer, self.size), num_taken + 1)
        parcel.advance(into.numel(), queue)

    def _check_same(self, peer: int, slot: int) -> None:
        """Raise RuntimeError unless the peer filled a slot for this rank's present call."""
        place = self._segment.place(peer, self._sent_to_me) + _of_slot(slot)
        wanted = self._segment.words[place], self._segment.words[place + 1]
        if wanted != self._call:
            mine, other = Call.of_words(*self._call), Call.of_words(*wanted)
            raise mismatch(mine, other, self._name(self.rank), self._name(peer))

    def limit(self, timeout: timedelta) -> None:
        """Change the group's timeout. See ``Transport.limit``."""
        self._segment.timeout_s = timeout.total_seconds()

    def close(self) -> None:
        """Give the memory back. Not collective."""
        self._blocks.close()
        del self._mail
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


def _of_slot(slot: int) -> int:
    """Return which of the words beside a counter are a slot's."""
    return 1 + 2 * slot


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
