"""Messages between two ranks of one host, through shared memory: ``send`` and ``recv``.

How a message travels:

1. The sender writes its size, its tag and its first piece into the receiver's inbox (``inbox``),
   and further pieces as slots get empty. The receiver keeps them until somebody wants the message.
2. Where the receiver would have to keep more than ``_UNASKED_BYTES``, the sender writes size and
   tag alone. The receiver asks for the message when somebody wants it.
3. Pieces of a message that is wanted go into the receiving tensor itself.

So an inbox can always be emptied: no message keeps another one from coming through. The memory is
bounded by the inboxes, and ``_UNASKED_BYTES`` for each sender.

Messages match as under gloo: those of one sender with one tag in the order in which they were sent,
and the receives of one tag in the order of their calls. A message may be shorter than the tensor
that receives it, whose rest then stays as it is. gloo ends the process if it is longer; here, that
receive raises.
"""

import contextlib
import ctypes
import errno
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from scaletrain.engine import inbox
from scaletrain.engine.inbox import Entry, Inbox, Outbox
from scaletrain.engine.meeting import is_alive, lost, ranks_in_words
from scaletrain.engine.segment import Patience, num_spins
from scaletrain.engine.transport import Group
from scaletrain.engine.work import Work
from scaletrain.errors import UserError
from scaletrain.host.shared_memory import Handle
from scaletrain.run import progress

ANY = -1  # the sender of a receive from whichever rank comes first

_UNASKED_BYTES = 2 << 20  # of one sender's messages that nobody wants yet

# Kinds of entries in an inbox.
_UNASKED = 1  # a message begins, with its first piece
_WAITING = 2  # a message begins; its sender waits until it is asked for
_PIECE = 3  # the next piece of a message
_ASKED = 4  # back to the sender: a message that waits is wanted

# Between looks at the store for a peer's inbox: one takes 60 us.
_SHORTEST_LOOK_S = 0.5e-3
_LONGEST_LOOK_S = 20e-3
_LOOK_GROWTH = 1.5
# The thread moves messages only where nobody has waited for so long: a rank that waits does it
# itself, and is faster alone.
_STEP_BACK_S = 2e-3
_STAY_AWAKE = 50  # times that the thread looks for something to do before it sleeps
_CHECK_ALIVE_S = 0.5  # how often the thread looks whether the peers are alive
_NO_LIMIT = timedelta(0)  # the limit is the group's


class _Transfer:
    """A send or a receive. The thread that holds ``Messages._lock`` writes it."""

    def __init__(self, tensor: Tensor, peer: int, tag: int):
        self.tensor = tensor.resolve_neg()  # kept until the transfer is done
        self.address = self.tensor.data_ptr()
        self.num_bytes = self.tensor.numel() * self.tensor.element_size()
        self.peer = peer  # the other rank; of a receive, ANY until a message matches
        self.tag = tag
        self.done = False
        self.error: BaseException | None = None  # set before ``done``

    def end(self, error: BaseException | None) -> None:
        """Note that it is done, well or badly."""
        self.error = error
        self.done = True


class _Send(_Transfer):
    number = 0  # among the messages from this rank to the peer
    position = 0  # bytes that have left

    def __str__(self) -> str:
        return f"send to rank {self.peer} (tag {self.tag})"


class _Receive(_Transfer):
    def __init__(self, tensor: Tensor, peer: int, tag: int):
        super().__init__(tensor, peer, tag)
        # Of a view that negates what it shows, the values are received beside it.
        self.view = tensor if tensor.is_neg() else None

    def end(self, error: BaseException | None) -> None:
        """Note that it is done, well or badly."""
        if self.view is not None:
            with torch.inference_mode():
                self.view.copy_(self.tensor)
        super().end(error)

    def __str__(self) -> str:
        peer = "any rank" if self.peer == ANY else f"rank {self.peer}"
        return f"recv from {peer} (tag {self.tag})"


