"""A sweep: every cell (workers, exchange, variant) is one ``scaletrain train`` in a process of its own, repeated and interleaved.

What is measured lies in OUT/cells/<cell>/<repeat>/, so a sweep that was stopped goes on where it was, and a cell that fails loses
nothing but itself.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scaletrain import config as configuration
from scaletrain.errors import UserError
from scaletrain.host.processes import dies_with_parent
from scaletrain.launching.job import Program
from scaletrain.run.atomic import write_json
from scaletrain.run.environment import environment
from scaletrain.run.layout import RunDir
from scaletrain.scaling.measure import machine
from scaletrain.scaling.model import Cell, Header

FAILED = "failed.json"  # in a run's directory: why the repeat failed
REFERENCE_STEPS = 60  # of the short runs that only the split of lost time needs
OWN = {  # settings that the sweep gives every cell itself, and the option that decides them
    "workers": "--workers", "exchange": "--exchange", "batch_mode": "--mode", "threads": "--threads", "launcher": "--launcher",
    "launcher.name": "--launcher", "launcher.bind": "--bind", "run_dir": "--out",
}  # fmt: skip


class Sweep(NamedTuple):
    """Everything that decides what the cells are; written to OUT/sweep.json so that a resume means the same."""

    configs: dict[str, dict[str, str]]  # stem -> {path, text}
    workers: tuple[int, ...]
    exchanges: tuple[str, ...]
    mode: str
    repeats: int
    settings: tuple[str, ...]  # KEY=VALUE, of every cell
    vary: dict[str, list[Any]]
    launcher: str
    threads: int
    bind: bool
    split: bool  # whether reference cells are run
    cell_timeout_s: float

    def cells(self) -> list[Cell]:
        """The cells that were asked for, then the references that the split of lost time needs."""
        cells: list[Cell] = []
        for stem, source in self.configs.items():
            for variant in variants(self.vary):
                for workers in self.workers:
                    batch = self._resolve(source, variant, workers).batch_size
                    cells += [
                        Cell(stem, exchange, workers, batch, variant) for exchange in self.exchanges
                    ]
        return cells + (self._references(cells) if self.split else [])

    def _references(self, cells: Sequence[Cell]) -> list[Cell]:
        """``none`` at each worker count, and one worker at each worker's share of the batch (strong scaling shrinks it)."""
        wanted: list[Cell] = []
        for cell in cells:
            same_workers = dataclasses.replace(cell, exchange="none", reference=True)
            wanted.append(same_workers)
            wanted.append(dataclasses.replace(same_workers, workers=1))
            if self.mode == "strong" and cell.workers > 1:
                variant = cell.variant_but_batch
                wanted.append(Cell(cell.config, "none", 1, cell.share, variant, reference=True))
        measured = {dataclasses.replace(cell, reference=True) for cell in cells}
        return [cell for cell in dict.fromkeys(wanted) if cell not in measured]

    def _resolve(
        self, source: Mapping[str, str], variant: Sequence[tuple[str, Any]], workers: int
    ) -> Any:
        """The cell's RunConfig: raises ``UserError`` before anything has run."""
        settings = (
            {"launcher": self.launcher}
            | dict(configuration.parse_setting(text) for text in self.settings)
            | dict(variant)
        )
        settings |= {"workers": workers, "batch_mode": self.mode}
        return configuration.load(Path(source["path"]), settings)

    def command(self, cell: Cell, run_dir: Path, trace: bool = False) -> list[str]:
        """What a person would type for this cell."""
        source = self.configs[cell.config]
        settings = [
            *self.settings,
            f"batch_mode={self.mode}",
            f"threads={self.threads}",
            f"batch_size={cell.batch_size}",
        ]
        settings += [
            f"{key}={json.dumps(value)}"
            for key, value in cell.variant
            if key != "batch_size" and _is_there(key, cell.workers)
        ]
        if self.bind:
            settings.append("launcher.bind=true")
        if cell.reference:
            run = self._resolve(source, cell.variant, 1)
            if run.steps is None or run.steps > REFERENCE_STEPS:
                settings += [f"steps={REFERENCE_STEPS}", "epochs=null"]
            settings += ["evaluate_every=null", "target_accuracy=null"]
        if trace:
            settings.append("trace=true")
        arguments = ["train", source["path"], "--workers", cell.workers]
        command = [*Program.COMMAND_LINE.command(*arguments)]
        command += ["--exchange", cell.exchange, "--run-dir", str(run_dir)]
        command += ["--launcher", self.launcher]
        return command + [word for setting in settings for word in ("--set", setting)]

    def header(self) -> Header:
        """Return where and how the cells are measured, for the report."""
        return dataclasses.replace(
            Header.from_json(environment()),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            mode=self.mode,
            repeats=self.repeats,
            threads_per_worker=self.threads,
            bound_to_cores=self.bind,
            launcher=self.launcher,
            settings=self.settings,
            vary=self.vary,
            config={stem: source["text"] for stem, source in self.configs.items()},
        )

    def as_json(self) -> dict[str, Any]:
        return self._asdict()

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Sweep":
        known = {key: value[key] for key in cls._fields}
        for key in ("workers", "exchanges", "settings"):
            known[key] = tuple(known[key])
        return cls(**known)


