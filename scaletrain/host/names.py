"""The name of this host."""

import os
import socket


def host_name() -> str:
    """Return this host's name. A rehearsed host, which is a network namespace, has its own."""
    return os.environ.get("SCALETRAIN_HOST") or socket.gethostname()
