"""Memory that the ranks of one host share: counters to wait on, and room for data. Nothing of it has a name, so nothing can be left behind.

Rank 0 makes an anonymous file (``memfd_create``); the others open it through ``/proc/<pid>/fd``. It is gone when the last of them is, however
they end, and is not bounded by the size of /dev/shm.

Counters rely on stores becoming visible in program order, which x86-64 guarantees and other processors do not.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import platform
import time
from collections.abc import Sequence
from datetime import timedelta

from scaletrain.engine.transport import Group
from scaletrain.errors import UserError
from scaletrain.host.processes import start_ticks

_LINE = (
    8  # counters are 64-bit words, one a cache line, so that no two ranks write to the same line
)
_SPINS = 300  # looks at a counter before the core is offered to others; about 20 us
_YIELD_S = 300e-6  # then for this long the core is offered between looks: others compute on it, and a wake-up costs tens of microseconds
_SLEEP_S = (
    20e-6,
    1e-3,
)  # then sleep, longer and longer: whoever waits must not take a core from who computes
_NAP_S = 2e-3  # the longest sleep that a lost wake-up can cost
_FUTEX, _FUTEX_WAIT, _FUTEX_WAKE = 202, 0, 1  # the system call's number on x86-64
_LOOK_S = 0.1  # how often a long wait looks whether its peer is alive
_libc = ctypes.CDLL(None)  # through ctypes the interpreter lock is released
_sched_yield = _libc.sched_yield


class _Timespec(ctypes.Structure):
    _fields_ = (("s", ctypes.c_long), ("ns", ctypes.c_long))


_NAP = ctypes.byref(_Timespec(0, int(_NAP_S * 1e9)))


def supported() -> bool:
    return platform.machine() in ("x86_64", "AMD64") and hasattr(os, "memfd_create")


class Segment:
    """``num_counters`` for each rank, then ``num_bytes`` of data. Made by all ranks of a host (collective)."""

    def __init__(self, group: Group, num_counters: int, num_bytes: int):
        if not supported():
            raise UserError(
                f"transport 'shared_memory': needs Linux on x86-64 (this is {platform.machine()}); use gloo"
            )
        self.rank, self.size, self._timeout_s = (
            group.rank,
            group.size,
            group.timeout.total_seconds(),
        )
        self._name = group.name
        self._per_rank = (1 + num_counters) * _LINE  # the first: whether the rank sleeps
        head = -(-8 * self._per_rank * self.size // mmap.PAGESIZE) * mmap.PAGESIZE
        self._map = _map(group, head + num_bytes)
        self._words = memoryview(self._map)[:head].cast("Q")
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self._address = ctypes.addressof(self._anchor)
        self._asleep = [rank * self._per_rank for rank in range(self.size)]
        self._asleep_others = [
            place for rank, place in enumerate(self._asleep) if rank != self.rank
        ]
        self.data = memoryview(self._map)[head:]
        processes = exchanged(group, "process", f"{os.getpid()} {start_ticks(os.getpid())}")
        self._processes = [_process(value) for value in processes]
        cores = exchanged(group, "cores", " ".join(map(str, os.sched_getaffinity(0))))
        # With fewer cores than ranks, spinning keeps the very rank from running that is waited for: the core is offered at once.
        # All ranks' cores together: each of them may be bound to its own.
        self.a_core_each = len({core for own in cores for core in own.split()}) >= self.size
        self._spins = _SPINS if self.a_core_each else 1

    def write(self, counter: int, value: int) -> None:
        """Set one of this rank's counters: what was written to ``data`` before is seen by who sees the value. Wakes who sleeps."""
        words, place = self._words, self.rank * self._per_rank + (1 + counter) * _LINE
        words[place] = value
        for other in self._asleep_others:
            if words[other]:
                _libc.syscall(
                    _FUTEX,
                    ctypes.c_void_p(self._address + 8 * place),
                    _FUTEX_WAKE,
                    1 << 30,
                    None,
                    None,
                    0,
                )
                return

    def read(self, rank: int, counter: int) -> int:
        return self._words[rank * self._per_rank + (1 + counter) * _LINE]

    def wait(self, rank: int, counter: int, value: int) -> None:
        """Until ``rank``'s counter is at least ``value``.

        Raises:
            TimeoutError, ConnectionError: with the rank's number.
        """
        words, place = self._words, rank * self._per_rank + (1 + counter) * _LINE
        for _ in range(self._spins):
            if words[place] >= value:
                return
        patience = Patience(self, (rank,))
        while (seen := words[place]) < value:
            patience.pause(8 * place, seen)

    def sleep(self, place: int, seen: int) -> None:
        """Until the word at byte ``place`` is no longer ``seen``, or a few milliseconds have passed.

        The processor may let this rank's look at the word overtake its going to sleep: the wake-up is then lost, and the time limit ends the sleep.
        """
        mine = self._asleep[self.rank]
        self._words[mine] = 1
        address = ctypes.c_void_p(self._address + place)
        _libc.syscall(
            _FUTEX, address, _FUTEX_WAIT, ctypes.c_uint32(seen & 0xFFFFFFFF), _NAP, None, 0
        )
        self._words[mine] = 0

    def check_alive(self, rank: int) -> None:
        """Raises ConnectionError if the rank's process has ended."""
        pid, started = self._processes[rank]
        if start_ticks(pid) != started:
            raise ConnectionError(
                f"peer rank {self._name(rank)} (process {pid}) is lost: it has ended"
            )

    def late(self, ranks: tuple[int, ...]) -> TimeoutError:
        who = ", ".join(str(self._name(rank)) for rank in ranks)
        return TimeoutError(
            f"rank{'s' if len(ranks) > 1 else ''} {who} did not answer: timed out after {self._timeout_s:g} s"
        )

    @property
    def timeout_s(self) -> float:
        return self._timeout_s

    def close(self) -> None:
        del self._anchor
        self._words.release()
        with contextlib.suppress(BufferError):  # tensors still look into it; it goes with them
            self.data.release()
            self._map.close()


