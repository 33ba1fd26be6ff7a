"""The limits of connections: of strangers, and of workers whose host is gone.

ZeroMQ accepts every connection. One that says nothing holds a descriptor, and one whose message has
no end holds memory, until ZeroMQ's own time limit ends it, if any. The doorkeeper knows each
connection by its descriptor and ends those of strangers before they are too many or too loud. A
worker that is hit in such a flood tries again (``worker.link``), and gets in.

A worker's connection ends if its host does not answer, and stays if only its process is silent.
"""

import contextlib
import resource
from collections.abc import Iterator

import zmq
from zmq.utils.monitor import recv_monitor_message

from scaletrain.parameter_server.protocol import tcp

_EVENTS = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
_MOST_STRANGERS = 128  # at the same time
_STRANGER_BYTES = 1 << 16  # handshakes take less than 2 KiB
_OWN_DESCRIPTORS = 64  # of Python, torch, ZeroMQ, files and shared memory


class Doorkeeper:
    """Ends connections of strangers to one socket. Used by the server's only thread.

    Args:
        socket: not bound yet.
        connections: how many the workers of the job open.

    Attributes:
        news: readable when connections have come or gone; call ``look`` then, and now and then.
        turned_away: connections that were ended.
    """

    def __init__(self, socket: zmq.Socket, connections: int):
        self._socket = socket
        address = f"inproc://doorkeeper-{id(self)}"
        socket.monitor(address, _EVENTS)
        self.news = socket.context.socket(zmq.PAIR)
        # No limit: with one, ZeroMQ's thread would wait here in a flood of connections.
        self.news.setsockopt(zmq.RCVHWM, 0)
        self.news.connect(address)
        # By descriptor, the oldest first; a dict keeps their order.
        self._strangers: dict[int, None] = {}
        self._workers: set[int] = set()  # descriptors of connections that were admitted
        # Workers whose arrival is still to be told: another thread of ZeroMQ tells it.
        self._admitted_early: set[int] = set()
        self._most = min(_MOST_STRANGERS, _spare_descriptors(connections))
        self.turned_away = 0

    @property
    def has_strangers(self) -> bool:
        """Whether there are connections that have not proved who they are."""
        return bool(self._strangers)

    def admit(self, descriptor: int) -> None:
        """Note that a connection has proved that it is a worker's."""
        self._hear()
        self._workers.add(descriptor)
        if self._strangers.pop(descriptor, None) is None:
            self._admitted_early.add(descriptor)

    def look(self) -> None:
        """End connections of strangers that are too many, or have sent too much."""
        self._hear()
        for descriptor in list(self._too_many()):
            self._turn_away(descriptor)
        for descriptor in list(self._strangers):
            if tcp.bytes_received(descriptor) > _STRANGER_BYTES:
                self._turn_away(descriptor)

    def end_unanswered(self, limit_s: float) -> None:
        """End connections to workers whose host has answered nothing for so many seconds."""
        self._hear()
        for descriptor in [*self._workers]:
            if tcp.unanswered_s(descriptor) > limit_s:
                self._workers.discard(descriptor)
                tcp.end(descriptor)

    def close(self) -> None:
        """Stop listening to the socket, before it is closed."""
        # In this order: ZeroMQ's last word to a closed monitor waits for ever.
        self._socket.disable_monitor()
        self.news.close(linger=0)

    def _hear(self) -> None:
        """Take note of connections that have come or gone."""
        while self.news.poll(0):
            event = recv_monitor_message(self.news)
            descriptor = int(event["value"])
            self._strangers.pop(descriptor, None)
            if event["event"] != zmq.EVENT_ACCEPTED:
                self._admitted_early.discard(descriptor)
                self._workers.discard(descriptor)
            elif descriptor in self._admitted_early:
                self._admitted_early.remove(descriptor)
            else:
                self._strangers[descriptor] = None

    def _too_many(self) -> Iterator[int]:
        """Yield the strangers that have to go, the oldest first."""
        excess = len(self._strangers) - self._most
        for number, descriptor in enumerate(self._strangers):
            if number >= excess:
                return
            yield descriptor

    def _turn_away(self, descriptor: int) -> None:
        del self._strangers[descriptor]
        self.turned_away += 1
        tcp.end(descriptor)


def _spare_descriptors(connections: int) -> int:
    """Return how many strangers there may be, and allow this process all that it may have.

    Half of the descriptors that are left stay free: ZeroMQ accepts faster than anybody looks.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return max(8, (soft - _OWN_DESCRIPTORS - 2 * connections) // 2)
