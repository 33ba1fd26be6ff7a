"""Whether injected faults are named: ``benchmarks/results/diagnosis.md``."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import yaml

from benchmarks.lab import pages
from scaletrain.errors import UserError
from scaletrain.rehearsal.machine import PATH
from scaletrain.rehearsal.scenario import Entrances
from scaletrain.run import progress, watch
from scaletrain.run.culprit import Culprit, Kind
from scaletrain.run.environment import Environment, environment
from scaletrain.run.layout import RunDir
from scaletrain.run.records import read_records
from scaletrain.scaling.show import results

FAULTS = Path("benchmarks/suites/diagnosis_faults.py")
WORKERS = 4
STEPS = 75
AT_STEP = 25  # the fault begins after so many steps
WITHIN_S, WITHIN_STEPS = 5.0, 20  # whichever comes later
TARGET = 0.95
CLEAN_RUNS = 30
LOOK_S = 0.4
SLOWER_S = 0.04  # a step, of the faults that are a time
LAUNCHERS = ("local", "rehearsal")
_STOLEN = f": {Kind.STOLEN_CORES} "  # in the sentences that name them
EXCHANGES = ("ring", "tree", "parameter_server")
# Not what is only known of ranks on another machine: here, all processes are on this one.
FAULT_KINDS = tuple(kind for kind in Kind if kind is not Kind.SILENT)
BANDWIDTH, SLOW_BANDWIDTH = "500Mbit", "40Mbit"
SLOW_BYTES_PER_S = 5e6  # of paced connections, where there is no emulated link
LOSS = 0.03  # of the packets into a host
# What cannot happen there.
IMPOSSIBLE = {
    (Kind.LOSS, "local"): "packets on one machine are not lost",
    (Kind.SLOW_LINK, "local", "parameter_server"): "workers and server share memory",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One run: the fault that is injected, or none."""

    kind: str  # of ``Kind``, or "clean"
    launcher: str
    exchange: str
    rank: int

    @property
    def name(self) -> str:
        """The key of its result."""
        return f"{self.kind} {self.launcher} {self.exchange} {self.rank}"


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What was named in one run."""

    case: Case
    named: str  # first, live, once the fault had begun, in words; empty: nobody
    is_right: bool  # kind and rank, in time
    after_s: float | None  # since the fault began
    after_steps: int | None
    at_the_end: str  # the last line of the run, or its first cause
    is_right_at_the_end: bool | None  # None: the job was ended before it could say
    early_alarms: list[str]  # named before the fault began
    step_ms: float | None  # before the fault, a median
    load: float  # average of a minute
    commit: str  # that was measured

    def to_json(self) -> dict[str, Any]:
        """Return it as the file of results holds it."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Outcome":
        """Return the outcome that a file of results holds."""
        return cls(**(value | {"case": Case(**value["case"])}))


@click.command("diagnosis")
@click.option("--only", default="", help="Only cases whose names contain this.")
@click.option("--clean", default=CLEAN_RUNS, show_default=True, help="Runs without a fault.")
@click.option("--again", is_flag=True, help="Run cases that have a result, too.")
@click.option("--minutes", default=60.0, show_default=True, help="Begin no case after that.")
@pages.out_option("diagnosis")
def command(only: str, clean: int, again: bool, minutes: float, out: Path) -> None:
    """Inject ten kinds of fault, and see whether rank and kind are named live.

    It goes on where an earlier call has stopped: a case that has a result is left out.

    \b
    Example:
      python -m benchmarks.lab diagnosis --only backward
    """
    if not shutil.which("iptables", path=PATH):
        raise UserError("diagnosis: needs iptables, which loses packets (apt install iptables)")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "diagnosis.json"
    outcomes: dict[str, Outcome] = {}
    remark = ""
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        remark = before.get("remark", "")
        for value in before["outcomes"]:
            outcome = Outcome.from_json(value)
            outcomes[outcome.case.name] = outcome
    header = environment()
    until = time.monotonic() + 60 * minutes
    for case in cases(clean):
        if only not in case.name or (case.name in outcomes and not again):
            continue
        if time.monotonic() > until:
            break
        outcome = run(case)
        outcomes[case.name] = outcome
        verdict = "right" if outcome.is_right else "WRONG"
        click.echo(f"{case.name}: {verdict}: {outcome.named or 'nobody named'}")
        write(out, header, outcomes, remark)