class Patience:
    """How to wait for other ranks: offer the core, then sleep longer and longer, and notice who is gone or late."""

    def __init__(self, segment: Segment, ranks: tuple[int, ...]):
        self._segment, self._ranks = segment, ranks
        self._began = self._looked = time.monotonic()
        self._sleep_s = _SLEEP_S[0]
        self._gone: ConnectionError | None = None

    def pause(self, place: int = -1, seen: int = 0) -> None:
        """Once. With ``place`` (see ``Segment.sleep``) a change of that counter ends it at once.

        Raises:
            TimeoutError, ConnectionError: one of the ranks is late, or gone. Who was found gone is told by the next call: what is waited for may
                have been done before it ended, and is looked for once more.
        """
        if self._gone:
            raise self._gone
        now = time.monotonic()
        if now - self._began < _YIELD_S:
            _sched_yield()
            return
        if place >= 0:
            self._segment.sleep(place, seen)
        else:
            time.sleep(self._sleep_s)
            self._sleep_s = min(1.2 * self._sleep_s, _SLEEP_S[1])
        if now - self._looked > _LOOK_S:
            self._looked = now
            try:
                for rank in self._ranks:
                    self._segment.check_alive(rank)
            except ConnectionError as error:
                self._gone = error
            if now - self._began > self._segment.timeout_s:
                raise self._segment.late(self._ranks)


def _map(group: Group, num_bytes: int) -> mmap.mmap:
    if group.rank == 0:
        file = os.memfd_create("scaletrain", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(file, 0, num_bytes)
        except OSError as error:
            os.close(file)
            if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                raise
            message = f"transport 'shared_memory': no room for {num_bytes:,} bytes of shared memory; use gloo, or fewer ranks a host"
            group.store.set("segment", f"! {message}")
            raise UserError(message) from None
        group.store.set("segment", f"{os.getpid()} {file}")
    else:
        _wait(group, ["segment"], [0])
        where = group.store.get("segment").decode()
        if where.startswith("!"):
            raise UserError(where[2:])
        pid, number = where.split()
        try:
            file = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            raise ConnectionError(
                f"peer rank {group.name(0)} is lost: it ended before its memory was shared"
            ) from None
    try:
        mapped = mmap.mmap(file, num_bytes)
        exchanged(group, "mapped", "")
    finally:
        os.close(file)
    return mapped


def exchanged(group: Group, key: str, value: str) -> list[str]:
    """What each rank has put under ``key`` (collective). Raises as ``_wait``."""
    group.store.set(f"{key}/{group.rank}", value)
    keys = [f"{key}/{rank}" for rank in range(group.size)]
    _wait(group, keys, range(group.size))
    return [group.store.get(key).decode() for key in keys]


def _wait(group: Group, keys: list[str], owners: Sequence[int]) -> None:
    """Until every key is there.

    Raises:
        TimeoutError: names the ranks whose keys are missing.
        ConnectionError: the store is gone.
    """
    try:
        group.store.wait(keys, max(group.timeout, timedelta(seconds=1)))
    except RuntimeError as error:
        try:
            missing = [
                str(group.name(rank))
                for rank, key in zip(owners, keys, strict=True)
                if not group.store.check([key])
            ]
        except RuntimeError:
            raise ConnectionError("the store where the ranks meet is gone") from error
        raise TimeoutError(
            f"rank{'s' if len(missing) > 1 else ''} {', '.join(missing)} did not join the group:"
            f" timed out after {group.timeout.total_seconds():g} s"
        ) from error


def _process(value: str) -> tuple[int, int]:
    pid, ticks = value.split()
    return int(pid), int(ticks)


def same_host(group: Group) -> list[str]:
    """For every rank a name of its host: ranks with equal names share memory and a network (collective)."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        boot = file.read().strip()
    # Two containers, or two rehearsed hosts, run on the same kernel.
    spaces = [str(os.stat(f"/proc/self/ns/{kind}").st_ino) for kind in ("net", "pid", "user")]
    return exchanged(group, "host", "/".join([boot, *spaces]))
