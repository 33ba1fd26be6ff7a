"""How parameter servers' jobs survive faults: ``benchmarks/results/faults.md``."""

import json
import os
import statistics
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.lab import pages
from scaletrain.errors import unknown
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.run.atomic import write_json, write_text
from scaletrain.run.environment import Environment, environment
from scaletrain.scaling.show import results

_FAULTS_OF_A_JOB = 8
_ROUND_STEPS = 4
_SNAPSHOT_UPDATES = 10
_CLIPPED = "sync, clipped"  # jobs whose servers clip gradients; their names begin like this
# A name for people, and the options. Without ``min_workers`` a job of mode sync needs all workers.
MODES: dict[str, dict[str, Any]] = {
    "sync": {"workers": 2, "mode": "sync"},
    "sync, one may be lost": {"workers": 2, "mode": "sync", "min_workers": 1},
    "sync, a spare worker": {"workers": 3, "mode": "sync", "backup_workers": 1},
    _CLIPPED: {"workers": 2, "mode": "sync"},
    f"{_CLIPPED}, one may be lost": {"workers": 2, "mode": "sync", "min_workers": 1},
    f"{_CLIPPED}, a spare worker": {"workers": 3, "mode": "sync", "backup_workers": 1},
    "async": {"workers": 2, "mode": "async"},
    "bounded": {"workers": 2, "mode": "bounded"},
    "local_sgd": {"workers": 2, "mode": "local_sgd", "local_steps": _ROUND_STEPS, "min_workers": 1},
    "post_local": {
        "workers": 2,
        "mode": "post_local",
        "local_steps": _ROUND_STEPS,
        "local_after": 5 * _ROUND_STEPS,
        "min_workers": 1,
    },
}
WIRES: dict[str, dict[str, Any]] = {
    "Unix socket, shared memory": {"link": "unix"},
    "TCP": {"link": "tcp", "security": "trusted_network"},
    "TCP, AES": {"link": "tcp", "security": "aes"},
    "TCP, CURVE": {"link": "tcp", "security": "curve"},
}
SERVERS = (1, 2)


