"""The container's health check: no worker of this host has been silent for too long.

If no worker runs, the program must start.
"""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

SILENT_S = float(os.environ.get("HEALTH_SILENT_S", "120"))


def silent(runs: Path, host: str, now: float) -> list[str]:
    """Return what is wrong with this host's unfinished workers.

    They overwrite their progress files at each step.
    """
    complaints = []
    for path in runs.glob("*/progress-*.json"):
        try:
            worker = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # it is being written
            continue
        if (
            worker["host"] != host
            or worker["doing"] in ("finished", "failed")
            or not Path(f"/proc/{worker['pid']}").exists()
        ):
            continue
        if now - worker["time"] > SILENT_S:
            complaints.append(
                f"{path}: no progress for {now - worker['time']:.0f} s ({worker['doing']})"
            )
    return complaints


if __name__ == "__main__":
    found = silent(
        Path(os.environ.get("RUNS", "/runs")),
        os.environ.get("SCALETRAIN_HOST") or socket.gethostname(),
        time.time(),
    )
    if found:
        sys.exit("\n".join(found))
    sys.exit(subprocess.run(["scaletrain", "--version"], timeout=15).returncode)
