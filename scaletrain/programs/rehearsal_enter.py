"""Become a command on a rehearsed host: ``python -m scaletrain.programs.rehearsal_enter RUN_DIR/rehearsal HOST COMMAND...``

Waits until ``serve`` has made the cluster. The process that entered is the command itself: signals and exit status are its own.
"""

import json
import os
import sys
import time
from pathlib import Path

_WAIT_S = 60.0


def main(folder: Path, host: int, argv: list[str]) -> None:
    prefix = _prefix(folder / "cluster.json", host)
    os.execvp(prefix[0], [*prefix, *argv])


def _prefix(path: Path, host: int) -> list[str]:
    """What runs a command on the host. The file of an earlier launch into the same folder does not count."""
    until = time.monotonic() + _WAIT_S
    while time.monotonic() < until:
        try:
            made = json.loads(path.read_text(encoding="utf-8"))
            if made["launch"] == os.environ.get("SCALETRAIN_LAUNCH", ""):
                return made["commands"][host]
        except FileNotFoundError:
            pass
        time.sleep(0.02)
    sys.exit(
        f"scaletrain: error: the rehearsal cluster was not there after {_WAIT_S:.0f} s ({path})"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
