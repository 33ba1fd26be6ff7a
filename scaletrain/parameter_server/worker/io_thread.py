"""The I/O thread of a worker: sends requests, receives answers, watches over the servers.

Communication overlaps computation because this thread does it. The training thread hands requests
over and waits for answers (``requests``), and reads the counters here.
"""

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import zmq

from scaletrain.host.stopwatch import Stopwatch
from scaletrain.parameter_server.protocol import wire
from scaletrain.parameter_server.protocol.consistency import Scaling
from scaletrain.parameter_server.protocol.settings import SILENCE_S
from scaletrain.parameter_server.protocol.wire import Dtype, Header, Message, MessageKind
from scaletrain.parameter_server.worker.link import Identity, ServerLink
from scaletrain.parameter_server.worker.requests import (
    PeerLost,
    Requests,
    ServerError,
    Token,
    Topic,
)

_RECEIVED_AT_ONCE = 64  # messages of one socket, before the others have their turn

# The subject of each kind of answer.
_TOPICS = {
    MessageKind.STORED: Topic.STORE,
    MessageKind.PART: Topic.PART,
    MessageKind.WEIGHTS: Topic.UPDATE,
    MessageKind.APPLIED: Topic.UPDATE,
    MessageKind.ROWS: Topic.ROWS,
    MessageKind.TOTAL: Topic.SUM,
    MessageKind.PAUSED: Topic.PAUSE,
    MessageKind.LEFT: Topic.LEAVE,
    MessageKind.STATES: Topic.STATE,
    MessageKind.NORMS: Topic.NORM,
    MessageKind.SCALED: Topic.SCALE,
}


@dataclass
class Position:
    """How far this worker has come, as a server's successor must know it."""

    step: int
    """The job's next step. Written by the training thread, read by the I/O thread."""

    versions: dict[int, int]
    """Updates in the weights that this worker has of each block, by key. The training thread writes
    them with each answer, the I/O thread after a lost connection: both hold the lock then. The I/O
    thread reads them without it as it sends, when no answer of that block is there to be noted."""

    scaling: Scaling | None = None
    """The last one that the servers were told. Written by the training thread once it has asked
    them to, read by the I/O thread."""

    lock: threading.Lock = field(default_factory=threading.Lock)


