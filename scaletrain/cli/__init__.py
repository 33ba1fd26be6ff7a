"""The verbs of ``scaletrain``. Each imports what it needs when it runs: help is quick, and login nodes need no torch."""

import errno
import importlib
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from scaletrain import __version__, plugins
from scaletrain.errors import UserError, unknown


class _Verbs(click.Group):
    """Commands by name, imported when asked for: ``modules`` gives their ``module:command`` (and is itself asked only then)."""

    def __init__(self, *args: Any, modules: Callable[[], dict[str, str]], **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._modules = modules

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *self._modules()])

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if own := super().get_command(ctx, name):
            return own
        module, _, attribute = self._modules().get(name, "").partition(":")
        return getattr(importlib.import_module(module), attribute) if module else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if self.get_command(ctx, args[0]) is None:
            raise unknown(ctx.command_path, args[0], self.list_commands(ctx))
        return super().resolve_command(ctx, args)


@click.group(
    cls=_Verbs,
    modules=lambda: {
        "doctor": "scaletrain.cli.doctor:doctor",
        "report": "scaletrain.cli.report:command",
        "simulate": "scaletrain.cli.simulate:command",
        "fit": "scaletrain.cli.fit:command",
    },
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(__version__)
def cli() -> None:
    """Train a PyTorch model on 1..N workers, choose how gradients are exchanged; measure, explain and predict how it scales."""


@cli.command()
@click.argument("path", metavar="CONFIG", type=click.Path(path_type=Path))
@click.option("--workers", type=int, help="Number of workers.")
@click.option("--launcher", help="What starts them: local, torchrun, ... (see `scaletrain list`).")
@click.option(
    "--exchange", help="native, none, scheduled:ring (or ring), parameter_server:async, ..."
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key, such as optimizer.lr=0.05; repeatable.",
)
@click.option(
    "--run-dir", type=click.Path(path_type=Path), help="Where records go [default: runs/NAME-TIME]."
)
@click.option("--resume", is_flag=True, help="Go on from the run directory's last checkpoint.")
@click.option("--dry-run", is_flag=True, help="Print what would be started, and start nothing.")
def train(
    path: Path,
    workers: int | None,
    launcher: str | None,
    exchange: str | None,
    settings: tuple[str, ...],
    run_dir: Path | None,
    resume: bool,
    dry_run: bool,
) -> None:
    """Train the job that CONFIG (a YAML file) describes."""
    from scaletrain import config as configuration
    from scaletrain.cli import progress_bar
    from scaletrain.launching.supervision import supervise

    given = {"workers": workers, "launcher": launcher, "exchange": exchange}
    changes = {key: value for key, value in given.items() if value is not None}
    changes |= dict(configuration.parse_setting(text) for text in settings)
    run = configuration.load(path, changes)
    if resume and not (run_dir and run_dir.is_dir()):
        raise UserError(
            f"--resume: {f'there is no run in {run_dir}' if run_dir else 'which run?'} (allowed: with the --run-dir of a run)"
        )
    run_dir = run_dir or Path("runs") / f"{run.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    job = _job(run, run_dir.resolve(), resume)
    plan = plugins.load("launcher", run.launcher.name)(job, **run.launcher.options)
    if dry_run:
        click.echo(str(plan))
        return
    _claim(run_dir, resume, run.to_yaml())
    click.echo(f"run directory: {run_dir}")
    for line in plan.explain:
        click.echo(line)
    with progress_bar.progress(run_dir):
        status = supervise.run(plan, job)
    if run.exchange.name == "parameter_server":
        from scaletrain.scaling.measure import servers

        if told := servers.text(servers.read(run_dir)):
            click.echo(told)
    sys.exit(status)


def _job(run: Any, run_dir: Path, resume: bool) -> Any:
    """The launcher's view of a training run."""
    from scaletrain.launching.job import Job, Program

    job = Job(
        command=(),
        workers=run.workers,
        run_dir=run_dir,
        program=Program.TRAINING,
        resume=resume,
        timeout_s=run.timeout_s,
        threads=None if run.threads == "auto" else run.threads,
    )
    if run.exchange.name == "parameter_server":  # the one exchange that brings processes of its own
        from scaletrain.parameter_server.protocol import placement

        job = job._replace(
            companions=placement.companions(run, run_dir), min_workers=placement.min_workers(run)
        )
    return job


def _claim(run_dir: Path, resume: bool, config: str) -> None:
    """Make the run directory and write its config.yaml; never write over another run's records.

    A directory without records is that of a start that failed, or another host's that starts its part of the same run.
    """
    path = run_dir / "config.yaml"
    same = path.exists() and path.read_text(encoding="utf-8") == config
    starting = any(run_dir.glob("progress-*.json")) and not (run_dir / "failure.json").exists()
    begun = any(run_dir.glob("rank-*.jsonl")) or (starting and not same)
    if path.exists() and not resume and begun:
        raise UserError(
            f"--run-dir {run_dir}: holds a run already (allowed: another directory, --resume to go on with it)"
        )
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        if not same:
            path.write_text(config, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: {error.strerror}") from None


@cli.command(context_settings={"ignore_unknown_options": True})
@click.option(
    "-n",
    "--workers",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Number of workers.",
)
@click.option(
    "--launcher",
    default="local",
    show_default=True,
    help="What starts them (see `scaletrain list`).",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="An option of the launcher; repeatable.",
)
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path),
    help="Where failures are recorded [default: runs/launch-TIME].",
)
@click.option(
    "--timeout",
    "timeout_s",
    type=float,
    default=60.0,
    show_default=True,
    help="Seconds to wait for workers to meet and to stop.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be started, and start nothing.")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, required=True)
