"""Tests host/addresses.py: the addresses of this machine."""

import socket

from scaletrain.host import addresses
from scaletrain.host.addresses import InterfaceAddress


def test_the_loopback_is_one_of_the_addresses():
    assert InterfaceAddress("lo", "127.0.0.1") in addresses.ipv4_addresses()
    assert addresses.interface_of("127.0.0.1") == "lo"
    assert addresses.interface_of("192.0.2.1") == "", "an address for documents, of no machine"


def test_the_source_of_a_connection_is_known_if_it_is_answered():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        assert addresses.source_address("127.0.0.1", port) == "127.0.0.1"
    assert addresses.source_address("127.0.0.1", port) == "", "nobody listens any more"
