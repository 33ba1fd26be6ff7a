"""The companion of a rehearsed job: makes the cluster, plays the scripted faults, counts the traffic, says what is emulated.

``python -m scaletrain.programs.rehearsal_serve RUN_DIR/rehearsal`` reads ``settings.json`` there and writes ``cluster.json`` (for
``enter``) and ``RUN_DIR/emulation.json`` (for summaries and reports), which it brings up to date as long as it lives.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from scaletrain.errors import UserError
from scaletrain.rehearsal.cluster import Cluster
from scaletrain.rehearsal.faults import Fault
from scaletrain.run.atomic import write_json

_TICK_S = 0.02
_COUNT_S = 1.0
_LEAVE_S = 3.0  # how long programs on the hosts may take to end by themselves


def main(folder: Path) -> int:
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    faults = [Fault(**fault) for fault in settings["faults"]]
    ended: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the workers end first
    _check_slowable(folder.parent, settings, faults)
    with Cluster(**settings["cluster"]) as cluster:
        commands = [cluster.command(host, ()) for host in range(len(cluster.names))]
        launch = os.environ.get("SCALETRAIN_LAUNCH", "")
        write_json(
            folder / "cluster.json",
            {"launch": launch, "names": cluster.names, "commands": commands},
        )
        record = cluster.describe() | {"straggler": settings["straggler"], "faults": []}
        counted = played = 0.0
        while not ended:
            while faults and _is_due(faults[0], folder.parent, played):
                _play(faults.pop(0), cluster, folder, record)
                played = time.monotonic()
            if time.monotonic() - counted > _COUNT_S:
                _write(folder.parent, record, cluster)
                counted = time.monotonic()
            time.sleep(_TICK_S)
        until = time.monotonic() + _LEAVE_S
        while time.monotonic() < until and any(
            cluster.processes(host) for host in range(len(cluster.names))
        ):
            time.sleep(_TICK_S)
        _write(folder.parent, record, cluster)
    (folder / "cluster.json").unlink(missing_ok=True)
    for fault in faults:
        print(f"scaletrain: the job ended before this fault: {fault}", file=sys.stderr)
    return 0


def _is_due(fault: Fault, run_dir: Path, played: float) -> bool:
    if fault.after_s is not None:
        return time.monotonic() - played >= fault.after_s
    return _steps_done(run_dir) >= fault.at_step


def _play(fault: Fault, cluster: Cluster, folder: Path, record: dict[str, Any]) -> None:
    if fault.action == "cut":
        cluster.cut(fault.host)
    elif fault.action == "heal":
        cluster.heal(fault.host)
    elif fault.action == "kill":
        cluster.kill(fault.host)
    elif fault.bandwidth:
        cluster.shape(fault.host, fault.bandwidth)
    else:
        write_text(folder / f"slowdown-h{fault.host}", f"{fault.factor:g}\n")
    record["faults"].append({"time": time.time(), **fault._asdict()})
    print(f"scaletrain: emulated fault {fault}", file=sys.stderr, flush=True)


def _steps_done(run_dir: Path) -> int:
    """How many steps the worker that is furthest has done."""
    done = [0]
    for path in run_dir.glob("progress-*.json"):
        try:
            done.append(json.loads(path.read_text(encoding="utf-8"))["step"] or 0)
        except (OSError, ValueError, KeyError):  # it is being written
            continue
    return max(done)


def _write(run_dir: Path, record: dict[str, Any], cluster: Cluster) -> None:
    traffic = {
        name: link._asdict() for name, link in zip(cluster.names, cluster.counters(), strict=True)
    }
    write_json(run_dir / "emulation.json", record | {"traffic": traffic})


def _check_slowable(run_dir: Path, settings: dict[str, Any], faults: list[Fault]) -> None:
    """Only emulated accelerators can be slow: what really computes would not notice."""
    if not settings["straggler"] and not any(fault.factor for fault in faults):
        return
    path = run_dir / "config.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    if not config.get("compute"):
        raise UserError(
            "launcher.straggler and faults with a factor slow emulated accelerators: give compute (step_s or sample_s)"
        )


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1])))
    except UserError as error:
        option = str(error).partition(":")[0] in ("hosts", "bandwidth", "latency", "loss")
        print(f"scaletrain: error: {'launcher.' * option}{error}", file=sys.stderr)
        sys.exit(2)
