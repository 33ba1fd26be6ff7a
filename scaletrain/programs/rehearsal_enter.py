"""Become a command on an emulated host.

    python -m scaletrain.programs.rehearsal_enter RUN_DIR/rehearsal HOST COMMAND...

Waits until ``rehearsal_serve`` has built the cluster. The process that entered is the command
itself, so its signals and its exit status are the command's own.
"""

import os
import sys
import time
from pathlib import Path

from scaletrain.rehearsal.scenario import Entrances
from scaletrain.run.layout import RehearsalDir

_WAIT_S = 60.0
_POLL_S = 0.02


def main(folder: Path, host: int, argv: list[str]) -> None:
    """Replace this process by ``argv`` on a host. Exits with a message if there is no cluster."""
    # The launch that this process belongs to; the cluster's file names the one that made it.
    launch = os.environ.get("SCALETRAIN_LAUNCH", "")
    commands = _wait_for_cluster(RehearsalDir(folder).cluster, launch).commands
    words = [*commands[host], *argv]
    # Not a child: the supervisor's signals must reach the command, and its status come back.
    os.execvp(words[0], words)


def _wait_for_cluster(path: Path, launch: str) -> Entrances:
    deadline = time.monotonic() + _WAIT_S
    while time.monotonic() < deadline:
        try:
            entrances = Entrances.read(path)
        except FileNotFoundError:
            entrances = None
        # The file of an earlier launch into the same directory does not count.
        if entrances and entrances.launch == launch:
            return entrances
        time.sleep(_POLL_S)
    sys.exit(
        f"scaletrain: error: the rehearsal cluster was not there after {_WAIT_S:.0f} s ({path})"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