def write(out: Path, header: Environment, outcomes: dict[str, Outcome], remark: str) -> None:
    """Write the results and the page.

    Args:
        out: the directory.
        header: the facts about the machine.
        outcomes: by the names of their cases.
        remark: on how some of them were measured; empty: all alike.
    """
    values = [each.to_json() for each in outcomes.values()]
    document = {"environment": header, "remark": remark, "outcomes": values}
    text = json.dumps(document, indent=2) + "\n"
    (out / "diagnosis.json").write_text(text, encoding="utf-8")
    (out / "diagnosis.md").write_text(page(header, outcomes, remark), encoding="utf-8")


def cases(clean: int) -> list[Case]:
    """Return all cases: each kind under each launcher and exchange, and the clean runs."""
    every = []
    for at, launcher in enumerate(LAUNCHERS):
        for index, exchange in enumerate(EXCHANGES):
            for number, kind in enumerate(FAULT_KINDS):
                key = (kind, launcher)
                if key in IMPOSSIBLE or (*key, exchange) in IMPOSSIBLE:
                    continue
                rank = (number + index + at) % WORKERS
                every.append(Case(str(kind), launcher, exchange, rank))
        for number in range(at, clean, len(LAUNCHERS)):
            every.append(Case("clean", launcher, EXCHANGES[number // 2 % 3], number))
    return every


def configuration(case: Case) -> dict[str, Any]:
    """Return the job of a case: 30 ms of emulated computation, 1.2 MB of gradients."""
    kind = case.kind
    exchange: dict[str, Any] = {"name": "parameter_server"}
    if case.exchange != "parameter_server":
        exchange = {"name": "scheduled", "collective": case.exchange}
        if kind == Kind.SLOW_LINK:
            exchange["transport"] = "gloo"
    launcher: dict[str, Any] = {"name": case.launcher}
    if case.launcher == "rehearsal":
        launcher["bandwidth"] = BANDWIDTH
        if kind == Kind.SLOW_LINK:
            slow = {"at_step": AT_STEP, "slow": case.rank, "bandwidth": SLOW_BANDWIDTH}
            launcher["faults"] = [slow]
    fault = {"kind": kind, "rank": case.rank, "at_step": AT_STEP, "seconds": SLOWER_S}
    if kind == Kind.SLOW_LINK:
        fault["seconds"] = SLOW_BYTES_PER_S
        if case.launcher == "rehearsal":
            fault["kind"] = "played by the launcher"
    return {
        "model": {"name": "mlp", "sizes": [64, 512, 512, 10]},
        "data": f"{FAULTS.stem}:data",
        "batch_size": 32,
        "steps": STEPS,
        "compute": {"step_s": 0.03},
        "workers": WORKERS,
        "threads": 1,
        "timeout_s": 30,
        "log_every": 1000,
        "exchange": exchange,
        "launcher": launcher,
        "callbacks": [{"name": f"{FAULTS.stem}:faults", **fault}],
    }


def run(case: Case) -> Outcome:
    """Run one case, and look at it as ``scaletrain top`` does."""
    with tempfile.TemporaryDirectory(prefix="diagnosis-") as folder:
        path = Path(folder) / "job.yaml"
        path.write_text(yaml.safe_dump(configuration(case)), encoding="utf-8")
        shutil.copy(FAULTS, folder)
        files = RunDir(Path(folder) / "run")
        with _started(path, files, Path(folder) / "output") as job:
            watched = _Watched(case, files)
            while job.poll() is None:
                time.sleep(LOOK_S)
                watched.look()
                if watched.is_done:
                    _end(job)
            watched.look()
        return watched.outcome((Path(folder) / "output").read_text(errors="replace"))


@contextlib.contextmanager
def _started(config: Path, files: RunDir, output: Path) -> Iterator[subprocess.Popen]:
    argv = [sys.executable, "-m", "scaletrain.cli", "train", str(config)]
    with open(output, "wb") as file:
        # A group of its own, so that Ctrl-C comes to this process, which ends the job.
        job = subprocess.Popen(
            [*argv, "--run-dir", str(files.path)],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield job
    finally:
        if job.poll() is None:
            _end(job)
        job.wait(60)


def _end(job: subprocess.Popen) -> None:
    """End a job at once: the second signal does."""
    for _ in range(2):
        if job.poll() is None:
            job.send_signal(signal.SIGTERM)
            time.sleep(0.3)


class _Watched:
    """A run while it is looked at."""

    def __init__(self, case: Case, files: RunDir):
        self._case = case
        self._files = files
        self._began_at: float | None = None  # when the fault did, in unix seconds
        self._began_step = AT_STEP
        self._early: list[str] = []
        self._named: Culprit | None = None
        self._wrong: Culprit | None = None
        self._after: tuple[float, int] | None = None
        self._num_steps = 0
        self._step_s: float | None = None

    @property
    def is_done(self) -> bool:
        """Whether a job that would hang has shown all it can."""
        if self._case.kind != Kind.STOPPED or self._began_at is None:
            return False
        return self._after is not None or time.time() - self._began_at > 2 * WITHIN_S

    def look(self) -> None:
        """Look once: begin the fault if it is time, and note who is named."""
        statuses = watch.ranks(self._files)
        steps = [status.report.num_steps for status in statuses]
        self._num_steps = max([0, *steps])
        culprits = watch.culprits(self._files, statuses)
        if self._began_at is None and len(steps) == WORKERS and min(steps) >= AT_STEP:
            self._step_s = statuses[0].step_s
            self._began_at = self._first_slow_step_at()
            self._play()
        if not culprits:
            return
        first = culprits[0]
        if self._began_at is None or self._case.kind == "clean":
            self._early.append(first.sentence())
        elif self._after is None and _is_right(self._case, first):
            self._named = first
            after_s = time.time() - self._began_at
            self._after = (after_s, self._num_steps - self._began_step)
        elif self._after is None and self._wrong is None:
            self._wrong = first

    def _first_slow_step_at(self) -> float:
        """Return when the fault began: with a step, or else now."""
        for record in read_records(self._files.records(self._case.rank % WORKERS)):
            if record.step >= AT_STEP:
                return record.time
        return time.time()

    def _play(self) -> None:
        """Play a fault that comes from outside the worker."""
        case = self._case
        if case.kind in (Kind.LOSS, Kind.STOPPED, Kind.DEAD):
            self._began_at = time.time()
            self._began_step = self._num_steps
        if case.kind == Kind.LOSS:
            entrances = Entrances.read(self._files.rehearsal.cluster)
            rule = f"-A INPUT -i eth0 -m statistic --mode random --probability {LOSS} -j DROP"
            argv = [*entrances.commands[case.rank], "iptables", *rule.split()]
            subprocess.run(argv, check=True, timeout=10)
        number = {Kind.STOPPED: signal.SIGSTOP, Kind.DEAD: signal.SIGKILL}.get(case.kind)  # type: ignore[call-overload]
        report = progress.read(self._files, case.rank)
        if number is not None and report is not None:
            os.kill(report.pid, number)

    def outcome(self, output: str) -> Outcome:
        """Return what was named."""
        case = self._case
        at_the_end = watch.culprits_of_run(self._files)[:1]
        if case.kind in (Kind.STOPPED, Kind.DEAD):
            at_the_end = watch.culprits(self._files, [])
        end = at_the_end[0] if at_the_end else None
        named = self._wrong or self._named
        in_time = self._after is not None and (
            self._after[0] <= WITHIN_S or self._after[1] <= WITHIN_STEPS
        )
        if case.kind == "clean":
            right = not self._early
            right_at_end: bool | None = end is None
        else:
            right = in_time and self._wrong is None
            right_at_end = end is not None and _is_right(case, end)
        if case.kind == Kind.STOPPED:
            right_at_end = None
        if self._began_at is None:
            lines = output.strip().splitlines()
            raise click.ClickException(f"{case.name}: {lines[-1] if lines else 'no output'}")
        return Outcome(
            case=case,
            named=named.sentence() if named else "",
            is_right=right,
            after_s=self._after[0] if self._after else None,
            after_steps=self._after[1] if self._after else None,
            at_the_end=end.sentence() if end else "",
            is_right_at_the_end=right_at_end,
            early_alarms=self._early[:3],
            step_ms=1e3 * self._step_s if self._step_s else None,
            load=os.getloadavg()[0],
            commit=environment()["commit"] or "",
        )


def _is_right(case: Case, culprit: Culprit) -> bool:
    """Return True if the culprit is the fault: its kind, and its rank or a link at this rank."""
    if culprit.kind != case.kind:
        return False
    if culprit.link is not None:
        return case.rank in culprit.ranks
    return culprit.ranks == (case.rank,)


def page(header: Environment, outcomes: dict[str, Outcome], remark: str = "") -> str:
    """Return the page."""
    faults = [outcome for outcome in outcomes.values() if outcome.case.kind != "clean"]
    clean = [outcome for outcome in outcomes.values() if outcome.case.kind == "clean"]
    rows = []
    for kind in FAULT_KINDS:
        cells = []
        for launcher in LAUNCHERS:
            for exchange in EXCHANGES:
                cells.append(_cell(str(kind), launcher, exchange, faults))
        rows.append((str(kind), cells))
    right = [outcome for outcome in faults if outcome.is_right]
    loads = [outcome.load for outcome in outcomes.values()]
    return pages.markdown(
        "diagnosis.md",
        rows=rows,
        launchers=LAUNCHERS,
        exchanges=EXCHANGES,
        faults=faults,
        wrong=[outcome for outcome in faults if not outcome.is_right],
        right=len(right),
        share=len(right) / len(faults) if faults else 0.0,
        at_the_end=len([outcome for outcome in faults if outcome.is_right_at_the_end]),
        clean=clean,
        remark=remark,
        commits=list(dict.fromkeys(outcome.commit for outcome in outcomes.values())),
        stolen=[outcome for outcome in faults if _names_stolen_cores(outcome)],
        stolen_alarms=[
            outcome for outcome in clean if any(_STOLEN in alarm for alarm in outcome.early_alarms)
        ],
        ended=len([outcome for outcome in faults if outcome.is_right_at_the_end is not None]),
        alarms=[outcome for outcome in clean if not outcome.is_right],
        alarms_at_the_end=[outcome for outcome in clean if not outcome.is_right_at_the_end],
        target=TARGET,
        wanted_clean=CLEAN_RUNS,
        num_cases=len(cases(0)),
        workers=WORKERS,
        within_s=WITHIN_S,
        within_steps=WITHIN_STEPS,
        slower_ms=1e3 * SLOWER_S,
        bandwidths=(BANDWIDTH, SLOW_BANDWIDTH),
        loss=LOSS,
        loads=(min(loads), max(loads)),
        where=results.measured_on(header),
    )


def _names_stolen_cores(outcome: Outcome) -> bool:
    """Return True if cores were stolen by others than the fault, and were named for it.

    More processes wanted the cores than there are.
    """
    is_busy = outcome.load > (os.cpu_count() or 1)
    is_injected = outcome.case.kind == Kind.STOLEN_CORES
    return not outcome.is_right and is_busy and not is_injected and _STOLEN in outcome.named


def _cell(kind: str, launcher: str, exchange: str, faults: list[Outcome]) -> str:
    reason = IMPOSSIBLE.get((kind, launcher)) or IMPOSSIBLE.get((kind, launcher, exchange))
    if reason:
        return "-"
    for outcome in faults:
        case = outcome.case
        if (case.kind, case.launcher, case.exchange) == (kind, launcher, exchange):
            if not outcome.is_right:
                return f"WRONG (rank {case.rank})"
            return f"rank {case.rank}: {outcome.after_s:.1f} s, {outcome.after_steps} steps"
    return "not run"
