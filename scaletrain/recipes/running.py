"""Run a recipe: train its variants with each seed, and judge its claims."""

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scaletrain.config import RunConfig, presence
from scaletrain.errors import UserError
from scaletrain.launching.job import Program
from scaletrain.recipes import judging
from scaletrain.recipes.recipe import Recipe
from scaletrain.run.atomic import write_json, write_text
from scaletrain.run.layout import RunDir
from scaletrain.scaling.measure import machine, trainings
from scaletrain.scaling.measure.trainings import Training


@dataclasses.dataclass(frozen=True)
class Request:
    """How recipes are run."""

    scale: str = "small"
    workers: int = 1  # of every variant that does not set them itself
    seeds: int | None = None  # None: the recipe's
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    cold: bool = False  # whether each worker imports torch itself
    timeout_s: float = 600.0  # of one training


@dataclasses.dataclass(frozen=True)
class Plan:
    """A recipe's trainings in their order."""

    recipe: Recipe
    request: Request
    out: Path
    configs: Mapping[Path, RunConfig]  # by the file that holds it
    series: tuple[Training, ...]
    run_dirs: Mapping[str, tuple[Path, ...]]  # of each variant, by seed

    @property
    def threads(self) -> int | None:
        """The threads of each worker; None if trainings differ in them."""
        different = {config.threads for config in self.configs.values()}
        threads = different.pop()
        return threads if isinstance(threads, int) and not different else None


@dataclasses.dataclass(frozen=True)
class Point:
    """A figure of a variant after a step, as a mean over seeds."""

    step: int
    value: float


@dataclasses.dataclass(frozen=True)
class Result:
    """What a recipe has shown."""

    recipe: Recipe
    request: Request
    seeds: int
    verdicts: tuple[judging.Verdict, ...]
    curve_figure: str  # test_error, or else the first claimed figure that evaluations have
    curves: Mapping[str, tuple[Point, ...]]  # by variant; empty where nothing is evaluated
    means: Mapping[str, judging.Figures]  # of each variant, over seeds that can be judged
    diverged: tuple[str, ...]  # a line for each run that diverged
    seconds: float  # all trainings, with their start
    busy: str | None  # a sentence, if others used this machine meanwhile

    @property
    def is_met(self) -> bool:
        """Whether every claim is met."""
        return all(verdict.is_met for verdict in self.verdicts)


def plan(of: Recipe, request: Request, out: Path) -> Plan:
    """Check every training of a recipe before the first one runs.

    Args:
        of: the recipe.
        request: how it is run.
        out: its directory.

    Raises:
        UserError: a training's configuration has a mistake.
    """
    variants = of.variant_names(request.scale)
    seeds = request.seeds or of.num_seeds(request.scale)
    configs: dict[Path, RunConfig] = {}
    series: list[Training] = []
    run_dirs: dict[str, tuple[Path, ...]] = dict.fromkeys(variants, ())
    for seed in range(seeds):
        # One thread a worker: small networks gain nothing from more.
        settings = {"workers": request.workers, "threads": 1, **request.settings, "seed": seed}
        earlier: dict[str, Path] = {}
        for variant in variants:
            run_dir = out / variant / str(seed)
            run = of.run_config(variant, scale=request.scale, settings=settings, run_dirs=earlier)
            configs[run_dir.with_name(f"{seed}.yaml")] = run
            earlier[variant] = run_dir
            run_dirs[variant] += (run_dir,)
            series.append(_training(of, variant, seed, run, run_dir, request))
    return Plan(of, request, out, configs, tuple(series), run_dirs)


def check_presence(plan: Plan) -> None:
    """Raise ``UserError`` if this host lacks something that a training needs."""
    for run in plan.configs.values():
        # Other launchers may start workers elsewhere. A variant may begin with the weights of an
        # earlier one, which are not there yet.
        if run.launcher.name == "local":
            presence.check(run, f"{plan.recipe.name}: ", begins=False)


def _training(
    of: Recipe, variant: str, seed: int, run: RunConfig, run_dir: Path, request: Request
) -> Training:
    config = run_dir.with_name(f"{seed}.yaml")
    command = Program.COMMAND_LINE.command("train", config, "--run-dir", run_dir)
    if request.cold:
        command = (*command, "--cold")
    return Training(
        title=f"{of.name} {variant} seed {seed}",
        run_dir=run_dir,
        command=command,
        launcher=run.launcher.name,
        timeout_s=request.timeout_s,
    )


