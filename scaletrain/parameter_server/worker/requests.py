"""What a worker asks its servers for: handed from the thread that trains to the one that sends, and the answers back."""

import heapq
import os
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from scaletrain.parameter_server.protocol.memory import Slab
from scaletrain.parameter_server.protocol.wire import Header, Message
from scaletrain.run import progress


class ServerError(RuntimeError):
    """A parameter server is gone, refuses this worker, or says that training cannot go on."""


class PeerLost(ServerError, ConnectionError):
    """It is gone, or says that another worker is: a consequence of what happened elsewhere."""


class Token(NamedTuple):
    """What a message asks for; its answer carries the same."""

    what: str
    key: int
    offset: int = 0


class Answered(NamedTuple):
    """An answer, and the connection it came over."""

    message: Message
    epoch: int  # connections made to this server so far
    weights: Slab | None  # the server's memory


class _Entry(NamedTuple):
    key: int  # blocks in forward order: what the next forward needs first goes first
    arrival: int
    token: Token


class Requests:
    """Open requests in the order in which they should leave. One thread waits; all other methods may be called by any."""

    def __init__(self) -> None:
        self.wake = os.eventfd(0, os.EFD_NONBLOCK)  # readable when there is something to send
        self._changed = threading.Condition()
        self._open: dict[Token, tuple[Header, list[Any]]] = {}
        self._queue: list[_Entry] = []
        self._arrivals = 0
        self._answers: dict[Token, Answered] = {}
        self._awaited: Token | None = None  # nobody is woken for another one
        self.failure: ServerError | None = None

    def ask(self, token: Token, header: Header, payloads: list[Any]) -> Token:
        with self._changed:
            self._open[token] = (header, payloads)
            self._enqueue(token)
        os.eventfd_write(self.wake, 1)
        return token

    def wait(self, token: Token) -> Answered:
        """The answer. Raises ``ServerError`` after ``fail``, which whoever watches the servers' signs of life calls."""

        def is_over() -> bool:
            return token in self._answers or self.failure is not None

        with self._changed:
            self._awaited = token
            if not self._changed.wait_for(is_over, timeout=progress.LONG_WAIT_S):
                with progress.waiting("the parameter servers"):
                    self._changed.wait_for(is_over)
            if token in self._answers:
                return self._answers.pop(token)
            assert self.failure
            raise type(self.failure)(
                *self.failure.args
            )  # it may be raised again, by another thread

    def woken(self) -> None:
        """Take notice of ``wake``."""
        os.eventfd_read(self.wake)

    def send(self, try_send: Callable[[Token, Header, list[Any]], bool]) -> None:
        """Hand everything that waits to ``try_send``; what it has no room for (False) waits on, and may be overtaken."""
        later: list[_Entry] = []
        while True:
            with self._changed:
                if not self._queue:
                    break
                entry = heapq.heappop(self._queue)
                asked = self._open.get(entry.token)
            if asked is not None and not try_send(entry.token, *asked):
                later.append(entry)
        with self._changed:
            for entry in later:
                heapq.heappush(self._queue, entry)

    def answer(self, token: Token, answered: Answered) -> None:
        """One that was not asked for, or answered before, is left out: it was sent again after a lost connection."""
        with self._changed:
            if self._open.pop(token, None) is not None:
                self._answers[token] = answered
                if token == self._awaited:
                    self._changed.notify_all()

    def is_open(self, token: Token) -> bool:
        return token in self._open

    def send_again(self, change: Callable[[Token, Header], Header | None]) -> None:
        """Queue open requests once more, with the header that ``change`` gives them; None leaves one as it is."""
        with self._changed:
            for token, (header, payloads) in self._open.items():
                changed = change(token, header)
                if changed is not None:
                    self._open[token] = (changed, payloads)
                    self._enqueue(token)

    def fail(self, error: ServerError) -> None:
        """End all waiting, now and later, with the first error given."""
        with self._changed:
            self.failure = self.failure or error
            self._changed.notify_all()

    def close(self) -> None:
        os.close(self.wake)

    def _enqueue(self, token: Token) -> None:
        self._arrivals += 1
        heapq.heappush(self._queue, _Entry(self._open[token][0].key, self._arrivals, token))
