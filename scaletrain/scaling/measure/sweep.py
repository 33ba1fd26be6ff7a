"""A sweep: one ``scaletrain train`` for every cell, repeated and interleaved.

A cell is a number of workers under one exchange and variant. Each run of a cell is a process of
its own and lies in OUT/cells/<cell>/<repeat>/. A sweep that was stopped goes on where it was, and a
cell that fails loses nothing but itself.
"""

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from scaletrain import config as configuration
from scaletrain.config import RunConfig, presence
from scaletrain.errors import UserError
from scaletrain.host import cores as host_cores
from scaletrain.launching.job import Program
from scaletrain.run.atomic import write_json
from scaletrain.run.environment import environment
from scaletrain.scaling.measure import trainings
from scaletrain.scaling.measure.against import Version
from scaletrain.scaling.model import Cell, ReportHeader, Scalar, Source, SweepPlan

REFERENCE_STEPS = 60  # of the short runs that only the split of lost time needs
# Settings that the sweep gives every cell itself, and the option that decides each.
DECIDED = {
    "workers": "--workers", "exchange": "--exchange", "batch_mode": "--mode", "threads": "--threads", "launcher": "--launcher",
    "launcher.name": "--launcher", "launcher.bind": "--bind", "run_dir": "--out",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Request:
    """The options of a sweep, before they are checked (see ``plan``)."""

    configs: Sequence[Path]
    workers: Sequence[int]  # worker counts
    exchanges: Sequence[str]  # labels, such as ring@gloo
    mode: str = "strong"  # or weak
    repeats: int = 5
    settings: Sequence[str] = ()  # KEY=VALUE of every cell
    vary: Mapping[str, Sequence[Scalar]] = dataclasses.field(default_factory=dict)
    launcher: str | None = None  # None: the config's
    threads: int | None = None  # of each worker; None: the cores shared by the most workers
    bind: bool | None = None  # None: if the launcher is local and the cores suffice
    split: bool = True  # whether to run the references that the split of lost time needs
    cell_timeout_s: float = 600.0
    cold: bool = False  # whether each worker imports torch itself


class Sweep(SweepPlan):
    """The cells of a plan, and the command of each."""

    def cells(self) -> list[Cell]:
        """Return the cells that were asked for, then the references of the split."""
        return list(self._cells)

    @functools.cached_property
    def _cells(self) -> tuple[Cell, ...]:
        """The cells. Finding them resolves a configuration for each variant and worker count."""
        cells: list[Cell] = []
        for stem, source in self.configs.items():
            for variant in variants(self.vary):
                for workers in self.workers:
                    # Resolved without an exchange, which does not decide the batch size.
                    batch_size = self._resolve(source, variant, workers).batch_size
                    cells += [
                        Cell(stem, exchange, workers, batch_size, variant)
                        for exchange in self.exchanges
                    ]
        if self.split:
            cells += self._references(cells)
        return tuple(cells)

    def _references(self, cells: Sequence[Cell]) -> list[Cell]:
        """Return the short cells that the split of lost time needs beside those asked for.

        These are ``none`` at each worker count, and one worker at each worker's share of the
        batch, which strong scaling shrinks.
        """
        wanted: list[Cell] = []
        for cell in cells:
            same_workers = dataclasses.replace(cell, exchange="none", reference=True)
            wanted.append(same_workers)
            # The single worker with the cell's own batch, which the ideal step is made of.
            wanted.append(dataclasses.replace(same_workers, workers=1))
            if self.mode == "strong" and cell.workers > 1:
                variant = cell.variant_but_batch
                wanted.append(Cell(cell.config, "none", 1, cell.share, variant, reference=True))
        # A cell that is measured in full length is its own reference.
        measured = {dataclasses.replace(cell, reference=True) for cell in cells}
        return [cell for cell in dict.fromkeys(wanted) if cell not in measured]

    def check_presence(self) -> None:
        """Raise ``UserError`` if this host lacks something that a cell needs."""
        for source in self.configs.values():
            for variant in variants(self.vary):
                run = self._resolve(source, variant, self.workers[0])
                presence.check(run, f"{source.path}: ")

    def _resolve(
        self, source: Source, variant: Sequence[tuple[str, Scalar]], workers: int
    ) -> RunConfig:
        """Return the configuration of a cell.

        Raises:
            UserError: it has a mistake, which shows before anything has run.
        """
        # Later ones win: what the sweep decides comes last.
        settings: dict[str, Scalar] = {"launcher": self.launcher}
        settings |= dict(configuration.parse_setting(text) for text in self.settings)
        settings |= dict(variant)
        settings |= {"workers": workers, "batch_mode": self.mode}
        return configuration.load(Path(source.path), settings)

    def command(self, cell: Cell, run_dir: Path, trace: bool = False) -> list[str]:
        """Return the command that a person would type for this cell."""
        source = self.configs[cell.config]
        command = [
            *Program.COMMAND_LINE.command("train", source.path, "--workers", cell.workers),
            "--exchange",
            cell.exchange,
            "--run-dir",
            str(run_dir),
            "--launcher",
            self.launcher,
        ]
        for setting in self._settings(cell, trace=trace):
            command += ["--set", setting]
        if self.cold:
            command.append("--cold")
        return command

    def _settings(self, cell: Cell, *, trace: bool) -> list[str]:
        """Return KEY=VALUE of everything that a cell sets."""
        settings = [
            *self.settings,
            f"batch_mode={self.mode}",
            f"threads={self.threads}",
            f"batch_size={cell.batch_size}",
        ]
        for key, value in cell.variant_but_batch:
            if _has_host(key, cell.workers):
                # --set reads YAML, of which JSON is a part: null and true arrive as such.
                settings.append(f"{key}={json.dumps(value)}")
        if self.bind:
            settings.append("launcher.bind=true")
        if cell.reference:
            # A config that ends sooner keeps its own end. A run may have steps or epochs, not both.
            run = self._resolve(self.configs[cell.config], cell.variant, 1)
            if run.steps is None or run.steps > REFERENCE_STEPS:
                settings += [f"steps={REFERENCE_STEPS}", "epochs=null"]
            # The split needs the mean step alone: evaluations would only take time.
            settings += ["evaluate_every=null", "target_accuracy=null"]
        if trace:
            settings.append("trace=true")
        return settings

    def header(self) -> ReportHeader:
        """Return where and how the cells are measured, for the report."""
        return dataclasses.replace(
            ReportHeader.from_json(environment()),
            created=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            mode=self.mode,
            repeats=self.repeats,
            threads_per_worker=self.threads,
            bound_to_cores=self.bind,
            launcher=self.launcher,
            settings=self.settings,
            vary=self.vary,
            config={stem: source.text for stem, source in self.configs.items()},
        )


def _has_host(key: str, workers: int) -> bool:
    """Whether a cell has the host that a setting is about, if the setting is about one.

    A straggler may be a host that cells of fewer workers do without.
    """
    host = key.removeprefix("launcher.straggler.")
    return host == key or not host.isdigit() or int(host) < workers


def variants(vary: Mapping[str, Sequence[Scalar]]) -> list[tuple[tuple[str, Scalar], ...]]:
    """Return every combination of the varied keys' values.

    >>> variants({"a": [1, 2]})
    [(('a', 1),), (('a', 2),)]
    >>> variants({})
    [()]
    """
    combined: list[tuple[tuple[str, Scalar], ...]] = [()]
    for key, values in vary.items():
        longer = []
        for before in combined:
            longer += [(*before, (key, value)) for value in values]
        combined = longer
    return combined


def plan(request: Request) -> Sweep:
    """Check everything that a sweep needs before its first cell runs.

    Every cell gives its workers the same number of threads: the cores divided by the largest
    worker count. A worker more is then cores more, as on a cluster.

    Raises:
        UserError: a mistake in a config, an exchange or a setting; a setting that the sweep
            decides; two configs of the same name.
    """
    sources = _sources(request.configs)
    for exchange in request.exchanges:
        configuration.expand_exchange(exchange)
    _check_keys("--set", [configuration.parse_setting(text)[0] for text in request.settings])
    _check_keys("--vary", request.vary)
    for key, values in request.vary.items():
        if any(isinstance(value, dict | list) for value in values):
            raise UserError(
                f"--vary {key}: {values!r} is not allowed"
                f" (allowed: numbers and words, such as {key}=1,2)"
            )
    # Every cell has the same launcher, so that one config has to decide it.
    last = configuration.load(request.configs[-1], {"workers": 1})
    launcher = request.launcher or last.launcher.name
    cores = host_cores.count()
    most_workers = max(request.workers)
    threads = request.threads or max(1, cores // most_workers)
    bind = request.bind
    if bind is None:
        # The largest cell decides for all: cells that are bound differently do not compare.
        bind = launcher == "local" and threads * most_workers <= cores
    if bind and launcher != "local":
        raise UserError(f"--bind: only the launcher local binds workers to cores, not {launcher}")
    sweep = Sweep(
        configs=sources,
        workers=tuple(request.workers),
        exchanges=tuple(request.exchanges),
        mode=request.mode,
        repeats=request.repeats,
        settings=tuple(request.settings),
        vary={key: list(values) for key, values in request.vary.items()},
        launcher=launcher,
        threads=threads,
        bind=bind,
        split=request.split,
        cell_timeout_s=request.cell_timeout_s,
        cold=request.cold,
    )
    sweep.cells()  # resolves every cell's configuration, which finds the other mistakes
    if launcher == "local":  # others may start workers elsewhere
        sweep.check_presence()
    return sweep


def _sources(paths: Sequence[Path]) -> dict[str, Source]:
    """Read the configs, by their stems."""
    sources: dict[str, Source] = {}
    for path in paths:
        if path.stem in sources:
            raise UserError(f"{path}: two configs are called {path.stem}; rename one")
        configuration.load(path, {"workers": 1})
        sources[path.stem] = Source(str(path.resolve()), path.read_text(encoding="utf-8"))
    return sources


def _check_keys(option: str, keys: Sequence[str] | Mapping[str, object]) -> None:
    """Refuse settings that the sweep gives every cell itself."""
    for key in keys:
        if key in DECIDED:
            raise UserError(
                f"{option} {key}: the sweep decides it for every cell (give {DECIDED[key]})"
            )


def claim(out: Path, sweep: Sweep) -> None:
    """Create OUT, or go on in one with cells of the same meaning.

    Workers, exchanges, repeats and values of ``--vary`` may be added.

    Raises:
        UserError: OUT holds cells that were measured in another way.
    """
    path = _plan_path(out)
    # Before anything is written: a refused sweep leaves OUT as it was.
    if path.exists():
        _check_same(out, read(out), sweep)
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, sweep.to_json())


def _check_same(out: Path, before: Sweep, now: Sweep) -> None:
    """Refuse a sweep if its cells were measured in another way before."""
    for stem, source in now.configs.items():
        if stem in before.configs and before.configs[stem].text != source.text:
            raise _differs(out, "configs differs")
    # Workers, exchanges, repeats and --vary may grow: they add cells and change none.
    for name in ("mode", "settings", "launcher", "threads", "bind"):
        value_before, value_now = before.to_json()[name], now.to_json()[name]
        if value_before != value_now:
            raise _differs(out, f"{name} differs ({value_before!r}, now {value_now!r})")


def _differs(out: Path, difference: str) -> UserError:
    return UserError(
        f"--out {out}: holds cells of another sweep: {difference} (allowed: another directory)"
    )


def _plan_path(out: Path) -> Path:
    """Return the file in which a sweep notes its cells, so that a resume means the same."""
    return out / "sweep.json"


def read(out: Path) -> Sweep:
    """Return the sweep that this directory belongs to.

    Raises:
        UserError: it is not the directory of a sweep.
    """
    try:
        text = _plan_path(out).read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: no sweep (sweep.json: {error.strerror})") from None
    return Sweep.from_json(json.loads(text))


def _header_path(out: Path) -> Path:
    return out / "header.json"


def write_header(out: Path, header: ReportHeader) -> None:
    """Note where and how the cells are measured, when measuring begins."""
    write_json(_header_path(out), header.to_json())


def read_header(out: Path) -> ReportHeader | None:
    """Return the header that was noted when measuring began; None if none was.

    Rendering again must not claim to have measured here and now.
    """
    try:
        text = _header_path(out).read_text(encoding="utf-8")
    except OSError:
        return None
    return ReportHeader.from_json(json.loads(text))


def run_dir(out: Path, cell: Cell, repeat: int) -> Path:
    """Return the run directory of one repeat of a cell."""
    return out / "cells" / cell.name / str(repeat)


def order(cells: Sequence[Cell], repeats: int) -> Iterator[tuple[Cell, int]]:
    """Yield (cell, repeat) in the order in which they run.

    Repeats are interleaved, every second one backwards: a machine that drifts does not favour a
    cell.
    """
    for repeat in range(repeats):
        for cell in cells if repeat % 2 == 0 else reversed(cells):
            yield cell, repeat


@dataclasses.dataclass(frozen=True)
class Against:
    """The other side of a sweep whose runs take turns with those of another version."""

    version: Version
    out: Path  # the directory of its runs, which ``claim`` made


def run(
    sweep: Sweep,
    out: Path,
    tell: Callable[[str], None],
    *,
    trace: bool = False,
    against: Against | None = None,
) -> None:
    """Run every missing repeat of every cell, as ``trainings.run`` does.

    Args:
        sweep: the plan.
        out: the sweep's directory, which ``claim`` made.
        tell: is called with one line about each repeat.
        trace: whether first repeats also record the events of a trace.
        against: another version, which runs each repeat of each cell but the references just
            before or after this one.
    """
    series: list[trainings.Training] = []
    for cell, repeat in order(sweep.cells(), sweep.repeats):
        turns = [_training(sweep, out, cell, repeat, trace=trace)]
        if against and not cell.reference:
            other = _training(sweep, against.out, cell, repeat, trace=trace)
            title = f"{other.title} of {against.version.name}"
            environ = against.version.environ
            turns.append(dataclasses.replace(other, title=title, environ=environ))
        # Who begins changes from repeat to repeat.
        series += turns if repeat % 2 == 0 else reversed(turns)
    missing = trainings.missing(series)
    with trainings.starter(missing, sweep.threads, cold=sweep.cold) as starter:
        trainings.run(missing, starter, tell, out)


def _training(
    sweep: Sweep, out: Path, cell: Cell, repeat: int, *, trace: bool
) -> trainings.Training:
    """Return the training of one repeat of a cell, below a sweep's directory."""
    directory = run_dir(out, cell, repeat)
    return trainings.Training(
        title=f"{cell.name} repeat {repeat + 1}",
        run_dir=directory,
        command=sweep.command(cell, directory, trace and repeat == 0),
        launcher=sweep.launcher,
        timeout_s=sweep.cell_timeout_s,
    )
