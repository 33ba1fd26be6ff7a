"""The kernel's view of a TCP connection: is the other host still there?

A process that is stopped says nothing, but its host's kernel still acknowledges what arrives. A
host that is off, or behind a cut cable, acknowledges nothing. ZeroMQ's heartbeats are answered by
the process, so they would cut both connections.
"""

import contextlib
import socket

import zmq

from scaletrain.host import tcp_info

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
    counters = _counters(
        descriptor,
        tcp_info.UNACKED,
        tcp_info.PROBES,
        tcp_info.RECEIVED_AGO_MS,
        tcp_info.ANSWERED_AGO_MS,
    )
    if counters is None:
        return 0.0
    unacked, probes, data_ms, answer_ms = counters
    if not unacked and probes < _FEWEST_PROBES:
        return 0.0
    # The kernel notes no acknowledgement that arrives with data and tells nothing new.
    return min(data_ms, answer_ms) / 1000


def bytes_received(descriptor: int) -> int:
    """Return how much a peer has sent so far; 0 where the kernel does not say."""
    counters = _counters(descriptor, tcp_info.RECEIVED_BYTES)
    return 0 if counters is None else counters[0]


def end(descriptor: int) -> None:
    """End a connection of ZeroMQ's; ZeroMQ then closes its descriptor."""
    with contextlib.suppress(OSError), tcp_info.borrowed(descriptor) as connection:
        connection.shutdown(socket.SHUT_RDWR)


def _counters(descriptor: int, *fields: tcp_info.Field) -> tuple[int, ...] | None:
    """Return the kernel's counters of a connection; None where there are none."""
    with contextlib.suppress(OSError), tcp_info.borrowed(descriptor) as connection:
        return tcp_info.counters(connection, *fields)
    return None
