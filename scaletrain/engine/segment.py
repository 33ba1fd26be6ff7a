"""Memory that the ranks of one host share: counters to wait on, and room for data.

Rank 0 creates the memory (``host.shared_memory``) and tells the others through the store where it
is. Each counter belongs to one rank, which alone writes it; every other rank may read it and wait
for it. Counters rely on stores becoming visible in program order, which x86-64 guarantees and other
processors do not: a rank that sees a counter's new value sees all the data written before it.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import platform
import time
from typing import Protocol

from scaletrain.engine.meeting import introduced, is_alive, lost, ranks_in_words, wait_for_keys
from scaletrain.engine.transport import Group
from scaletrain.errors import UserError
from scaletrain.host import shared_memory
from scaletrain.host.stopwatch import Stopwatch

# Words of 64 bits in a cache line. Each counter has a line for itself, so that no two ranks write
# to the same line.
_LINE = 8
_WORD_BYTES = 8

# How a rank waits. See ``Segment.wait`` and ``Patience`` for the steps.
_SPINS = 300  # looks at a counter before the core is offered to others; about 20 us
# For this long, the core is offered between looks: others compute on it. Waking a rank up costs
# tens of microseconds, so that sleeping at once would be slower.
_YIELD_S = 300e-6
# Unless the offer is accepted for as long as this: then it was not another rank that ran, but a
# process that computes (a scheduler's slice is some milliseconds), and offering costs its slice
# each time. For a while, the rank sleeps instead: a sleeper that is woken runs before such a
# process.
_NEIGHBOUR_S = 1e-3
_BESIDE_NEIGHBOURS_S = 1.0
# Then the rank sleeps, longer and longer: one that waits must not take a core from one that
# computes.
_SHORTEST_SLEEP_S = 20e-6
_LONGEST_SLEEP_S = 1e-3
_SLEEP_GROWTH = 1.2
_NAP_S = 2e-3  # the longest sleep that a lost wake-up can cost
_CHECK_ALIVE_S = 0.1  # how often a rank that waits long checks whether its peer is alive

# The numbers on x86-64 of the system call ``futex`` and of two of its operations.
_FUTEX = 202
_FUTEX_WAIT = 0
_FUTEX_WAKE = 1
_EVERYBODY = 1 << 30  # wakes all sleepers: more than there are

_libc = ctypes.CDLL(None)  # ctypes releases the interpreter lock during a call
_sched_yield = _libc.sched_yield


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_NAP = ctypes.byref(_Timespec(0, int(_NAP_S * 1e9)))


def sleep_on(address: int, seen: int) -> None:
    """Sleep until ``wake`` is called on a word, or until a few milliseconds have passed.

    Args:
        address: of a word of 64 bits in shared memory.
        seen: the word's value as the caller saw it. If it has changed since, nobody sleeps.
    """
    expected = ctypes.c_uint32(seen & 0xFFFFFFFF)
    _libc.syscall(_FUTEX, ctypes.c_void_p(address), _FUTEX_WAIT, expected, _NAP, None, 0)


def wake(address: int) -> None:
    """Wake everybody who sleeps on a word, in whichever process."""
    _libc.syscall(_FUTEX, ctypes.c_void_p(address), _FUTEX_WAKE, _EVERYBODY, None, None, 0)


def have_a_core_each(group: Group) -> bool:
    """Return True if there are at least as many cores as ranks. The members must be known."""
    # Each rank may be bound to a core of its own and sees that one only.
    cores = {core for member in group.members for core in member.cores}
    return len(cores) >= group.size


def num_spins(group: Group) -> int:
    """Return how often a rank looks at a word before it offers its core to others."""
    # With fewer cores than ranks, spinning keeps the very rank from running that this one waits
    # for: the core is offered at once.
    return _SPINS if have_a_core_each(group) else 1


class Segment:
    """Counters of every rank, and data, in memory that all ranks of a host share. Collective.

    The memory begins with one row of cache lines for each rank: first a flag that says whether the
    rank sleeps, then its counters. A rank writes its own row alone and reads all the others. The
    data follows at the next page.

    Args:
        group: ranks of one host.
        num_counters: counters of each rank, all 0 at first.
        num_bytes: size of the data, all zeros at first.

    Attributes:
        data: the data, to be divided up by its user.
        words: all rows as words of 64 bits. A counter is the first word of its cache line
            (``place``). The other seven are its rank's, too: what they say is visible before a
            later value of the counter.
        a_core_each: there are at least as many cores as ranks.

    Raises:
        UserError: this machine has no such memory, or too little of it; on every rank.
        TimeoutError: some ranks did not come in time; names them.
        ConnectionError: rank 0 ended, or the store is gone.
    """

    def __init__(self, group: Group, num_counters: int, num_bytes: int):
        if not shared_memory.SUPPORTED:
            raise UserError(
                "transport 'shared_memory': needs Linux on x86-64"
                f" (this is {platform.machine()}); use gloo"
            )
        self.rank = group.rank
        self.size = group.size
        self.timeout_s = group.timeout.total_seconds()
        group = introduced(group)
        self._group = group
        self._words_per_rank = (1 + num_counters) * _LINE
        counters_bytes = _whole_pages(_WORD_BYTES * self._words_per_rank * self.size)
        self._map = _map(group, counters_bytes + num_bytes)
        self.words = memoryview(self._map)[:counters_bytes].cast("Q")
        self.data = memoryview(self._map)[counters_bytes:]
        # As long as this exists, the memory stays at its address.
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self._address = ctypes.addressof(self._anchor)
        # Where each rank's flag lies. It is 1 while the rank sleeps: that rank writes it, and every
        # rank that changes a counter reads it.
        self._sleeps = [rank * self._words_per_rank for rank in range(self.size)]
        self._others_sleep = [*self._sleeps]
        del self._others_sleep[self.rank]
        self.a_core_each = have_a_core_each(group)
        self._spins = num_spins(group)
        # Until then, processes of others compute on this rank's core. Its thread alone uses it.
        self.neighbours_until = 0.0  # as ``time.monotonic``

    def place(self, rank: int, counter: int) -> int:
        """Return where a rank's counter lies among the words."""
        return rank * self._words_per_rank + (1 + counter) * _LINE

    def write(self, counter: int, value: int) -> None:
        """Set one of this rank's counters, and wake the ranks that sleep.

        A rank that sees the value also sees everything written to ``data`` before.
        """
        words = self.words
        place = self.rank * self._words_per_rank + (1 + counter) * _LINE
        words[place] = value
        for other in self._others_sleep:
            if words[other]:
                wake(self._address + _WORD_BYTES * place)
                return

    def read(self, rank: int, counter: int) -> int:
        """Return the present value of a rank's counter."""
        return self.words[self.place(rank, counter)]

    def wait(self, rank: int, counter: int, value: int) -> None:
        """Wait until a rank's counter is at least ``value``.

        1. Look at the counter some hundred times (once, with fewer cores than ranks).
        2. Be patient: offer the core, then sleep until the counter changes (``Patience``).

        Raises:
            TimeoutError: the rank is late; names it.
            ConnectionError: the rank's process has ended; names it.
        """
        words = self.words
        place = rank * self._words_per_rank + (1 + counter) * _LINE
        for _ in range(self._spins):
            if words[place] >= value:
                return
        patience = Patience(self, (rank,))
        while (seen := words[place]) < value:
            patience.pause(_WORD_BYTES * place, seen)

    def sleep(self, place: int, seen: int) -> None:
        """Sleep until a word is no longer ``seen``, or until a few milliseconds have passed.

        The processor may let this rank's look at the word overtake its going to sleep. The wake-up
        is then lost, and the time limit ends the sleep.

        Args:
            place: the word's place in bytes from the start of the memory.
            seen: its value as the caller saw it.
        """
        flag = self._sleeps[self.rank]
        self.words[flag] = 1
        sleep_on(self._address + place, seen)
        self.words[flag] = 0

    def check_alive(self, rank: int) -> None:
        """Raise ConnectionError if the rank's process has ended."""
        if not is_alive(self._group, rank):
            raise lost(self._group, rank)

    def check_not_ended(self) -> None:
        """Raise ConnectionError if this rank has ended the group."""
        self._group.check_not_ended()

    def late(self, ranks: tuple[int, ...]) -> TimeoutError:
        """Return the error that says these ranks did not answer in time."""
        late_ranks = ranks_in_words(self._group.name(rank) for rank in ranks)
        return TimeoutError(f"{late_ranks} did not answer: timed out after {self.timeout_s:g} s")

    def close(self) -> None:
        """Give the memory back. Not collective: the other ranks keep theirs."""
        del self._anchor
        self.words.release()
        # Tensors may still look into the data: the memory then goes with them.
        with contextlib.suppress(BufferError):
            self.data.release()
            self._map.close()


