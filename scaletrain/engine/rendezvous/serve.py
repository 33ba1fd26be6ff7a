"""Serving the store from this process."""

import os
import socket
from datetime import timedelta

import torch.distributed as dist

from scaletrain.engine.rendezvous.sealed import SealedStore
from scaletrain.launching.job import STORE_FD

_BACKLOG = 1024  # connections that wait to be accepted

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


def serve_at(
    address: str, port: int, timeout: timedelta = dist.default_pg_timeout
) -> dist.TCPStore:
    """Serve a store, and keep it as long as the process.

    torch's own server listens on all interfaces. Under an address of loopback, nobody outside this
    host reaches it.

    Args:
        address: by which the ranks reach this one; ``0.0.0.0``: all of this host's.
        port: 0: a free one.
        timeout: of the store's own waits.
    """
    listen_fd = None
    if address == "localhost" or address.startswith("127."):
        listening = socket.create_server((address, port), backlog=_BACKLOG)
        address, port, *_ = listening.getsockname()
        listen_fd = listening.detach()  # libuv's server takes the descriptor over
    store = dist.TCPStore(
        address,
        port,
        None,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listen_fd,
        multi_tenant=False,
    )
    return _keep(store)


def address_of(store: dist.Store) -> tuple[str, int]:
    """Return host and port of a store's server.

    The store of a world of one has no server: then one is started at a free port.
    """
    while isinstance(store, dist.PrefixStore | SealedStore):
        if isinstance(store, SealedStore):
            store = store.unsealed
        else:
            store = store.underlying_store
    if not isinstance(store, dist.TCPStore):
        store = serve_at("127.0.0.1", 0)
    host = "127.0.0.1" if store.host == "0.0.0.0" else store.host
    return host, store.port
