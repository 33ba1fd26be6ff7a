"""What the kernel counts about a TCP connection: ``struct tcp_info`` in ``linux/tcp.h``."""

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple


class Field(NamedTuple):
    """A counter of the struct, which only ever grows at its end."""

    offset: int
    form: str  # as of ``struct``


PROBES = Field(3, "B")  # that asked whether the other end is there, and have no answer yet
UNACKED = Field(24, "I")  # segments on the way
RECEIVED_AGO_MS = Field(52, "I")  # since data came
ANSWERED_AGO_MS = Field(56, "I")  # since an acknowledgement came
RETRANSMITS = Field(100, "I")  # segments that were sent again
ACKED_BYTES = Field(120, "Q")
RECEIVED_BYTES = Field(128, "Q")
SEGMENTS = Field(156, "I")  # with data that were sent, those sent again included
BUSY_US = Field(168, "Q")  # with data on its way
NO_ROOM_US = Field(176, "Q")  # of that, the receiver had no room

_MOST_BYTES = 256


def counters(connection: socket.socket, *fields: Field) -> tuple[int, ...] | None:
    """Return counters of a connection; None if this kernel does not count all of them.

    Raises:
        OSError: it is no TCP connection.
    """
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _MOST_BYTES)
    values: list[int] = []
    for offset, form in fields:
        if len(info) < offset + struct.calcsize(form):
            return None
        values += struct.unpack_from(f"={form}", info, offset)
    return tuple(values)


@contextlib.contextmanager
def borrowed(descriptor: int) -> Iterator[socket.socket]:
    """Yield the socket of a descriptor that somebody else owns, and leave it open.

    Without a copy of the descriptor: there may be none left.

    Raises:
        OSError: it is closed, or no socket.
    """
    connection = socket.socket(fileno=descriptor)
    try:
        yield connection
    finally:
        connection.detach()