class IoThread:
    """Sends and receives for one ``Client``. Start it after all links have been connected.

    Args:
        identity: this worker.
        links: one for each server, in their order.
        requests: shared with the training thread.
        position: shared with the training thread.

    Attributes:
        bytes_sent: headers, frames, and the gradients that were left in shared memory.
        bytes_received: the same for weights.

    The counters are written by this thread and read by the training thread.
    """

    def __init__(
        self,
        identity: Identity,
        links: Sequence[ServerLink],
        requests: Requests,
        position: Position,
    ):
        self._identity = identity
        self._settings = identity.settings
        self._links = links
        self._link_of: dict[int, ServerLink] = {}  # by block
        for link in links:
            for block in link.blocks:
                self._link_of[block.key] = link
        self._requests = requests
        self._position = position
        self.bytes_sent = 0
        self.bytes_received = 0
        # Written by ``stop``, read by the thread.
        self._stopping = False
        self._turns = Stopwatch()  # the thread's own
        self._poller = zmq.Poller()
        self._thread = threading.Thread(target=self._run, name="parameter-server", daemon=True)

    # Called by the training thread

    def start(self) -> None:
        """Begin to send and receive. From now on the links are this thread's."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread and close all connections. Waits up to 5 s."""
        self._stopping = True
        self._requests.notify()
        self._thread.join(timeout=5)

    # The thread

    def _run(self) -> None:
        """Take turns until ``stop`` or the first failure; leave no socket open."""
        try:
            self._watch_sockets()
            while not self._stopping and self._requests.failure is None:
                self._take_turn()
        except ServerError as error:
            self._requests.fail(error)
        except Exception as error:  # of any kind: the training thread must not wait for ever
            self._requests.fail(ServerError(f"{type(error).__name__}: {error}"))
        finally:
            for link in self._links:
                link.disconnect()
            # This waits until every socket of the context is closed.
            self._identity.context.term()

    def _take_turn(self) -> None:
        """Do all that can be done without waiting, once there is something to do.

        1. Wait until a message comes, a full connection has room again, or there is a new request;
           at most a second, so that a silent server is noticed.
        2. Receive, and look after lost servers.
        3. Send all requests that have room.
        """
        ready = dict(self._poller.poll(1000))
        absent_s = self._turns.absence()
        if absent_s:
            self._forgive(absent_s)
        if self._requests.wake in ready:
            self._requests.take_notice()
        self._attend(ready)
        self._requests.send(self._try_send)

    def _forgive(self, absent_s: float) -> None:
        """Leave a time in which this process was stopped out of the silence of all servers.

        They were stopped with it, most likely.
        """
        now = time.monotonic()
        for link in self._links:
            if link.heard_at < now:  # later than now: it has said goodbye
                link.heard_at = min(link.heard_at + absent_s, now)

    def _watch_sockets(self) -> None:
        """Make a poller for the sockets that there are now."""
        self._poller = zmq.Poller()
        self._poller.register(self._requests.wake, zmq.POLLIN)
        for link in self._links:
            for monitor in link.monitors:
                self._poller.register(monitor, zmq.POLLIN)
            for number, socket in enumerate(link.sockets):
                # Another server's loss must not hide that a full connection has room again.
                has_to_wait = number in link.blocked
                self._poller.register(
                    socket, zmq.POLLIN | zmq.POLLOUT if has_to_wait else zmq.POLLIN
                )

    def _attend(self, ready: dict[Any, int]) -> None:
        """Receive the messages that are there, and find out whether all servers live.

        Stops at the first lost server: its sockets are new, and ``ready`` is outdated then.

        Args:
            ready: events by socket, as a poller returns them.
        """
        for link in self._links:
            has_news = any(ready.get(monitor) for monitor in link.monitors)
            if has_news and link.is_closed():
                self._lost(link, "closed the connection")
                return
            for number, socket in enumerate(link.sockets):
                events = ready.get(socket, 0)
                if events & zmq.POLLIN:
                    if not self._receive(link, number):
                        self._lost(link, "closed the connection")
                        return
                    link.heard_at = time.monotonic()
                if events & zmq.POLLOUT:
                    link.blocked.discard(number)
                    self._poller.register(socket, zmq.POLLIN)
            silent_s = time.monotonic() - link.heard_at
            if silent_s > max(SILENCE_S, self._settings.timeout_s):
                self._lost(link, f"gave no sign of life for {silent_s:.0f} s")
                return
            # A server that is stopped is silent, too, but its host answers.
            limit_s = self._settings.unanswered_s
            if silent_s > limit_s and link.unanswered_s() > limit_s:
                self._lost(link, f"gave no sign of life for {silent_s:.0f} s, nor did its host")
                return

    # Sending

    def _try_send(self, token: Token, header: Header, payloads: list[Any]) -> bool:
        """Send a request without waiting; return False if there is no room for it now."""
        link, number = self._route(token)
        if number in link.blocked:
            return False
        is_held = bool(header.flags & wire.HELD)  # no weights come before all are pushed
        if token.topic is Topic.UPDATE and not is_held and not link.may_push(token):
            return False
        # As late as this: a new connection has another session.
        header = header._replace(rank=self._identity.rank, session=link.sessions[number])
        if token.topic is Topic.UPDATE:
            # The server finds the gradient's staleness by the version of its weights. A server that
            # was restored knows none after that of its snapshot.
            header = header._replace(version=self._position.versions[token.key])
        if not link.send(number, [header.pack(), *payloads]):
            # POLLOUT only while the queue is full: otherwise each poll would return at once.
            link.blocked.add(number)
            self._poller.register(link.sockets[number], zmq.POLLIN | zmq.POLLOUT)
            return False
        if token.topic is Topic.UPDATE:
            link.under_way.add(token)
        self.bytes_sent += wire.HEADER_BYTES
        for payload in payloads:
            self.bytes_sent += memoryview(payload).nbytes
        if header.flags & wire.SHARED:
            self.bytes_sent += 4 * header.count
        return True

    def _route(self, token: Token) -> tuple[ServerLink, int]:
        """Return the link and the number of the connection that a request takes.

        Sums go to server 0. All requests about a block take the same connection, so that none
        overtakes another.
        """
        if token.topic is Topic.SUM:
            return self._links[0], 0
        if token.topic in (Topic.PAUSE, Topic.LEAVE, Topic.SCALE):
            return self._links[token.key], 0
        link = self._link_of[token.key]
        return link, token.key % len(link.sockets)

    # Receiving

    def _receive(self, link: ServerLink, number: int) -> bool:
        """Handle the messages that a connection holds, or the first of them if there are many.

        Returns:
            False if the server has a successor, and this message is its.

        Raises:
            ServerError: the server refuses a request, or says that training cannot go on.
        """
        socket = link.sockets[number]
        for _ in range(_RECEIVED_AT_ONCE):
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return True
            for frame in frames:
                self.bytes_received += len(frame)
            try:
                message = link.parse(number, frames)
            except PeerLost:
                raise
            except ServerError:
                # ZeroMQ has connected to the same address again by itself, before this thread saw
                # that the connection was closed. The successor knows nothing of its session.
                if self._settings.restart_servers and link.is_closed():
                    return False
                raise
            if message is None:  # a sign of life
                continue
            if message.header.flags & wire.SHARED:
                self.bytes_received += 4 * message.header.count
            token = _answered_token(link, message.header)
            if token is not None:
                link.under_way.discard(token)
                asked = self._requests.answer(token, message, link.epoch, link.weights)
                if asked is not None and token.topic is Topic.UPDATE:
                    link.answered_steps[token.key] = asked.step
        return True

    # Lost servers

    def _lost(self, link: ServerLink, reason: str) -> None:
        """Wait for the successor of a lost server where there will be one, else give up.

        1. A server may end as soon as its last worker says goodbye. Then nothing is lost.
        2. Join the successor, at the step where this worker is.
        3. Take the versions of its blocks: a snapshot may be older than the weights used so far.
        4. Send all open requests to it once more, and what it has to know beside them: that this
           worker pauses, the last scaling, and its vector of the last sum.

        Raises:
            PeerLost: no successor is to be expected.
            ServerError: the successor does not come in time, or does not accept this worker.
        """
        goodbye = Token(Topic.LEAVE, link.index)
        if self._requests.is_open(goodbye):
            left = Message(Header(MessageKind.LEFT), ())
            self._requests.answer(goodbye, left)
            link.disconnect()
            # From now on its silence means nothing.
            link.heard_at = float("inf")
            self._watch_sockets()
            return
        if not self._settings.restart_servers:
            raise PeerLost(f"{link} {reason}")
        link.disconnect()
        deadline = time.monotonic() + self._settings.timeout_s
        ready = link.connect(deadline, self._position.step, reason, lambda: self._stopping)
        with self._position.lock:
            self._position.versions.update(ready.versions)
        if self._settings.backup_workers and self._requests.is_summing():
            self._requests.repeat(Token(Topic.PAUSE, link.index), Header(MessageKind.PAUSE), [])
        scaling = self._position.scaling
        if scaling is not None:
            token = Token(Topic.SCALE, link.index, scaling.step)
            self._requests.repeat(token, *scale_request(scaling))
        if link.index == 0:
            self._requests.repeat_last_sum()
        self._requests.send_again(lambda token: self._route(token)[0] is link)
        self._watch_sockets()


def scale_request(scaling: Scaling) -> tuple[Header, list[Any]]:
    """Return header and payloads of SCALE."""
    payload = np.array([scaling.factor, scaling.limit])
    header = Header(MessageKind.SCALE, Dtype.FLOAT64, step=scaling.step, count=len(payload))
    return header, [payload]


def _answered_token(link: ServerLink, header: Header) -> Token | None:
    """Return the name of the request that a message answers; None if it is no answer."""
    topic = _TOPICS.get(header.kind)
    if topic is None:
        return None
    match topic:
        case Topic.PAUSE | Topic.LEAVE:
            return Token(topic, link.index)
        case Topic.SCALE:
            return Token(topic, link.index, header.step)
        case Topic.SUM:
            return Token(topic, header.step)
        case Topic.STORE:
            return Token(topic, header.key, header.step)
        case Topic.PART:
            return Token(topic, header.key, header.offset)
        case _:
            return Token(topic, header.key)
