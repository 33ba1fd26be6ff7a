"""Serve the job's store, for workers that cannot serve it themselves.

``python -m scaletrain.programs.store``. The descriptor of the socket to serve on is in
SCALETRAIN_STORE_FD. The program runs until the launcher ends it.
"""

import signal
import sys

from scaletrain import programs

programs.begin(__name__)  # before torch is imported

from scaletrain.engine import rendezvous


def main() -> None:
    """Serve until SIGTERM."""
    # Status 0: the launcher's SIGTERM is this program's usual end, not a failure.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    rendezvous.serve()
    while True:
        # The store answers on a thread of torch. `pause` returns after every signal.
        signal.pause()


if __name__ == "__main__":
    main()
