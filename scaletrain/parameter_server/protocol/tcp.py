"""The kernel's view of a TCP connection: is the other host still there?

A process that is stopped says nothing, but its host's kernel still acknowledges what arrives. A
host that is off, or behind a cut cable, acknowledges nothing. ZeroMQ's heartbeats are answered by
the process, so they would cut both connections.
"""

import contextlib
import socket
import struct
from collections.abc import Iterator

import zmq

# In the kernel's tcp_info: tcpi_probes, tcpi_unacked, tcpi_last_data_recv and tcpi_last_ack_recv
# (milliseconds), tcpi_bytes_received.
_INFO_BYTES = 136
_PROBES = 3
_UNACKED = 24
_LAST_RECEIVED = 52
_BYTES_RECEIVED = 128
# One alone may be on its way: the answer to a probe takes a moment.
_FEWEST_PROBES = 2


def keep_alive(zmq_socket: zmq.Socket, limit_s: float) -> None:
    """Let the kernel ask the other host whether it is there, while a connection is idle.

    Args:
        zmq_socket: not bound or connected yet.
        limit_s: the kernel ends the connection after so many seconds without an answer.
    """
    pause_s = max(1, int(limit_s / 4))
    zmq_socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    zmq_socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, pause_s)
    zmq_socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, pause_s)
    zmq_socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, max(1, round(limit_s / pause_s) - 1))


def unanswered_s(descriptor: int) -> float:
    """Return for how long the other host has left unanswered what was sent to it, in seconds.

    0 if nothing waits for an answer, or where the kernel does not say, as of a Unix socket.
    """
    info = _info(descriptor)
    if info is None:
        return 0.0
    (unacked,) = struct.unpack_from("I", info, _UNACKED)
    if not unacked and info[_PROBES] < _FEWEST_PROBES:
        return 0.0
    # The kernel notes no acknowledgement that arrives with data and tells nothing new.
    data_ms, answer_ms = struct.unpack_from("II", info, _LAST_RECEIVED)
    return min(data_ms, answer_ms) / 1000


def bytes_received(descriptor: int) -> int:
    """Return how much a peer has sent so far; 0 where the kernel does not say."""
    info = _info(descriptor)
    if info is None:
        return 0
    (received,) = struct.unpack_from("Q", info, _BYTES_RECEIVED)
    return int(received)


def end(descriptor: int) -> None:
    """End a connection of ZeroMQ's; ZeroMQ then closes its descriptor."""
    with contextlib.suppress(OSError), _borrowed(descriptor) as connection:
        connection.shutdown(socket.SHUT_RDWR)


def _info(descriptor: int) -> bytes | None:
    """Return the kernel's tcp_info; None where there is none."""
    with contextlib.suppress(OSError), _borrowed(descriptor) as connection:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        if len(info) == _INFO_BYTES:
            return info
    return None


@contextlib.contextmanager
def _borrowed(descriptor: int) -> Iterator[socket.socket]:
    """Yield the socket of a descriptor that belongs to ZeroMQ. Raises ``OSError``."""
    borrowed = socket.socket(fileno=descriptor)
    try:
        yield borrowed
    finally:
        borrowed.detach()