def launch(
    workers: int,
    launcher: str,
    settings: tuple[str, ...],
    run_dir: Path | None,
    timeout_s: float,
    dry_run: bool,
    command: tuple[str, ...],
) -> None:
    """Run your own script as workers: scaletrain launch -n 2 -- script.py --its-own-arguments

    The script finds what torch.distributed needs (RANK, WORLD_SIZE, MASTER_ADDR, ...) in its environment.
    """
    from scaletrain import config as configuration
    from scaletrain.launching.job import script_job
    from scaletrain.launching.supervision import supervise

    run_dir = (run_dir or Path("runs") / f"launch-{time.strftime('%Y%m%d-%H%M%S')}").resolve()
    job = script_job(command, workers, run_dir, timeout_s)
    options = configuration.plugin_options(
        "launcher", launcher, dict(configuration.parse_setting(text) for text in settings)
    )
    plan = plugins.load("launcher", launcher)(job, **options)
    if dry_run:
        click.echo(str(plan))
        return
    if command[0].endswith(".py") and not Path(command[0]).is_file():
        raise UserError(f"{command[0]}: there is no such file")
    run_dir.mkdir(parents=True, exist_ok=True)
    for line in plan.explain:
        click.echo(line, err=True)  # standard output is the script's
    sys.exit(supervise.run(plan, job))


@cli.command()
@click.argument("run_dir", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--resume", is_flag=True, help="Go on from the last checkpoint.")
def worker(run_dir: Path, resume: bool) -> None:
    """Be one worker of the run in RUN_DIR, as mpirun or srun starts it; rank variables say which."""
    from scaletrain.programs.worker import main as work

    sys.exit(work(run_dir, resume))


@cli.group(
    cls=_Verbs,
    modules=lambda: {
        _typed("bench", name): f"scaletrain.cli.bench.{name}:command"
        for name in plugins.names("bench")
    },
)
def bench() -> None:
    """Measure: scaling, collectives, the parameter server, a model."""


@cli.command()
@click.argument("collective")
@click.option(
    "--workers", type=click.IntRange(min=1), default=4, show_default=True, help="Number of ranks."
)
@click.option(
    "--svg",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the picture to this file as well.",
)
def draw(collective: str, workers: int, svg: Path | None) -> None:
    """Prove a collective, such as ring or pipelined_tree:segments=3, and show it round by round."""
    from scaletrain.collectives import drawing, schedule
    from scaletrain.config import plugin_spec

    name, options = plugin_spec("collective", collective, "collective")
    made = schedule.proved(name, workers, **options)
    click.echo(drawing.as_text(made))
    if svg:
        svg.write_text(drawing.as_svg(made, f"{name}, {workers} ranks"), encoding="utf-8")
    if workers <= schedule.PROVED:
        click.echo(
            "proved: every rank ends with the same sum, each contribution in it once, and nobody waits for ever",
            err=True,
        )


@cli.command("list")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def list_plugins(as_json: bool) -> None:
    """Every exchange, collective, transport, launcher, model, data set and benchmark on disk, with its options."""
    menu = {
        kind: [
            {
                "name": _typed(kind, name),
                "description": plugins.describe(kind, name),
                "options": _options(kind, name),
            }
            for name in plugins.names(kind)
        ]
        for kind in plugins.KINDS
    }
    if as_json:
        import json

        click.echo(json.dumps(menu, indent=2))
        return
    for kind, entries in menu.items():
        click.secho(kind, bold=True)
        for entry in entries:
            click.echo(f"  {entry['name']:<18} {entry['description']}")
            if entry["options"]:
                click.secho(f"  {'':<18} options: {', '.join(entry['options'])}", dim=True)


def _typed(kind: str, name: str) -> str:
    """A plugin's name as people type it: benchmarks are verbs."""
    return name.replace("_", "-") if kind == "bench" else name


def _options(kind: str, name: str) -> list[str]:
    schema = None if kind == "bench" else plugins.options(kind, name)
    fields = schema.model_fields.items() if schema else []
    return [f"{key}={field.default!r}" if not field.is_required() else key for key, field in fields]


def _about_a_named_path(error: OSError) -> str:
    """The line for a path on the command line (or below the default, runs) that cannot be read or written; empty: it is another one."""
    if not isinstance(error.filename, str):
        return str(error.strerror) if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    failed = Path(error.filename).resolve()
    words = [word for typed in sys.argv[1:] for word in typed.split("=", 1)] + ["runs"]
    found = [
        (len(named.parts), f"{before} " * before.startswith("-") + word)
        for before, word in zip(["", *words], words, strict=False)
        if word
        and (failed.is_relative_to(named := Path(word).resolve()) or named.is_relative_to(failed))
    ]
    return f"{max(found)[1]}: {error.strerror}" if found else ""


def main() -> None:
    """The console script: a person's mistake ends in one line and status 2, a signal in the same clean-up as Ctrl-C."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) == signal.SIG_DFL:  # nohup ignores SIGHUP, and so do we then
            signal.signal(number, lambda heard, frame: sys.exit(128 + heard))
    try:
        status = cli(prog_name="scaletrain", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        status = error.exit_code
    except (UserError, click.ClickException) as error:
        told = error.format_message() if isinstance(error, click.ClickException) else str(error)
        click.echo(f"scaletrain: error: {told}", err=True)
        status = 2
    except OSError as error:
        if not (told := _about_a_named_path(error)):
            raise
        click.echo(f"scaletrain: error: {told}", err=True)
        status = 2
    except click.Abort:  # Ctrl-C
        status = 128 + signal.SIGINT
    sys.exit(status)
