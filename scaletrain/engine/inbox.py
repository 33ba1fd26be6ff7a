"""One rank's inbox: memory of this host into which every other rank writes messages for it.

For each peer there are some slots, filled by the peer and emptied by the owner in turn. So one
process writes each word, apart from the bell. Like ``segment``, it relies on stores becoming
visible in program order: who sees a counter's new value sees the slot that was filled before.
"""

import ctypes
import mmap
import os
import threading
from typing import NamedTuple

from scaletrain.engine import segment
from scaletrain.host import shared_memory

NUM_SLOTS = 8  # of a peer: one is emptied while others are filled
_LARGEST_SLOT_BYTES = 256 << 10
_SMALLEST_SLOT_BYTES = 4096
_ALL_INBOXES_BYTES = 64 << 20  # with many ranks, slots get smaller to stay within this

_LINE = 8  # words of 64 bits in a cache line
_WORD_BYTES = 8
_LINE_BYTES = _LINE * _WORD_BYTES

# The lines at the beginning of an inbox, by their first word.
_BELL = 0  # by any peer that has done anything; see ``ring``
_SLEEPERS = _LINE  # by the owner: how many of its threads sleep until the bell changes
_PEERS = 2 * _LINE  # two lines for each peer follow, then a line for each of its slots
# By the peer: slots it has filled, its process, its own inbox's descriptor there, bells rung.
_FILLED, _PID, _DESCRIPTOR, _RUNG = 0, 1, 2, 3
# By the owner: slots it has emptied, bytes sent unasked that have found a receiver (``Messages``).
_EMPTIED, _CREDIT = _LINE, _LINE + 1
_HEADERS = 2 * _LINE  # of the slots
_LINES_PER_PEER = 2 + NUM_SLOTS
# A peer that sleeps until there is room has filled all slots. It is woken when so many are left.
_WAKE_AT = NUM_SLOTS // 2


class Entry(NamedTuple):
    """One slot's content."""

    kind: int
    message: int  # the sender's number of the message
    tag: int
    num_bytes: int  # of the whole message
    address: int  # of the slot's data in this process


class _Memory:
    """An inbox's memory.

    Args:
        memory: of ``num_bytes`` bytes.
        size: number of ranks.

    Attributes:
        slot_bytes: the largest piece of a message.
    """

    def __init__(self, memory: mmap.mmap, size: int):
        self.slot_bytes = slot_bytes(size)
        self._size = size
        # As long as these words exist, the memory stays at its address.
        self._words = memoryview(memory).cast("Q")
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._data = self._address + _header_bytes(size)

    def _place(self, peer: int) -> int:
        """Return where a peer's lines begin among the words."""
        return _PEERS + peer * _LINES_PER_PEER * _LINE

    def _slot(self, peer: int, slot: int) -> int:
        """Return the address of a slot's data."""
        return self._data + (peer * NUM_SLOTS + slot) * self.slot_bytes


class Inbox(_Memory):
    """An inbox as its owner sees it."""

    def __init__(self, memory: mmap.mmap, size: int):
        super().__init__(memory, size)
        self._places = [self._place(peer) for peer in range(size)]
        # Threads of this rank that sleep until the bell rings, counted under _counting.
        self._counting = threading.Lock()
        self._num_sleepers = 0

    def next_entry(self, peer: int) -> Entry | None:
        """Return what the peer wrote first of what is not taken yet; None: nothing is there."""
        words = self._words
        place = self._places[peer]
        emptied = words[place + _EMPTIED]
        if words[place + _FILLED] == emptied:
            return None
        slot = emptied % NUM_SLOTS
        header = place + _HEADERS + slot * _LINE
        kind, message, tag, num_bytes = words[header : header + 4]
        return Entry(kind, message, tag, num_bytes, self._slot(peer, slot))

    def take(self, peer: int) -> bool:
        """Give the slot of ``next_entry`` back. Return True if it is time to wake the peer."""
        words = self._words
        place = self._places[peer]
        emptied = words[place + _EMPTIED] + 1
        words[place + _EMPTIED] = emptied
        return words[place + _FILLED] - emptied == _WAKE_AT

    def give_credit(self, peer: int, num_bytes: int) -> None:
        """Note that the peer may send so many bytes more unasked."""
        self._words[self._places[peer] + _CREDIT] += num_bytes

    def handle_of(self, peer: int) -> shared_memory.Handle | None:
        """Return where the peer's own inbox is; None: it has not introduced itself."""
        place = self._places[peer]
        pid, descriptor = self._words[place + _PID], self._words[place + _DESCRIPTOR]
        return shared_memory.Handle(pid, descriptor, num_bytes(self._size)) if pid else None

    @property
    def bell(self) -> int:
        """Return a number that is another one after a peer has done anything."""
        return self._words[_BELL]

    def spin(self, seen: int, times: int) -> None:
        """Look at the bell so often, or until it is no longer ``seen``."""
        words = self._words
        for _ in range(times):
            if words[_BELL] != seen:
                return

    def sleep(self, seen: int) -> None:
        """Sleep until the bell is no longer ``seen``, or until a few milliseconds have passed."""
        self._count_sleepers(1)
        segment.sleep_on(self._address, seen)
        self._count_sleepers(-1)

    def _count_sleepers(self, change: int) -> None:
        with self._counting:
            self._num_sleepers += change
            self._words[_SLEEPERS] = self._num_sleepers


