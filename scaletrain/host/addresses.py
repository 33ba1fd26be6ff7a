"""Network addresses of this machine."""

import socket
from typing import NamedTuple

import psutil

_ANSWER_S = 3.0  # a host that does not answer within this time counts as unreachable


class InterfaceAddress(NamedTuple):
    """An IPv4 address of a network interface that is up."""

    interface: str
    address: str

    @property
    def is_loopback(self) -> bool:
        """True for 127.x.y.z, which leads every host to itself."""
        return self.address.startswith("127.")


def ipv4_addresses() -> list[InterfaceAddress]:
    """Return the IPv4 addresses of all interfaces that are up."""
    up = {name for name, statistics in psutil.net_if_stats().items() if statistics.isup}
    addresses = []
    for name, entries in psutil.net_if_addrs().items():
        for entry in entries:
            if entry.family == socket.AF_INET and name in up:
                addresses.append(InterfaceAddress(name, entry.address))
    return addresses


def interface_of(address: str) -> str:
    """Return the interface that has an address of this machine; empty if none has it."""
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in entries):
            return name
    return ""


def source_address(address: str, port: int) -> str:
    """Return the address from which a TCP connection leaves this machine.

    Args:
        address: name or address of the other end.
        port: its TCP port, where something must be listening.

    Returns:
        Empty if nothing answers there.
    """
    try:
        with socket.create_connection((address, port), timeout=_ANSWER_S) as connection:
            return connection.getsockname()[0]
    except OSError:
        return ""
