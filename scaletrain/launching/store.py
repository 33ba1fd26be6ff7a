"""Where workers of this host's launchers meet: a bound socket, which one process is handed."""

import socket

from scaletrain.host.addresses import interface_of


def bind_store(address: str, workers: int, environ: dict[str, str]) -> socket.socket:
    """Bind a free port for the job's store, and return the listening socket.

    The process that serves the store inherits it, so no port is guessed.

    Args:
        address: the address of this host to bind.
        workers: how many will connect.
        environ: the environment of the processes to start; it gets the store's address.
    """
    backlog = max(128, 2 * workers)
    try:
        listening = socket.create_server((address, 0), backlog=backlog)
    except OSError:
        if address != "127.0.0.1":
            raise
        # This host knows IPv6 alone, and gloo falls back to 127.0.0.1 unless it is told where.
        listening = socket.create_server(("::1", 0), family=socket.AF_INET6, backlog=backlog)
        environ.setdefault("GLOO_SOCKET_IFNAME", interface_of("::1"))
    listening.set_inheritable(True)
    bound_address, port, *_ = listening.getsockname()
    environ["MASTER_ADDR"] = bound_address
    environ["MASTER_PORT"] = str(port)
    # torch's env:// then joins our store instead of serving one.
    environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    return listening
