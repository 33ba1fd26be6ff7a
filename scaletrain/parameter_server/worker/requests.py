"""A worker's open requests to its servers: one thread asks, another sends and answers.

Three threads meet in a ``Requests``:

- The training thread asks, and waits for answers.
- The staging thread, on accelerators, asks for pushes too.
- The I/O thread (``io_thread``) sends requests and hands in the answers.
"""

import enum
import heapq
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from scaletrain.parameter_server.protocol.memory import Slab
from scaletrain.parameter_server.protocol.wire import Header, Message
from scaletrain.run import progress


class ServerError(RuntimeError):
    """A parameter server is gone, refuses this worker, or says that training cannot go on."""


class PeerLost(ServerError, ConnectionError):
    """A server is gone, or reports a lost worker: a consequence of a failure elsewhere."""


class Topic(enum.Enum):
    """The subject of a request."""

    STORE = enum.auto()  # part of a block's first weights, or of its optimizer's state
    PART = enum.auto()  # part of a block's weights as they are
    UPDATE = enum.auto()  # a gradient, dense or sparse
    ROWS = enum.auto()  # rows of a sparse table
    SUM = enum.auto()
    PAUSE = enum.auto()
    LEAVE = enum.auto()
    STATE = enum.auto()  # description of a block's optimizer state
    NORM = enum.auto()  # of a block's mean gradient
    SCALE = enum.auto()  # of the mean gradients of a step


class Token(NamedTuple):
    """The name of a request. Its answer has the same, and no two open requests share one."""

    topic: Topic
    key: int  # the block; for SUM the number of the sum, for PAUSE, LEAVE and SCALE the server
    # For PART the first element, for STORE the request's number, for SCALE the step.
    part: int = 0


class Answered(NamedTuple):
    """An answer, and the connection it came over."""

    messages: list[Message]  # as many as the request had
    epoch: int  # connections made to this server so far
    weights: Slab | None  # the server's memory

    @property
    def message(self) -> Message:
        """The answer to the first message of the request, which is the only one of most."""
        return self.messages[0]


class Part(NamedTuple):
    """One message of a request, as it is sent."""

    header: Header
    payloads: list[Any]  # frames: bytes or arrays


@dataclass
class _Request:
    """An open request: one message, or several if it is too large for one.

    The I/O thread alone changes it. After a lost connection another one takes its place.
    """

    parts: list[Part]
    num_sent: int = 0  # of the parts
    answers: list[Message] = field(default_factory=list)  # to the parts, in their order


class _Entry(NamedTuple):
    """A place in the queue of requests to send. The smallest entry leaves first."""

    key: int  # blocks in forward order: the next forward needs the first ones first
    arrival: int
    token: Token