class Watched(Protocol):
    """What a patient wait asks about the ranks and the memory (``Segment``)."""

    timeout_s: float
    neighbours_until: float

    def sleep(self, place: int, seen: int) -> None:
        """Sleep until a word is no longer ``seen``."""

    def check_alive(self, rank: int) -> None:
        """Raise ConnectionError if the rank's process has ended."""

    def check_not_ended(self) -> None:
        """Raise ConnectionError if this rank has ended the group."""

    def late(self, ranks: tuple[int, ...]) -> TimeoutError:
        """Return the error that says these ranks did not answer in time."""


class Patience:
    """One long wait for other ranks: it costs little, and notices ranks that are gone or late.

    Each ``pause`` is one of these, by how long nothing has moved:

    1. In the first moments, offer the core and come back; unless others compute on it.
    2. After that, sleep: until the counter changes, or longer and longer.

    Ten times a second, it looks whether the ranks' processes are alive and the time is over.

    Args:
        ranks: the ranks of the segment that this rank waits for.
    """

    def __init__(self, segment: Watched, ranks: tuple[int, ...]):
        self._segment = segment
        self._ranks = ranks
        self._stopwatch = Stopwatch()  # of the wait, without pauses of the whole job
        self._moved_at = time.monotonic()  # when anything moved
        self._checked_s = 0.0  # when the ranks were last looked at, since the wait began
        self._sleep_s = _SHORTEST_SLEEP_S
        self._gone: ConnectionError | None = None

    def moved(self) -> None:
        """Note that something has moved, though not yet what this rank waits for.

        Raises:
            TimeoutError, ConnectionError: as ``pause``.
        """
        if self._gone:
            raise self._gone
        self._moved_at = time.monotonic()
        self._look()

    def pause(self, place: int = -1, seen: int = 0) -> None:
        """Pause once.

        Args:
            place: of a word; its change ends the pause at once (see ``Segment.sleep``); -1: none.
            seen: the word's value as the caller saw it.

        Raises:
            TimeoutError: one of the ranks is late.
            ConnectionError: one of the ranks is gone. The pause after the discovery raises it, so
                that the caller checks the word once more: the rank may have done its part before it
                ended.
        """
        if self._gone:
            raise self._gone
        now = time.monotonic()
        segment = self._segment
        if now - self._moved_at < _YIELD_S and now > segment.neighbours_until:
            _sched_yield()
            if time.monotonic() - now > _NEIGHBOUR_S:
                segment.neighbours_until = now + _BESIDE_NEIGHBOURS_S
        elif place >= 0:
            segment.sleep(place, seen)
        else:
            time.sleep(self._sleep_s)
            self._sleep_s = min(_SLEEP_GROWTH * self._sleep_s, _LONGEST_SLEEP_S)
        self._look()

    def _look(self) -> None:
        """Look whether the ranks live and the time is over, if that was not done just now."""
        waited_s = self._stopwatch.look()
        if waited_s - self._checked_s > _CHECK_ALIVE_S:
            self._checked_s = waited_s
            self._segment.check_not_ended()
            self._check_alive()
            if waited_s > self._segment.timeout_s:
                raise self._segment.late(self._ranks)

    def _check_alive(self) -> None:
        try:
            for rank in self._ranks:
                self._segment.check_alive(rank)
        except ConnectionError as error:
            self._gone = error