class _Arrival:
    """A message that has begun to arrive."""

    def __init__(self, sender: int, entry: Entry):
        self.sender = sender
        self.number = entry.message
        self.num_bytes = entry.num_bytes
        self.is_unasked = entry.kind == _UNASKED
        self.position = 0  # bytes that have come
        self.address = 0  # where the pieces go; 0: nowhere
        self.kept: np.ndarray | None = None  # the pieces of a message that nobody wants yet
        self.receive: _Receive | None = None  # the one that matches

    def keep(self) -> None:
        """Make room for a message that nobody wants yet."""
        self.kept = np.empty(self.num_bytes, np.uint8)
        self.address = self.kept.ctypes.data


class _Peer:
    """What this rank has under way with another one."""

    def __init__(self) -> None:
        self.outbox: Outbox | None = None  # into its inbox; None: not open yet
        self.look_at = 0.0  # when to look for it in the store again, as ``time.monotonic``
        self.look_s = _SHORTEST_LOOK_S
        # What goes out before any piece, in this order: messages that begin, and the numbers of
        # messages that this rank asks for.
        self.first: deque[_Send | int] = deque()
        self.sends: deque[_Send] = deque()  # the next pieces are the first one's
        self.waiting: dict[int, _Send] = {}  # by number: until the peer asks for it
        self.num_sends = 0
        self.unasked_bytes = 0  # sent so far
        self.arrivals: dict[int, _Arrival] = {}  # by number: more pieces will come