def _is_there(key: str, workers: int) -> bool:
    """Whether a cell has what a setting is about: a straggler may be a host that cells of fewer workers do without."""
    host = key.removeprefix("launcher.straggler.")
    return host == key or not host.isdigit() or int(host) < workers


def variants(vary: Mapping[str, Sequence[Any]]) -> list[tuple[tuple[str, Any], ...]]:
    """Every combination of the varied keys' values; one empty variant when nothing is varied."""
    combined: list[tuple[tuple[str, Any], ...]] = [()]
    for key, values in vary.items():
        combined = [(*before, (key, value)) for before in combined for value in values]
    return combined


def plan(
    paths: Sequence[Path],
    workers: Sequence[int],
    exchanges: Sequence[str],
    *,
    mode: str = "strong",
    repeats: int = 5,
    settings: Sequence[str] = (),
    vary: Mapping[str, Sequence[Any]] | None = None,
    launcher: str | None = None,
    threads: int | None = None,
    bind: bool | None = None,
    split: bool = True,
    cell_timeout_s: float = 600.0,
) -> Sweep:
    """Check everything a sweep needs before its first cell runs.

    Threads per worker: the same in every cell, the cores divided by the largest worker count, so that a worker more is cores
    more, as on a cluster. Workers are bound to cores when the launcher is ``local`` and the cores suffice.

    Raises:
        UserError: a mistake in a config, an exchange or a setting; a setting that the sweep decides; two configs of the same name.
    """
    sources: dict[str, dict[str, str]] = {}
    for path in paths:
        if path.stem in sources:
            raise UserError(f"{path}: two configs are called {path.stem}; rename one")
        run = configuration.load(path, {"workers": 1})
        sources[path.stem] = {"path": str(path.resolve()), "text": path.read_text(encoding="utf-8")}
    for exchange in exchanges:
        configuration.expand_exchange(exchange)
    for option, keys in (
        ("--set", [configuration.parse_setting(text)[0] for text in settings]),
        ("--vary", vary or ()),
    ):
        for key in set(keys) & set(OWN):
            raise UserError(
                f"{option} {key}: the sweep decides it for every cell (give {OWN[key]})"
            )
    for key, values in (vary or {}).items():
        if any(isinstance(value, dict | list) for value in values):
            raise UserError(
                f"--vary {key}: {values!r} is not allowed (allowed: numbers and words, such as {key}=1,2)"
            )
    cores = len(os.sched_getaffinity(0))
    threads = threads or max(1, cores // max(workers))
    launched_by = launcher or run.launcher.name
    if bind is None:
        bind = launched_by == "local" and threads * max(workers) <= cores
    if bind and launched_by != "local":
        raise UserError(
            f"--bind: only the launcher local binds workers to cores, not {launched_by}"
        )
    sweep = Sweep(
        sources, tuple(workers), tuple(exchanges), mode, repeats, tuple(settings),
        {key: list(values) for key, values in (vary or {}).items()}, launched_by, threads, bind, split, cell_timeout_s,
    )  # fmt: skip
    sweep.cells()
    return sweep


def claim(out: Path, sweep: Sweep) -> None:
    """Make OUT, or go on in one whose cells mean the same (workers, exchanges, repeats and values of --vary may be added).

    Raises:
        UserError: OUT holds cells that were measured in another way.
    """
    path = out / "sweep.json"
    fixed = ("configs", "mode", "settings", "launcher", "threads", "bind")
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        now = json.loads(json.dumps(sweep.as_json()))
        for key in fixed:
            if key == "configs":
                same = all(
                    before[key][stem]["text"] == text["text"]
                    for stem, text in now[key].items()
                    if stem in before[key]
                )
            else:
                same = before[key] == now[key]
            if not same:
                what = "" if key == "configs" else f" ({before[key]!r}, now {now[key]!r})"
                raise UserError(
                    f"--out {out}: holds cells of another sweep: {key} differs{what} (allowed: another directory)"
                )
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, sweep.as_json())


