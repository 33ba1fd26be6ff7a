"""Serve a job's store on a rehearsed host that no worker is on: ``python -m scaletrain.programs.rehearsal_store PORT``.

For jobs that outlive the host of rank 0. The port is bound here, in the host's own network, where every port is free.
"""

import os
import socket
import sys

from scaletrain.launching.supervision.supervisor import STORE_FD


def main(port: int) -> None:
    listening = socket.create_server(("0.0.0.0", port), backlog=128)
    listening.set_inheritable(True)
    os.environ[STORE_FD] = str(listening.fileno())
    os.execv(sys.executable, [sys.executable, "-m", "scaletrain.programs.store"])


if __name__ == "__main__":
    main(int(sys.argv[1]))