class Messages:
    """One rank's end of the messages between the ranks of a group. Not collective.

    Any thread may use it. A thread that waits moves whatever can be moved. What nobody waits for is
    moved by a thread of this class, which is started when there first is such a message.

    Args:
        group: ranks of one host, whose members are known.

    Attributes:
        group: the same; ``abort`` ends it.
        others: all of its ranks but this one.
        timeout_s: of waits without a limit of their own.
    """

    def __init__(self, group: Group):
        # Set by ``abort``, read by the threads that wait.
        self._ended = threading.Event()
        self.group = group._replace(ended=self._ended)
        self.others = tuple(rank for rank in range(group.size) if rank != group.rank)
        self.timeout_s = group.timeout.total_seconds()
        self.neighbours_until = 0.0  # see ``Segment``; threads that wait write and read it
        self._spins = num_spins(group)
        # Held by the thread that moves messages. What follows is written under it.
        self._lock = threading.Lock()
        self._inbox: Inbox | None = None  # created at the first message
        self._handle: Handle | None = None
        self._peers = {rank: _Peer() for rank in self.others}
        self._open: set[_Transfer] = set()
        # By tag: receives without a message in the order of the calls, and the other way round.
        self._receives: dict[int, list[_Receive]] = {}
        self._arrived: dict[int, list[_Arrival]] = {}
        self._failure: BaseException | None = None  # after it, nothing is moved
        self._thread: threading.Thread | None = None
        # Set by whoever leaves a transfer open, cleared by the thread.
        self._is_needed = threading.Event()
        # Threads that wait now, and all waits so far. Changed under _counting by those who wait,
        # read by the thread.
        self._counting = threading.Lock()
        self._num_waiters = 0
        self._num_waits = 0

    def send(self, tensor: Tensor, peer: int, tag: int) -> Work:
        """Start to send a tensor.

        Args:
            tensor: dense, contiguous and on the CPU. It must not change until the work is done.
            peer: another rank of the group.
            tag: from 0 on.

        Returns:
            The work. It may be done before the peer has called ``recv``.
        """
        send = _Send(tensor, peer, tag)
        return self._start(send, lambda: self._peers[peer].first.append(send))

    def receive(self, tensor: Tensor, peer: int, tag: int) -> Work:
        """Start to receive a tensor.

        Args:
            tensor: dense, contiguous and on the CPU.
            peer: another rank of the group, or ``ANY``.
            tag: of the message.

        Returns:
            The work. Its ``wait`` raises RuntimeError if the message is longer than the tensor.
        """
        receive = _Receive(tensor, peer, tag)
        return self._start(receive, lambda: self._add_receive(receive))

    def _start(self, transfer: _Transfer, add: Callable[[], None]) -> Work:
        """Add a transfer, and move what can be moved at once."""
        with self._lock:
            try:
                self._check_usable()
                self._begin()
            except (ConnectionError, UserError) as error:
                transfer.end(type(error)(f"{transfer}: {error}"))
                return Delivery(self, transfer)
            self._open.add(transfer)
            try:
                add()
                self._move()
            except BaseException as error:
                self._fail(error)
                raise
        if not transfer.done:
            self._call_thread()
        return Delivery(self, transfer)

    def _check_usable(self) -> None:
        """Raise ConnectionError if no message can be moved any more."""
        self.group.check_not_ended()
        if self._failure is not None:
            reason = _in_words(self._failure)
            raise ConnectionError(f"not run, since an earlier message failed: {reason}")

    def _begin(self) -> None:
        """Create this rank's inbox, and write to the store where it is. Once."""
        if self._inbox is not None:
            return
        key = f"inbox/{self.group.rank}"
        try:
            mine, self._handle = inbox.create(self.group.size)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.ENOMEM):
                raise
            message = (
                f"no room for {inbox.num_bytes(self.group.size):,} bytes of shared memory for"
                f" messages to rank {self.group.rank}; use gloo, or fewer ranks a host"
            )
            self.group.store.set(key, f"! {message}")
            raise UserError(message) from None
        self.group.store.set(key, f"{self._handle.pid} {self._handle.descriptor}")
        self._inbox = mine

    # Moving

    def move(self) -> bool:
        """Move everything that can be moved now. Return True if anything was."""
        with self._lock:
            try:
                return self._move()
            except BaseException as error:
                # Ctrl-C, too: a piece may have been moved half.
                self._fail(error)
                raise

    # What follows is called by the thread that holds the lock.

    def _move(self) -> bool:
        mine = self._inbox
        if mine is None or self._failure is not None:
            return False
        moved = False
        # In turns: neither direction keeps the other one waiting for long.
        for rank, peer in self._peers.items():
            moved |= self._take_entries(rank, peer, mine)
            moved |= self._put_entries(rank, peer)
        return moved

    def _add_receive(self, receive: _Receive) -> None:
        """Match a receive with a message that has come, or let it wait for one."""
        arrived = self._arrived.get(receive.tag, [])
        arrival = next((each for each in arrived if receive.peer in (ANY, each.sender)), None)
        if arrival is None:
            self._receives.setdefault(receive.tag, []).append(receive)
        else:
            _remove(self._arrived, receive.tag, arrival)
            self._match(receive, arrival)

    def _take_entries(self, rank: int, peer: _Peer, mine: Inbox) -> bool:
        """Take what a peer has written into this rank's inbox."""
        num_taken = 0
        while num_taken < inbox.NUM_SLOTS and (entry := mine.next_entry(rank)) is not None:
            if entry.kind == _ASKED:
                # It may have failed meanwhile.
                if entry.message in peer.waiting:
                    peer.sends.append(peer.waiting.pop(entry.message))
            elif entry.kind == _PIECE:
                self._land(peer, peer.arrivals[entry.message], entry, mine)
            else:
                self._arrive(rank, peer, entry, mine)
            num_taken += 1
            is_time_to_wake = mine.take(rank)
            outbox = self._outbox(rank, peer)
            if outbox is not None:
                outbox.ring(is_time_to_wake)
        return num_taken > 0

    def _arrive(self, rank: int, peer: _Peer, entry: Entry, mine: Inbox) -> None:
        """Take the beginning of a message."""
        arrival = _Arrival(rank, entry)
        peer.arrivals[arrival.number] = arrival
        receives = self._receives.get(entry.tag, [])
        receive = next((each for each in receives if each.peer in (ANY, rank)), None)
        if receive is not None:
            _remove(self._receives, entry.tag, receive)
            self._match(receive, arrival)
        else:
            if arrival.is_unasked:
                arrival.keep()
            self._arrived.setdefault(entry.tag, []).append(arrival)
        if arrival.is_unasked:
            self._land(peer, arrival, entry, mine)

    def _land(self, peer: _Peer, arrival: _Arrival, entry: Entry, mine: Inbox) -> None:
        """Copy a piece of a message to where it goes."""
        length = min(mine.slot_bytes, arrival.num_bytes - arrival.position)
        if arrival.address:
            ctypes.memmove(arrival.address + arrival.position, entry.address, length)
        arrival.position += length
        if arrival.position == arrival.num_bytes:
            del peer.arrivals[arrival.number]
            if arrival.receive is not None:
                self._finish(arrival.receive)

    def _match(self, receive: _Receive, arrival: _Arrival) -> None:
        """Let a message go into the tensor of a receive."""
        assert self._inbox is not None
        sender = self._peers[arrival.sender]
        receive.peer = arrival.sender
        arrival.address = 0
        if arrival.num_bytes <= receive.num_bytes:
            arrival.receive = receive
            arrival.address = receive.address
            if arrival.kept is not None:
                ctypes.memmove(arrival.address, arrival.kept.ctypes.data, arrival.position)
        else:
            # Its pieces come all the same, for the sender's sake.
            error = RuntimeError(
                f"{receive}: rank {arrival.sender} sends {arrival.num_bytes:,} bytes, more than"
                f" the {receive.num_bytes:,} bytes of the tensor of rank {self.group.rank}"
            )
            self._finish(receive, error)
        arrival.kept = None
        if not arrival.is_unasked:
            sender.first.append(arrival.number)
            return
        self._inbox.give_credit(arrival.sender, arrival.num_bytes)
        if arrival.receive is not None and arrival.number not in sender.arrivals:
            self._finish(receive)

    def _put_entries(self, rank: int, peer: _Peer) -> bool:
        """Write what is to be written into a peer's inbox, as far as there is room."""
        if not (peer.first or peer.sends):
            return False
        try:
            outbox = self._outbox(rank, peer) or self._look_for_inbox(rank, peer)
        except (ConnectionError, UserError) as error:
            self._lose(rank, error)
            return True
        num_put = 0
        while outbox is not None and num_put < inbox.NUM_SLOTS and outbox.has_room():
            if peer.first:
                self._put_first(peer, outbox)
            elif peer.sends:
                self._put_piece(outbox, _PIECE, peer.sends[0])
                if peer.sends[0].done:
                    peer.sends.popleft()
            else:
                break
            num_put += 1
        return num_put > 0

    def _put_first(self, peer: _Peer, outbox: Outbox) -> None:
        """Write the beginning of a message, or ask for one that waits."""
        item = peer.first.popleft()
        if isinstance(item, int):
            outbox.put(Entry(_ASKED, item, 0, 0, 0), 0)
            return
        item.number = peer.num_sends
        peer.num_sends += 1
        if peer.unasked_bytes - outbox.credit() + item.num_bytes <= _UNASKED_BYTES:
            peer.unasked_bytes += item.num_bytes
            self._put_piece(outbox, _UNASKED, item)
            if not item.done:
                peer.sends.append(item)
        else:
            peer.waiting[item.number] = item
            outbox.put(Entry(_WAITING, item.number, item.tag, item.num_bytes, 0), 0)

    def _put_piece(self, outbox: Outbox, kind: int, send: _Send) -> None:
        """Write the next piece of a message."""
        length = min(outbox.slot_bytes, send.num_bytes - send.position)
        address = send.address + send.position
        outbox.put(Entry(kind, send.number, send.tag, send.num_bytes, address), length)
        send.position += length
        if send.position == send.num_bytes:
            self._finish(send)

    def _outbox(self, rank: int, peer: _Peer) -> Outbox | None:
        """Return the way into a peer's inbox; None: not known, unless from the store."""
        if peer.outbox is None:
            assert self._inbox is not None
            handle = self._inbox.handle_of(rank)
            if handle is not None:
                self._open_outbox(peer, handle)
        return peer.outbox

    def _look_for_inbox(self, rank: int, peer: _Peer) -> Outbox | None:
        """Look into the store for a peer's inbox; None: the peer has not created it yet.

        Raises:
            ConnectionError: the peer, or the store, is gone.
            UserError: there is no memory for the inbox.
        """
        now = time.monotonic()
        if now < peer.look_at:
            return None
        peer.look_s = min(_LOOK_GROWTH * peer.look_s, _LONGEST_LOOK_S)
        peer.look_at = now + peer.look_s
        key = f"inbox/{rank}"
        store = self.group.store
        try:
            if not store.check([key]):
                return None
            place = store.get(key).decode()
        except RuntimeError as error:
            raise ConnectionError("the store where the ranks meet is gone") from error
        if place.startswith("!"):
            raise UserError(place.removeprefix("! "))
        pid, descriptor = place.split()
        num_bytes = inbox.num_bytes(self.group.size)
        self._open_outbox(peer, Handle(int(pid), int(descriptor), num_bytes))
        if peer.outbox is None:
            if is_alive(self.group, rank):
                raise ConnectionError(f"rank {self.group.name(rank)} has left the group")
            raise lost(self.group, rank)
        return peer.outbox

    def _open_outbox(self, peer: _Peer, handle: Handle) -> None:
        """Open the way into a peer's inbox, unless the peer has ended or left the group."""
        assert self._handle is not None
        with contextlib.suppress(FileNotFoundError, ValueError):
            peer.outbox = inbox.open_outbox(handle, self.group.size, self.group.rank)
            peer.outbox.introduce(self._handle)

    # Ends

    def _finish(self, transfer: _Transfer, error: BaseException | None = None) -> None:
        """End a transfer, well or badly."""
        self._open.discard(transfer)
        transfer.end(error)

    def _lose(self, rank: int, error: BaseException) -> None:
        """End everything under way with a peer."""
        for transfer in [each for each in self._open if each.peer == rank]:
            self._finish(transfer, ConnectionError(f"{transfer}: {error}"))
        for tag, receives in [*self._receives.items()]:
            for receive in [each for each in receives if each.done]:
                _remove(self._receives, tag, receive)
        peer = self._peers.get(rank)
        if peer is not None:  # else it is ANY
            peer.first.clear()
            peer.sends.clear()
            peer.waiting.clear()
            for arrival in peer.arrivals.values():
                arrival.address = 0
                arrival.receive = None

    def _fail(self, error: BaseException) -> None:
        """End everything that is under way, and all that will come."""
        self._failure = self._failure or error
        for transfer in [*self._open]:
            self._finish(transfer, ConnectionError(f"{transfer}: {_in_words(error)}"))

    # Waiting. The caller does not hold the lock.

    def wait(self, transfer: _Transfer, timeout: timedelta) -> None:
        """Wait until a transfer is done; move messages meanwhile. Signals come through.

        Args:
            transfer: one of this rank's.
            timeout: of this wait, which leaves the transfer under way; 0: the group's, which ends
                all messages of this rank.

        Raises:
            RuntimeError: ``timeout`` is over.
        """
        if transfer.done:
            return
        with self._counting:
            self._num_waiters += 1
            self._num_waits += 1
        try:
            watch = _Watch(self, transfer, timeout)
            patience = Patience(watch, watch.ranks())
            if not self._move_until_done(transfer, patience, progress.LONG_WAIT_S):
                with progress.waiting(str(transfer)):
                    self._move_until_done(transfer, patience, math.inf)
        except TimeoutError as error:
            if timeout > _NO_LIMIT:
                raise RuntimeError(str(error)) from None
            with self._lock:
                if not transfer.done:
                    self._finish(transfer, error)
                    self._fail(error)
        except ConnectionError as error:
            with self._lock:
                if self._ended.is_set():
                    self._fail(error)
                else:
                    self._lose(transfer.peer, error)
        finally:
            with self._counting:
                self._num_waiters -= 1

    def _move_until_done(self, transfer: _Transfer, patience: Patience, seconds: float) -> bool:
        """Move messages until a transfer is done. Return False if that takes too long."""
        spins = self._spins
        ends_at = time.monotonic() + seconds
        while not transfer.done:
            mine = self._inbox
            if mine is None:
                break  # closed; the transfer is done by now
            seen = mine.bell
            if self.move():
                patience.moved()
                spins = self._spins
            elif spins:
                mine.spin(seen, spins)
                spins = 0
            elif not transfer.done:
                patience.pause(0, seen)
                if time.monotonic() > ends_at:
                    return transfer.done
        return True

    def sleep(self, seen: int) -> None:
        """Sleep until a peer has done anything, or until a few milliseconds have passed."""
        mine = self._inbox
        if mine is not None:
            mine.sleep(seen)

    # The thread

    def _call_thread(self) -> None:
        """Let the thread move what nobody waits for."""
        if self._thread is None:
            with self._lock:
                if self._thread is None and self._failure is None:
                    self._thread = threading.Thread(
                        target=self._serve, name="scaletrain-messages", daemon=True
                    )
                    self._thread.start()
        if not self._is_needed.is_set():
            self._is_needed.set()

    def _serve(self) -> None:
        """Move messages wherever there are some and nobody waits. This is the thread."""
        num_waits = 0
        num_idle = 0
        while self._failure is None:
            self._is_needed.wait()
            time.sleep(_STEP_BACK_S)
            nobody_waits = not self._num_waiters and self._num_waits == num_waits
            num_waits = self._num_waits
            if self._open and nobody_waits:
                self._serve_alone()
            num_idle = 0 if self._open else num_idle + 1
            if num_idle == _STAY_AWAKE:
                num_idle = 0
                self._is_needed.clear()
                # One may have come in between.
                if self._open:
                    self._is_needed.set()

    def _serve_alone(self) -> None:
        """Move messages until somebody waits, or none is left."""
        checked_at = time.monotonic()
        while self._open and not self._num_waiters and self._failure is None:
            mine = self._inbox
            if mine is None:
                return
            seen = mine.bell
            if not self.move():
                mine.sleep(seen)
            now = time.monotonic()
            if now - checked_at > _CHECK_ALIVE_S:
                checked_at = now
                self._end_lost()

    def _end_lost(self) -> None:
        """End what is under way with ranks that have ended."""
        if self._ended.is_set():
            with self._lock:
                self._fail(ConnectionError("this rank has ended the group (abort)"))
            return
        gone = tuple(rank for rank in self.others if not is_alive(self.group, rank))
        if not gone:
            return
        self.move()  # their last messages may be here
        with self._lock:
            for rank in gone:
                self._lose(rank, lost(self.group, rank))
            if gone == self.others:
                self._lose(ANY, lost(self.group, gone[0]))

    # The group

    def limit(self, timeout: timedelta) -> None:
        """Change the group's timeout, for waits that begin from now on. Not collective."""
        self.timeout_s = timeout.total_seconds()

    def abort(self) -> None:
        """End the waits of all threads: they raise. Not collective."""
        self._ended.set()

    def close(self) -> None:
        """End the thread, and give the memory back. Not collective. Safe to call again."""
        with self._lock:
            self._fail(ConnectionError("its group was destroyed"))
            self._inbox = None
            self._peers.clear()
            if self._handle is not None:
                os.close(self._handle.descriptor)
                self._handle = None
        self._is_needed.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None


