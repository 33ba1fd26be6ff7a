"""Serve a job's store on an emulated host that no worker is on.

    python -m scaletrain.programs.rehearsal_store PORT

For jobs that outlive the host of rank 0. The port is bound here, in the host's own network, where
every port is free.
"""

import os
import socket
import sys

from scaletrain.launching.job import STORE_FD, Program


def main(port: int) -> None:
    """Bind the port and become the program that serves the store on it."""
    listening = socket.create_server(("0.0.0.0", port), backlog=128)
    # Python closes its sockets on exec unless told otherwise.
    listening.set_inheritable(True)
    os.environ[STORE_FD] = str(listening.fileno())
    argv = Program.STORE.command()
    os.execv(argv[0], argv)


if __name__ == "__main__":
    main(int(sys.argv[1]))
