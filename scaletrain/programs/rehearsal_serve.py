"""Play a scenario beside a job: build its cluster, cause its faults, count the traffic.

    python -m scaletrain.programs.rehearsal_serve RUN_DIR/rehearsal

Reads the scenario (``settings.json``) there and writes ``cluster.json``, for ``rehearsal_enter``.
As long as it lives it keeps ``RUN_DIR/emulation.json`` up to date, for summaries and reports.
"""

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
from scaletrain.rehearsal.scenario import Entrances, Scenario
from scaletrain.run import progress
from scaletrain.run.atomic import write_json, write_text
from scaletrain.run.layout import RunDir

_TICK_S = 0.02  # between looks at the job's steps
_COUNT_S = 1.0  # between counts of the traffic
_LEAVE_S = 3.0  # how long programs on the hosts may take to end by themselves
_CLUSTER_OPTIONS = ("hosts", "bandwidth", "latency", "loss")


class Player:
    """Plays the faults of a scenario on its cluster, and keeps the record of the emulation."""

    def __init__(self, scenario: Scenario, cluster: Cluster, run_dir: RunDir):
        self.cluster = cluster
        self.run_dir = run_dir
        self.left = list(scenario.faults)  # faults that have not happened yet, the next one first
        self._played_at = 0.0  # when the latest fault happened, by the monotonic clock
        self._counted_at = 0.0  # when the traffic was counted last, by the monotonic clock
        self._straggler = {str(host): factor for host, factor in scenario.straggler.items()}
        self._happened: list[dict[str, Any]] = []  # as they stand in emulation.json

    def tick(self) -> None:
        """Cause every fault that is due, and count the traffic now and then."""
        # Several faults may be due at once. They happen in the order of the script.
        while self.left and self._is_due(self.left[0]):
            self._play(self.left.pop(0))
            self._played_at = time.monotonic()
        # Counting runs commands at the switch, which is too slow for every tick.
        if time.monotonic() - self._counted_at > _COUNT_S:
            self.record()
            self._counted_at = time.monotonic()

    def record(self) -> None:
        """Write emulation.json: the cluster, the faults so far, and each host's traffic."""
        traffic = {}
        for name, counted in zip(self.cluster.names, self.cluster.counters(), strict=True):
            traffic[name] = counted._asdict()
        document = self.cluster.describe()
        document |= {"straggler": self._straggler, "faults": self._happened, "traffic": traffic}
        write_json(self.run_dir.emulation, document)

    def _is_due(self, fault: Fault) -> bool:
        # The script's first fault always has a step: there is none before it to count from.
        if fault.after_s is not None:
            return time.monotonic() - self._played_at >= fault.after_s
        return _steps_done(self.run_dir) >= fault.at_step

    def _play(self, fault: Fault) -> None:
        match fault.action:
            case "cut":
                self.cluster.cut(fault.host)
            case "heal":
                self.cluster.heal(fault.host)
            case "kill":
                self.cluster.kill(fault.host)
            # A slow link is shaped at the switch. A slow accelerator reads its factor from a file.
            case "slow" if fault.bandwidth:
                self.cluster.shape(fault.host, fault.bandwidth)
            case "slow":
                slowdown = self.run_dir.rehearsal.slowdown(fault.host)
                write_text(slowdown, f"{fault.factor:g}\n")
        # By the wall clock, like the records of the steps, so that a reader can line them up.
        self._happened.append({"time": time.time(), **fault._asdict()})
        print(f"scaletrain: emulated fault {fault}", file=sys.stderr, flush=True)


def main(folder: Path) -> int:
    """Serve the cluster until SIGTERM, and return the exit status."""
    run_dir = RunDir(folder.parent)
    files = run_dir.rehearsal
    scenario = Scenario.from_json(files.settings.read_text(encoding="utf-8"))
    ended: list[int] = []  # signals that were received; the handler writes it, the loop reads it
    signal.signal(signal.SIGTERM, lambda number, frame: ended.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the workers end first
    # Before the cluster is built, which takes a moment and would have to be taken down again.
    if scenario.slows_accelerators():
        _check_accelerators_are_emulated(run_dir)
    with scenario.cluster() as cluster:
        # Now the hosts can be entered: the workers have been waiting for this file.
        Entrances.of(cluster, os.environ.get("SCALETRAIN_LAUNCH", "")).write(files.cluster)
        player = Player(scenario, cluster, run_dir)
        while not ended:
            player.tick()
            time.sleep(_TICK_S)
        # Parameter servers get their SIGTERM together with this process. The cluster's end would
        # kill them while they write their last figures.
        deadline = time.monotonic() + _LEAVE_S
        while time.monotonic() < deadline and not cluster.is_idle():
            time.sleep(_TICK_S)
        # After the last program, so that all traffic is counted.
        player.record()
    files.cluster.unlink(missing_ok=True)
    # A fault that did not happen makes the rehearsal prove less than its script says.
    for fault in player.left:
        print(f"scaletrain: the job ended before this fault: {fault}", file=sys.stderr)
    return 0


def _steps_done(run_dir: RunDir) -> int:
    """Return how many steps the worker that is furthest has done."""
    furthest = 0
    for rank, _ in run_dir.all_progress():
        worker = progress.read(run_dir, rank)
        if worker is not None:
            furthest = max(furthest, worker.num_steps)
    return furthest


def _check_accelerators_are_emulated(run_dir: RunDir) -> None:
    """Refuse to slow a real computation, which would not notice.

    Raises:
        UserError: the job's configuration has no ``compute``.
    """
    config: dict[str, Any] = {}
    if run_dir.config.exists():
        config = yaml.safe_load(run_dir.config.read_text(encoding="utf-8"))
    if not config.get("compute"):
        raise UserError(
            "launcher.straggler and faults with a factor slow emulated accelerators:"
            " give compute (step_s or sample_s)"
        )


if __name__ == "__main__":
    try:
        sys.exit(main(Path(sys.argv[1])))
    except UserError as error:
        # The cluster knows its options by their bare names; a person typed them below `launcher`.
        key = str(error).partition(":")[0]
        prefix = "launcher." if key in _CLUSTER_OPTIONS else ""
        print(f"scaletrain: error: {prefix}{error}", file=sys.stderr)
        sys.exit(2)