class _Watch:
    """What ``Patience`` asks while this rank waits for one transfer (see ``segment.Watched``)."""

    def __init__(self, messages: Messages, transfer: _Transfer, timeout: timedelta):
        self._messages = messages
        self._group = messages.group
        self._transfer = transfer
        self._has_own_limit = timeout > _NO_LIMIT
        self.timeout_s = timeout.total_seconds() if self._has_own_limit else messages.timeout_s

    @property
    def neighbours_until(self) -> float:
        """Until then, processes of others compute on this rank's core."""
        return self._messages.neighbours_until

    @neighbours_until.setter
    def neighbours_until(self, until: float) -> None:
        self._messages.neighbours_until = until

    def ranks(self) -> tuple[int, ...]:
        """Return the ranks that may end the wait."""
        peer = self._transfer.peer
        return self._messages.others if peer == ANY else (peer,)

    def sleep(self, place: int, seen: int) -> None:
        """Sleep until a peer has done anything, or until a few milliseconds have passed."""
        self._messages.sleep(seen)

    def check_alive(self, rank: int) -> None:
        """Raise ConnectionError if nobody is left who could end the wait."""
        if not any(is_alive(self._group, each) for each in self.ranks()):
            raise lost(self._group, rank)

    def check_not_ended(self) -> None:
        """Raise ConnectionError if this rank has ended the group."""
        self._group.check_not_ended()

    def late(self, ranks: tuple[int, ...]) -> TimeoutError:
        """Return the error that says these ranks did not answer in time."""
        if self._has_own_limit:
            return TimeoutError(
                f"{self._transfer}: not done within the {self.timeout_s:g} s that wait was given"
            )
        names = ranks_in_words(self.ranks())
        return TimeoutError(
            f"{self._transfer}: {names} did not answer: timed out after {self.timeout_s:g} s"
        )