def run(plan: Plan, tell: Callable[[str], None]) -> Result:
    """Train what is missing, and judge the claims. See ``train``."""
    return result(plan, train(plan, tell))


def train(plan: Plan, tell: Callable[[str], None]) -> float:
    """Train what is missing, and return the seconds that all trainings have taken.

    Args:
        plan: the recipe's trainings.
        tell: is called with one line about each training.

    Raises:
        UserError: the directory holds trainings of another configuration.
    """
    for path, config in plan.configs.items():
        _write(path, config.to_yaml())
    missing = trainings.missing(plan.series)
    began = time.monotonic()
    try:
        # A worker that is forked has the threads with which torch was loaded.
        threads = plan.threads
        cold = plan.request.cold or threads is None
        with trainings.starter(missing, threads or 1, cold=cold) as starter:
            trainings.run(missing, starter, tell, plan.out)
    finally:
        seconds = _add_seconds(plan.out, time.monotonic() - began)
    return seconds


def _write(path: Path, text: str) -> None:
    if path.exists() and path.read_text(encoding="utf-8") != text:
        raise UserError(f"--out: {path} is of another configuration (allowed: another directory)")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)


def _add_seconds(out: Path, seconds: float) -> float:
    """Add to the seconds that the recipe has taken, and return their sum."""
    path = out / "seconds.json"
    if path.exists():
        seconds += json.loads(path.read_text(encoding="utf-8"))["seconds"]
    write_json(path, {"seconds": seconds})
    return seconds


def result(plan: Plan, seconds: float) -> Result:
    """Judge the claims of a recipe that has run."""
    claims = plan.recipe.claims_at(plan.request.scale)
    shares = []
    for training in plan.series:
        shares += machine.read(training.run_dir)
    curves: dict[str, tuple[Point, ...]] = {}
    for curve_figure in ["test_error", *(claim.figure for claim in claims)]:
        curves = {name: _curve(dirs, curve_figure) for name, dirs in plan.run_dirs.items()}
        if any(curves.values()):
            break
    return Result(
        recipe=plan.recipe,
        request=plan.request,
        seeds=len(next(iter(plan.run_dirs.values()))),
        verdicts=tuple(judging.judge(claim, plan.run_dirs) for claim in claims),
        curve_figure=curve_figure,
        curves=curves,
        means={variant: _means(dirs) for variant, dirs in plan.run_dirs.items()},
        diverged=_diverged(plan),
        seconds=seconds,
        busy=machine.sentence(shares),
    )


def _curve(run_dirs: tuple[Path, ...], figure: str) -> tuple[Point, ...]:
    """Return a figure's mean over the seeds that have finished, by step."""
    values: dict[int, list[float]] = {}
    for run_dir in run_dirs:
        path = RunDir(run_dir).evaluations
        if not path.exists():
            continue
        for line in path.read_text(encoding="utf-8").splitlines():
            evaluation = json.loads(line)
            found = judging.numbers(evaluation)
            if figure in found:
                values.setdefault(evaluation["step"], []).append(found[figure])
    return tuple(Point(step, sum(each) / len(each)) for step, each in sorted(values.items()))


def _means(run_dirs: tuple[Path, ...]) -> dict[str, float]:
    """Return each figure's mean over the seeds that have it."""
    values: dict[str, list[float]] = {}
    for run_dir in run_dirs:
        if RunDir(run_dir).has_finished() or judging.has_diverged(run_dir):
            for figure, value in judging.figures(run_dir).items():
                values.setdefault(figure, []).append(value)
    return {figure: sum(each) / len(each) for figure, each in values.items()}


def _diverged(plan: Plan) -> tuple[str, ...]:
    """Return a line for each run that diverged."""
    lines = []
    for variant, run_dirs in plan.run_dirs.items():
        for seed, run_dir in enumerate(run_dirs):
            if judging.has_diverged(run_dir):
                lines.append(f"{variant}, seed {seed}: {trainings.diverged(run_dir)}")
    return tuple(lines)