def read(out: Path) -> Sweep:
    """Return the sweep whose directory this is.

    Raises:
        UserError: it is not the directory of a sweep.
    """
    try:
        text = (out / "sweep.json").read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: no sweep (sweep.json: {error.strerror})") from None
    return Sweep.from_json(json.loads(text))


def read_failure(directory: Path) -> str | None:
    """Return why a repeat failed; None if it did not, or has not run yet."""
    path = directory / FAILED
    if not path.exists():
        return None
    return json.loads(path.read_text(encoding="utf-8"))["reason"]


def run_dir(out: Path, cell: Cell, repeat: int) -> Path:
    return out / "cells" / cell.name / str(repeat)


def order(cells: Sequence[Cell], repeats: int) -> Iterator[tuple[Cell, int]]:
    """Repeats are interleaved, every second one backwards: a machine that drifts does not favour a cell."""
    for repeat in range(repeats):
        for cell in cells if repeat % 2 == 0 else reversed(cells):
            yield cell, repeat


def run(sweep: Sweep, out: Path, tell: Callable[[str], None], *, trace: bool = False) -> None:
    """Run every missing repeat of every cell. Failures are kept as ``failed.json``; Ctrl-C or a signal ends the cell and the sweep.

    ``trace``: first repeats also record what a trace shows.
    """
    todo = [
        (cell, repeat)
        for cell, repeat in order(sweep.cells(), sweep.repeats)
        if not RunDir(run_dir(out, cell, repeat)).has_finished()
    ]
    started = time.monotonic()
    for number, (cell, repeat) in enumerate(todo, 1):
        directory = run_dir(out, cell, repeat)
        if directory.exists():
            shutil.rmtree(directory)  # half a run; this sweep made it
        directory.parent.mkdir(parents=True, exist_ok=True)
        began, watch = time.monotonic(), machine.Watch()
        try:
            reason = _run_cell(
                sweep.command(cell, directory, trace and repeat == 0),
                directory,
                sweep.cell_timeout_s,
            )
        except BaseException:
            tell(
                f"stopped: {len(todo) - number + 1} runs are missing; the same command with --out {out} goes on"
            )
            raise
        if reason:
            directory.mkdir(exist_ok=True)
            write_json(directory / FAILED, {"reason": reason})
        elif sweep.launcher in machine.CHILDREN:
            others = watch.others()
            if others is not None:
                machine.write(directory, others)
        outcome = f"FAILED: {reason}" if reason else f"{time.monotonic() - began:.1f} s"
        left_s = (time.monotonic() - started) / number * (len(todo) - number)
        to_go = f"{left_s / 60:.0f} min" if left_s > 90 else f"{left_s:.0f} s"
        tell(
            f"[{number}/{len(todo)}] {cell.name} repeat {repeat + 1}: {outcome} (about {to_go} to go)"
        )


def _run_cell(command: Sequence[str], directory: Path, timeout_s: float) -> str | None:
    """Run one training; returns why it failed, None when it did not."""
    log = directory.with_name(f"{directory.name}.log")
    with open(log, "w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=dies_with_parent(signal.SIGTERM),
        )  # fmt: skip
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            _stop(process)
            return f"not done after the time limit of {timeout_s:g} s a cell"
        except BaseException:
            _stop(process)
            raise
    if status == 0 and RunDir(directory).has_finished():
        return None
    return _reason(directory, log, status)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the launcher to stop its workers; then end the whole session it leads."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _reason(directory: Path, log: Path, status: int) -> str:
    """The first cause: the earliest failure that is not the loss of a peer, else the last line the command printed."""
    failures = []
    for path in directory.glob("failure-*.json"):
        with contextlib.suppress(OSError, ValueError):
            failures.append(json.loads(path.read_text(encoding="utf-8")))
    failures.sort(
        key=lambda failure: (failure.get("kind") in ("peer", "launcher"), failure.get("time", 0))
    )
    if failures:
        first = failures[0]
        at = f" at step {first['step']}" if first.get("step") is not None else ""
        return f"rank {first.get('rank')}{at}: {first.get('message', 'failed')}"
    lines = [
        line.strip()
        for line in log.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.strip()
    ]
    errors = [line for line in lines if "error" in line.lower()]
    told = (errors or lines or ["it printed nothing"])[-1]
    return f"exit status {status}: {told[:300]}"