class Delivery(Work):
    """The work of a send or a receive."""

    def __init__(self, messages: Messages, transfer: _Transfer):
        super().__init__()
        self._messages = messages
        self._transfer = transfer

    def wait(self, timeout: timedelta = _NO_LIMIT) -> bool:
        """Wait until it is done. Signals come through meanwhile.

        Raises:
            RuntimeError: it failed, or ``timeout`` is over.
        """
        self._messages.wait(self._transfer, timeout)
        error = self._transfer.error
        if isinstance(error, RuntimeError):
            raise error
        if error is not None:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error
        return True

    def future(self) -> torch.futures.Future:
        """Refuse, as gloo does."""
        raise RuntimeError("get_future is not there for send and recv: call wait")

    def is_completed(self) -> bool:
        """Return True if it is over, well or badly."""
        if not self._transfer.done:
            self._messages.move()
        return self._transfer.done

    def is_success(self) -> bool:
        """Return True if it is over and went well."""
        return self._transfer.done and self._transfer.error is None

    def exception(self) -> BaseException | None:
        """Return the failure, if there is one by now."""
        return self._transfer.error

    def result(self) -> list[Tensor]:
        """Return the tensor."""
        return [self._transfer.tensor]

    def _source_rank(self) -> int:
        """Return the group's rank from which a message came."""
        return self._transfer.peer

    def synchronize(self) -> None:
        """Wait until it is done."""
        self.wait()


_Item = TypeVar("_Item")


def _remove(lists: dict[int, list[_Item]], tag: int, item: _Item) -> None:
    """Remove an item from the list of a tag. An empty list goes, too."""
    lists[tag].remove(item)
    if not lists[tag]:
        del lists[tag]


def _in_words(error: BaseException) -> str:
    """Return an error's message; of one without a message, its name."""
    return str(error) or type(error).__name__