class Requests:
    """Open requests in the order in which they should leave.

    One thread at a time may ``wait``, the training thread. All other methods may be called by any.

    Attributes:
        wake: an eventfd. Written by ``ask`` and ``notify``, read by the I/O thread, which polls it.
        failure: the first failure, for good; None while there is none. Written under the lock by
            ``fail``. The I/O thread reads it without the lock: it may notice a failure one turn
            later.
    """

    def __init__(self) -> None:
        self.wake = os.eventfd(0, os.EFD_NONBLOCK)
        self.failure: ServerError | None = None
        # The lock of everything below; notified when the awaited answer is in, or all has failed.
        self._changed = threading.Condition()
        # Added by ``ask``, removed by ``answer``: sent requests stay open until they are answered.
        self._open: dict[Token, _Request] = {}
        # A heap. Filled by ``ask`` and ``send_again``, emptied by ``send``. Entries of requests
        # that were answered meanwhile are skipped.
        self._queue: list[_Entry] = []
        self._arrivals = 0  # entries made so far
        # Put in by ``answer``, taken out by ``wait``.
        self._answers: dict[Token, Answered] = {}
        # Requests that were sent once more after their answer (see ``repeat``), until it comes
        # again.
        self._repeated: set[Token] = set()
        # The last sum that was answered. Written by ``answer``, read by ``repeat_last_sum``.
        self._last_sum: tuple[Token, _Request] | None = None
        # The token that the training thread waits for. Other answers do not wake it.
        self._awaited: Token | None = None

    def ask(self, token: Token, header: Header, payloads: list[Any]) -> Token:
        """Open a request. Does not wait; the payloads must stay as they are until it is answered.

        Returns:
            ``token``, for ``wait``.
        """
        return self.ask_in_parts(token, [Part(header, payloads)])

    def ask_in_parts(self, token: Token, parts: list[Part]) -> Token:
        """Open a request of several messages, each of which is answered by one.

        After a lost connection all of them are sent again, also those that were answered: whoever
        takes the place of the lost server has none.
        """
        with self._changed:
            self._open[token] = _Request(parts)
            self._enqueue(token)
        self.notify()
        return token

    def wait(self, token: Token) -> Answered:
        """Wait for the answer to an open request.

        There is no time limit: the I/O thread calls ``fail`` if the servers give no sign of life.

        Raises:
            ServerError: after ``fail``.
        """

        def is_over() -> bool:
            return token in self._answers or self.failure is not None

        with self._changed:
            self._awaited = token
            if not self._changed.wait_for(is_over, timeout=progress.LONG_WAIT_S):
                with progress.waiting("the parameter servers"):
                    self._changed.wait_for(is_over)
            if token in self._answers:
                return self._answers.pop(token)
        self.check()
        raise AssertionError("neither an answer nor a failure")

    def check(self) -> None:
        """Raise the failure, if there is one. Any thread may call it."""
        failure = self.failure
        if failure is not None:
            # A copy: another thread may raise it, too, and each needs a traceback of its own.
            raise type(failure)(*failure.args)

    def notify(self) -> None:
        """Make the I/O thread look at its requests."""
        os.eventfd_write(self.wake, 1)

    def take_notice(self) -> None:
        """Reset ``wake`` (I/O thread)."""
        os.eventfd_read(self.wake)

    def send(self, try_send: Callable[[Token, Header, list[Any]], bool]) -> None:
        """Hand every queued request to ``try_send`` (I/O thread).

        Args:
            try_send: returns False if there is no room for the request now. It stays queued, and
                later requests may overtake it.
        """
        delayed: list[_Entry] = []
        while True:
            with self._changed:
                if not self._queue:
                    break
                entry = heapq.heappop(self._queue)
                request = self._open.get(entry.token)
            if request is None:  # answered meanwhile
                continue
            for header, payloads in request.parts[request.num_sent :]:
                if not try_send(entry.token, header, payloads):
                    delayed.append(entry)
                    break
                request.num_sent += 1
        with self._changed:
            for entry in delayed:
                heapq.heappush(self._queue, entry)

    def answer(
        self, token: Token, message: Message, epoch: int = 0, weights: Slab | None = None
    ) -> Header | None:
        """Take an answer, and close its request if no other is missing (I/O thread).

        An answer to a request that is not open is ignored. The request was sent again after a lost
        connection, and this is its second answer.

        Args:
            token: of the request.
            message: the answer to the first of its messages that has none.
            epoch: connections made to this server so far.
            weights: the server's memory.

        Returns:
            The header that the request was asked with, if it was closed.
        """
        with self._changed:
            request = self._open.get(token)
            if request is None:
                return None
            request.answers.append(message)
            if len(request.answers) < len(request.parts):
                return None
            del self._open[token]
            if token in self._repeated:
                self._repeated.discard(token)
                return None
            if token.topic is Topic.SUM:
                self._last_sum = (token, request)
            self._answers[token] = Answered(request.answers, epoch, weights)
            if token == self._awaited:
                self._changed.notify_all()
        return request.parts[0].header

    def is_open(self, token: Token) -> bool:
        """Return True if a request was asked and not answered yet."""
        return token in self._open

    def send_again(self, is_meant: Callable[[Token], bool]) -> None:
        """Queue open requests once more, after a lost connection (I/O thread).

        Args:
            is_meant: returns True for a request that the lost server has to get again.
        """
        with self._changed:
            again = [token for token in self._open if is_meant(token)]
            for token in again:
                # Some are in the queue already. The second time, there is nothing left to send.
                self._open[token] = _Request(self._open[token].parts)
                self._enqueue(token)

    def is_summing(self) -> bool:
        """Return True if a sum was asked for and not answered yet."""
        with self._changed:
            return any(token.topic is Topic.SUM for token in self._open)

    def repeat(self, token: Token, header: Header, payloads: list[Any]) -> None:
        """Send a request once more, though it was answered (I/O thread).

        A lost server took its effect along. Nobody waits for the second answer.
        """
        with self._changed:
            if token not in self._open:
                self._repeat(token, [Part(header, payloads)])

    def repeat_last_sum(self) -> None:
        """Send the vector of the last sum that was answered once more (I/O thread).

        Other workers may not have got its total before the server was lost.
        """
        with self._changed:
            if self._last_sum is not None:
                token, request = self._last_sum
                self._repeat(token, request.parts)

    def _repeat(self, token: Token, parts: list[Part]) -> None:
        """Open an answered request again. The caller holds the lock."""
        self._open[token] = _Request(parts)
        self._repeated.add(token)
        self._enqueue(token)

    def fail(self, error: ServerError) -> None:
        """End all waiting, now and later. The first error of several is the one that counts."""
        with self._changed:
            if self.failure is None:
                self.failure = error
            self._changed.notify_all()

    def close(self) -> None:
        """Release ``wake``, after the I/O thread has ended."""
        os.close(self.wake)

    def _enqueue(self, token: Token) -> None:
        """Queue an open request. The caller holds the lock."""
        self._arrivals += 1
        key = self._open[token].parts[0].header.key
        heapq.heappush(self._queue, _Entry(key, self._arrivals, token))