class Outbox(_Memory):
    """A rank's own slots in the inbox of a peer.

    Args:
        rank: this rank.
    """

    def __init__(self, memory: mmap.mmap, size: int, rank: int):
        super().__init__(memory, size)
        self._rank = rank
        self._mine = self._place(rank)

    def introduce(self, handle: shared_memory.Handle) -> None:
        """Note where this rank's own inbox is, before the first slot is filled."""
        self._words[self._mine + _DESCRIPTOR] = handle.descriptor
        self._words[self._mine + _PID] = handle.pid

    def has_room(self) -> bool:
        """Return True if a slot is empty."""
        words = self._words
        return words[self._mine + _FILLED] - words[self._mine + _EMPTIED] < NUM_SLOTS

    def credit(self) -> int:
        """Return the bytes that found a receiver, of those that this rank sent unasked."""
        return self._words[self._mine + _CREDIT]

    def put(self, entry: Entry, length: int) -> None:
        """Fill an empty slot, and ring the bell.

        Args:
            entry: its ``address`` is that of the data.
            length: of the data in bytes.
        """
        words = self._words
        mine = self._mine
        filled = words[mine + _FILLED]
        slot = filled % NUM_SLOTS
        if length:
            ctypes.memmove(self._slot(self._rank, slot), entry.address, length)
        header = mine + _HEADERS + slot * _LINE
        words[header] = entry.kind
        words[header + 1] = entry.message
        words[header + 2] = entry.tag
        words[header + 3] = entry.num_bytes
        words[mine + _FILLED] = filled + 1
        self.ring()

    def ring(self, wake: bool = True) -> None:
        """Ring the bell: the peer's threads look again, those that sleep only if ``wake``.

        Several ranks may write the bell at once. Each number is written once, so that the bell
        differs from what a sleeper saw before, whichever of them stays.
        """
        words = self._words
        rung = words[self._mine + _RUNG] + 1
        words[self._mine + _RUNG] = rung
        words[_BELL] = rung * self._size + self._rank
        if wake and words[_SLEEPERS]:
            segment.wake(self._address)


def create(size: int) -> tuple[Inbox, shared_memory.Handle]:
    """Create this rank's inbox. The caller closes the descriptor when nobody opens it any more.

    Raises:
        OSError: there is no room (ENOSPC, ENOMEM).
    """
    handle = shared_memory.create(num_bytes(size), reserve=True)
    try:
        return Inbox(shared_memory.map_created(handle), size), handle
    except OSError:
        os.close(handle.descriptor)
        raise


def open_outbox(handle: shared_memory.Handle, size: int, rank: int) -> Outbox:
    """Open a peer's inbox, for this rank's messages.

    Raises:
        OSError: it cannot be reached; FileNotFoundError: the peer has ended.
        ValueError: the handle names something else.
    """
    return Outbox(shared_memory.map_opened(handle, write=True), size, rank)


def slot_bytes(size: int) -> int:
    """Return the size of a slot for this many ranks, whole cache lines."""
    share = _ALL_INBOXES_BYTES // (NUM_SLOTS * size**2) // _LINE_BYTES * _LINE_BYTES
    return max(_SMALLEST_SLOT_BYTES, min(_LARGEST_SLOT_BYTES, share))


def num_bytes(size: int) -> int:
    """Return the size of an inbox for this many ranks."""
    return _header_bytes(size) + size * NUM_SLOTS * slot_bytes(size)


def _header_bytes(size: int) -> int:
    lines = _PEERS // _LINE + size * _LINES_PER_PEER
    return -(-lines * _LINE_BYTES // mmap.PAGESIZE) * mmap.PAGESIZE