@dataclass(frozen=True)
class Cell:
    """A kind of job."""

    mode: str  # of MODES
    wire: str  # of WIRES
    servers: int

    @property
    def settings(self) -> Settings:
        """The job's settings; the model is cut into several blocks."""
        from benchmarks.lab import fault_job

        return Settings(
            timeout_s=fault_job.TIMEOUT_S,
            servers=self.servers,
            placement="dedicated",
            snapshot_updates=_SNAPSHOT_UPDATES,
            restart_servers=1_000_000,
            block_mb=0.0005,
            **MODES[self.mode],
            **WIRES[self.wire],
        )

    @property
    def norm(self) -> float | None:
        """The norm to which servers clip the gradients; None: any."""
        return 0.5 if self.mode.startswith(_CLIPPED) else None

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of faults that such a job has to survive."""
        from benchmarks.lab import fault_job

        if MODES[self.mode] == MODES["sync"]:
            return tuple(kind for kind in fault_job.KINDS if kind != "worker killed")
        return fault_job.KINDS


@dataclass(frozen=True)
class Fault:
    """One fault to a job of a cell."""

    mode: str
    wire: str
    servers: int
    kind: str
    recovery_s: float  # until all workers had done three more steps
    trouble: str  # empty: the job survived


@dataclass(frozen=True)
class Row:
    """The faults to jobs of one cell."""

    mode: str
    wire: str
    servers: int
    survived: list[str]  # by kind: "9 of 9", or nothing where there was none
    total: str
    median_s: float
    most_s: float


@click.command("faults")
@click.option("--repeats", default=100, show_default=True, help="Faults to each kind of job.")
@click.option(
    "--each", default=0, show_default=True, help="Faults of each kind to each kind of job, too."
)
@click.option("--kind", "only", multiple=True, help="Do faults of this kind alone.")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/results"),
    show_default=True,
    help="Where faults.md and faults.json go. What the second one holds is not done again.",
)
def command(repeats: int, each: int, only: tuple[str, ...], out: Path) -> None:
    """Kill, end and stop servers and workers at random moments, in every mode and over every wire.

    \b
    Examples:
      python -m benchmarks.lab faults --repeats 8
      python -m benchmarks.lab faults --each 100 --kind "server killed"
    """
    from benchmarks.lab import fault_job

    for kind in only:
        if kind not in fault_job.KINDS:
            raise unknown("--kind", kind, fault_job.KINDS)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "faults.json"
    now = environment()
    header, faults = _earlier(path, now)
    # One job of each cell in turn: an interrupted command has tried all of them.
    for cell, kinds in _jobs(faults, repeats, each, only):
        faults += _run(cell, len(_of_cell(faults, cell)), kinds)
        header["commits"] = list(dict.fromkeys([*header["commits"], now["commit"]]))
        write_json(path, {"environment": header, "faults": [asdict(fault) for fault in faults]})
        _write_page(out, header, faults, repeats)


def _earlier(path: Path, now: Environment) -> tuple[Any, list[Fault]]:
    """Return the header and the faults of an earlier run that was interrupted, or new ones.

    Args:
        path: of the results.
        now: the facts about the machine and the versions.
    """
    if path.exists():
        value = json.loads(path.read_text(encoding="utf-8"))
        return value["environment"], [Fault(**fault) for fault in value["faults"]]
    return now | {"load_average": os.getloadavg()[1], "commits": []}, []


def _jobs(
    faults: list[Fault], repeats: int, each: int, only: tuple[str, ...]
) -> Iterator[tuple[Cell, tuple[str, ...]]]:
    """Yield jobs, each with the kinds of faults that it still lacks, until all cells are done.

    Args:
        faults: those that were done; they grow as the jobs are run.
        repeats: to each kind of job, of any kind.
        each: of each kind.
        only: kinds; none: all.
    """
    cells = []
    for mode in MODES:
        for wire in WIRES:
            cells += [Cell(mode, wire, servers) for servers in SERVERS]
    is_done = False
    while not is_done:
        is_done = True
        for cell in cells:
            of_cell = _of_cell(faults, cell)
            kinds = tuple(kind for kind in cell.kinds if kind in only or not only)
            if not kinds:
                continue
            counts = Counter(fault.kind for fault in of_cell)
            rare = tuple(kind for kind in kinds if counts[kind] < each)
            if rare or len(of_cell) < repeats:
                is_done = False
                yield cell, rare or kinds


def _of_cell(faults: Iterable[Fault], cell: Cell) -> list[Fault]:
    return [
        fault
        for fault in faults
        if (fault.mode, fault.wire, fault.servers) == (cell.mode, cell.wire, cell.servers)
    ]


def _run(cell: Cell, seed: int, kinds: tuple[str, ...]) -> list[Fault]:
    from benchmarks.lab import fault_job

    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        done = fault_job.run(cell.settings, Path(folder), _FAULTS_OF_A_JOB, kinds, seed, cell.norm)
    faults = []
    for fault in done:
        faults.append(Fault(cell.mode, cell.wire, cell.servers, *fault))
        if fault.trouble:
            click.echo(f"{cell.mode}, {cell.wire}, {cell.servers}: {fault.kind}: {fault.trouble}")
    click.echo(f"{cell.mode}, {cell.wire}, {cell.servers}: {len(done)} faults")
    return faults


def _write_page(out: Path, header: Any, faults: list[Fault], repeats: int) -> None:
    from benchmarks.lab import fault_job

    rows = []
    for mode in MODES:
        for wire in WIRES:
            for servers in SERVERS:
                of_cell = _of_cell(faults, Cell(mode, wire, servers))
                if of_cell:
                    rows.append(_row(of_cell, fault_job.KINDS))
    failed = [fault for fault in faults if fault.trouble]
    page = pages.markdown(
        "faults.md",
        kinds=fault_job.KINDS,
        rows=rows,
        failed=failed,
        total=len(faults),
        repeats=repeats,
        snapshot_updates=_SNAPSHOT_UPDATES,
        recovery_s=fault_job.RECOVERY_S,
        where=results.measured_on(header),
        commits=header["commits"],
    )
    write_text(out / "faults.md", page)


def _row(faults: list[Fault], kinds: tuple[str, ...]) -> Row:
    first = faults[0]
    seconds = [fault.recovery_s for fault in faults]
    survived = [_count([fault for fault in faults if fault.kind == kind]) for kind in kinds]
    return Row(
        mode=first.mode,
        wire=first.wire,
        servers=first.servers,
        survived=survived,
        total=_count(faults),
        median_s=statistics.median(seconds),
        most_s=max(seconds),
    )


def _count(faults: list[Fault]) -> str:
    survived = [fault for fault in faults if not fault.trouble]
    return f"{len(survived)} of {len(faults)}" if faults else ""