def _map(group: Group, num_bytes: int) -> mmap.mmap:
    """Map memory that rank 0 creates. Collective.

    1. Rank 0 creates it and writes its place to the store, or the reason why there is none.
    2. The others open and map it.
    3. When all have, rank 0 closes its descriptor.
    """
    if group.rank > 0:
        mapped = _map_of_rank_0(group, num_bytes)
        group.store.set(f"mapped/{group.rank}", "")
        return mapped
    created = _create(group, num_bytes)
    try:
        mapped = shared_memory.map_created(created)
        others = range(1, group.size)
        if others:
            wait_for_keys(group, [f"mapped/{rank}" for rank in others], others)
    finally:
        os.close(created.descriptor)
    return mapped


def _create(group: Group, num_bytes: int) -> shared_memory.Handle:
    try:
        created = shared_memory.create(num_bytes, reserve=True)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise
        message = (
            f"transport 'shared_memory': no room for {num_bytes:,} bytes of shared memory;"
            " use gloo, or fewer ranks a host"
        )
        group.store.set("segment", f"! {message}")
        raise UserError(message) from None
    group.store.set("segment", f"{created.pid} {created.descriptor}")
    return created


def _map_of_rank_0(group: Group, num_bytes: int) -> mmap.mmap:
    wait_for_keys(group, ["segment"], [0])
    place = group.store.get("segment").decode()
    if place.startswith("!"):
        raise UserError(place.removeprefix("! "))
    pid, descriptor = place.split()
    handle = shared_memory.Handle(int(pid), int(descriptor), num_bytes)
    try:
        return shared_memory.map_opened(handle, write=True)
    except FileNotFoundError:
        raise ConnectionError(
            f"peer rank {group.name(0)} is lost: it ended before its memory was shared"
        ) from None


def _whole_pages(num_bytes: int) -> int:
    """Return the size rounded up to whole pages."""
    return -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
