"""Links: what the kernel counts about each of a process's TCP connections.

A worker or parameter server notes the counters of its connections once a second, in a file of its
own (``RunDir.links``, ``RunDir.server_links``), one JSON object a line. Nobody is asked: the kernel
counts anyway (``tcp_info``). It knows for how long data was on its way,
and how long of that the receiver had no room. So the speed of a link is known without clocks that
agree, and apart from the time for which its two ends waited for each other.

Readers pair the two ends of a connection by their addresses (``slow_links``).
"""

import contextlib
import ipaddress
import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from scaletrain.host import tcp_info
from scaletrain.host.names import host_name

SAMPLE_S = 1.0  # between two samples of a worker
_SOCKET = re.compile(r"socket:\[(\d+)\]")


class Connection(NamedTuple):
    """The counters of one end of a connection, since it was opened."""

    local: str  # address and port, such as ``10.0.0.1:4711``
    remote: str
    acked_bytes: int
    busy_s: float  # with data on its way that the receiver had room for
    segments: int  # sent with data
    retransmits: int  # of these, sent again


class LinkSample(NamedTuple):
    """All connections of one process at one moment."""

    time: float  # unix seconds
    connections: list[Connection]
    host: str = ""  # that it runs on


class LinkWriter:
    """Notes the counters of this process's TCP connections, at most once a second.

    Args:
        path: of its file; what an earlier job left there is removed.
    """

    def __init__(self, path: Path):
        self._path = path
        self._path.unlink(missing_ok=True)
        self._file: TextIO | None = None  # opened with the first sample that has connections
        self._sampled_at = time.monotonic()

    def sample(self) -> None:
        """Append a sample, if the last one is a second old."""
        now = time.monotonic()
        if now - self._sampled_at < SAMPLE_S:
            return
        self._sampled_at = now
        connections = list(_own_connections())
        if not connections:
            return
        if self._file is None:
            # Line-buffered: readers follow the file while the worker trains.
            self._file = open(self._path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115
        line = {"time": time.time(), "host": host_name(), "connections": connections}
        # A sample is not worth a step: on a full disk the worker trains on.
        with contextlib.suppress(OSError):
            self._file.write(json.dumps(line) + "\n")

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def read_links(path: Path) -> list[LinkSample]:
    """Return the samples of one process; none if there is no file. A cut last line is left out."""
    samples = []
    with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                samples.append(_sample(json.loads(line)))
    return samples


def last_links(path: Path, num_bytes: int = 32_768) -> list[LinkSample]:
    """Return the samples at the end of a file, without reading the whole; none if there is none."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        begin = max(0, file.seek(0, os.SEEK_END) - num_bytes)
        file.seek(begin)
        lines = file.read().splitlines(keepends=True)
        if begin:
            del lines[0]  # cut, or taken for it
        return [_sample(json.loads(line)) for line in lines if line.endswith(b"\n")]
    return []


def _sample(value: dict[str, Any]) -> LinkSample:
    connections = [Connection(*fields) for fields in value["connections"]]
    return LinkSample(value["time"], connections, value.get("host", ""))


def _own_connections() -> Iterator[Connection]:
    """Yield the counters of the TCP connections of this process that have sent data."""
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        # Another thread may close a descriptor at any time.
        with contextlib.suppress(OSError):
            if not _SOCKET.fullmatch(os.readlink(f"/proc/self/fd/{name}")):
                continue
            connection = _counters(int(name))
            if connection is not None and connection.acked_bytes > 0:
                yield connection


def _counters(descriptor: int) -> Connection | None:
    """Return the counters of a socket; None if it is no TCP connection."""
    with tcp_info.borrowed(descriptor) as connection:
        is_ip = connection.family in (socket.AF_INET, socket.AF_INET6)
        if not is_ip or connection.type != socket.SOCK_STREAM:
            return None
        remote = connection.getpeername()
        local = connection.getsockname()
        counters = tcp_info.counters(
            connection,
            tcp_info.ACKED_BYTES,
            tcp_info.BUSY_US,
            tcp_info.NO_ROOM_US,
            tcp_info.SEGMENTS,
            tcp_info.RETRANSMITS,
        )
    if counters is None:  # a kernel before 4.19
        return None
    acked_bytes, busy_us, no_room_us, segments, retransmits = counters
    return Connection(
        local=_address(local),
        remote=_address(remote),
        acked_bytes=acked_bytes,
        busy_s=max(0, busy_us - no_room_us) / 1e6,
        segments=segments,
        retransmits=retransmits,
    )


def _address(name: tuple[Any, ...]) -> str:
    """Return one text for an address, whether its socket is of IPv4 or of IPv6."""
    ip = ipaddress.ip_address(name[0].partition("%")[0])
    mapped = getattr(ip, "ipv4_mapped", None)
    return f"{mapped or ip}:{name[1]}"
