"""Serving the store from this process."""

import os
import socket
from datetime import timedelta

import torch.distributed as dist

from scaletrain.launching.job import STORE_FD

# The store that this process serves. It lives as long as the process: other ranks may need it after
# this one is done with it.
_served: dist.TCPStore | None = None


def _keep(store: dist.TCPStore) -> dist.TCPStore:
    global _served
    _served = store
    return store


def serve() -> int:
    """Serve the store on the socket that the launcher handed over, and return its port.

    Once a process: the variable is removed, or a child process would serve the store again.
    """
    descriptor = int(os.environ.pop(STORE_FD))
    listening = socket.socket(fileno=descriptor)
    address, port, *_ = listening.getsockname()
    # libuv's server takes the descriptor over.
    os.set_inheritable(listening.detach(), False)
    _keep(
        dist.TCPStore(
            "127.0.0.1" if address == "0.0.0.0" else address,
            port,
            None,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=descriptor,
            multi_tenant=False,
        )
    )
    return port


def serve_on_free_port(timeout: timedelta | None = None) -> dist.TCPStore:
    """Serve a store at a free port of all interfaces, as torch's store always does.

    Args:
        timeout: of the store's own waits; None: torch's default.
    """
    if timeout is None:
        store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    else:
        store = dist.TCPStore(
            "0.0.0.0", 0, None, is_master=True, timeout=timeout, wait_for_workers=False
        )
    return _keep(store)


def address_of(store: dist.Store) -> tuple[str, int]:
    """Return host and port of a store's server.

    The store of a world of one has no server: then one is started at a free port.
    """
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        store = serve_on_free_port()
    host = "127.0.0.1" if store.host == "0.0.0.0" else store.host
    return host, store.port
