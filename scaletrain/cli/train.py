"""``scaletrain train``: train the job that a YAML file describes."""

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from scaletrain import plugins
from scaletrain.cli.options import (
    check_shared,
    directory_name,
    new_directory,
    output_options,
)
from scaletrain.errors import UserError

if TYPE_CHECKING:
    from scaletrain.config import RunConfig
    from scaletrain.launching.job import Job
    from scaletrain.launching.plan import LaunchPlan
    from scaletrain.launching.supervision.screen import Display, Screen


@click.command()
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
    "--run-dir",
    type=click.Path(path_type=Path),
    help="Where records go [default: runs/NAME-TIME].",
)
@click.option("--resume", is_flag=True, help="Go on from the run directory's last checkpoint.")
@click.option("--cold", is_flag=True, help="Let each worker import torch itself.")
@output_options
@click.option("--dry-run", is_flag=True, help="Print what would be started, and start nothing.")
def command(
    path: Path,
    settings: tuple[str, ...],
    run_dir: Path | None,
    resume: bool,
    cold: bool,
    show: Literal["all", "0", "errors"],
    log_format: Literal["text", "json"],
    dry_run: bool,
    **overrides: Any,
) -> None:
    """Train the job that CONFIG (a YAML file) describes.

    Ctrl-C, SIGTERM and SIGUSR1 write a checkpoint and stop; --resume goes on. SIGUSR2 writes a
    checkpoint, and the run goes on.

    \b
    Examples:
      scaletrain train examples/digits.yaml --workers 2 --exchange ring
      scaletrain train examples/digits.yaml --run-dir runs/mine --resume
    """
    run = _configure(path, overrides, settings)
    # Before a name is made up: a new directory would be resumed from nothing, without a word.
    if resume:
        _check_resumable(run_dir)

    from scaletrain.launching.job import with_users_threads
    from scaletrain.launching.plan import check_start, tell_users_threads

    def planned(directory: Path) -> "tuple[Job, LaunchPlan]":
        # Absolute: workers may start in another directory, or on another host.
        asked = _job(run, directory.resolve(), resume)._replace(cold=cold)
        job = with_users_threads(asked)
        plan = plugins.load("launcher", run.launcher.name)(job, **run.launcher.options)
        return job, tell_users_threads(plan, asked, job)

    directory = run_dir or directory_name(run.name)
    job, plan = planned(directory)
    # Up to here nothing is written, so that --dry-run and a missing launcher leave no directory.
    if dry_run:
        click.echo(str(plan))
        return
    from scaletrain.config import presence
    from scaletrain.launching.supervision import supervise
    from scaletrain.launching.supervision.screen import Display, Screen
    from scaletrain.run import claim
    from scaletrain.run.layout import RunDir

    check_start(plan)
    check_shared(run_dir, plan.is_part)
    if plan.is_local:
        presence.check(run, f"{path}: ", begins=not (resume and RunDir(directory).checkpoints()))
    display = Display(log_format, show)
    supervise.check_display(plan, display)
    if run_dir is None:
        directory, (job, plan) = new_directory(directory, (job, plan), planned)
    with claim.in_use(directory, "--run-dir", shared=plan.is_part) as descriptor:
        _claim(directory, resume, run.to_yaml())
        screen = Screen(display)
        screen.say(f"run directory: {directory}")
        for line in plan.explain:
            screen.say(line)
        status = _carry_out(plan, job, descriptor, display)
    # Also after a failure: the servers' counters may explain it.
    if run.exchange.name == "parameter_server":
        _show_server_statistics(directory, screen)
    sys.exit(status)


def _configure(path: Path, overrides: dict[str, Any], settings: tuple[str, ...]) -> "RunConfig":
    """Read the file and apply the command line: options first, then ``--set`` in its order."""
    from scaletrain import config

    # None is an option that was not given: the file's value holds.
    changes = {key: value for key, value in overrides.items() if value is not None}
    for text in settings:
        key, value = config.parse_setting(text)
        changes[key] = value
    return config.load(path, changes)


def _check_resumable(run_dir: Path | None) -> None:
    if run_dir is None:
        raise UserError("--resume: which run? (allowed: with the --run-dir of a run)")
    if not run_dir.is_dir():
        raise UserError(
            f"--resume: there is no run in {run_dir} (allowed: with the --run-dir of a run)"
        )


def _job(run: "RunConfig", run_dir: Path, resume: bool) -> "Job":
    """Return a training run as launchers see it."""
    from scaletrain.launching.job import Job, Program

    job = Job(
        command=(),
        workers=run.workers,
        run_dir=run_dir,
        program=Program.TRAINING,
        resume=resume,
        timeout_s=run.timeout_s,
        threads=None if run.threads == "auto" else run.threads,
        config=run.to_yaml(),
    )
    # The parameter server is the one exchange that brings processes of its own.
    if run.exchange.name == "parameter_server":
        from scaletrain.parameter_server.protocol import placement

        job = job._replace(
            companions=placement.companions(run, run_dir),
            min_workers=placement.min_workers(run),
        )
    return job


def _claim(run_dir: Path, resume: bool, config: str) -> None:
    """Write the configuration into the run directory; never write over another run's records.

    A directory without a record of a step belongs to a start that failed, or to another host that
    starts its part of the same run.
    """
    from scaletrain.run.atomic import write_text
    from scaletrain.run.layout import RunDir

    files = RunDir(run_dir)
    is_configured = files.config.exists()
    # Two hosts that start one job with the same command write the same configuration.
    is_same = is_configured and files.config.read_text(encoding="utf-8") == config
    has_records = any(path.stat().st_size for path in files.all_records())
    # Workers report progress before they have records. If the supervisor has written a first
    # cause, that start is over.
    is_starting = bool(files.all_progress()) and not files.first_cause.exists()
    holds_a_run = has_records or (is_starting and not is_same)
    if is_configured and holds_a_run and not resume:
        raise UserError(
            f"--run-dir {run_dir}: holds a run already"
            " (allowed: another directory, --resume to go on with it)"
        )
    try:
        # The other host's workers may be reading the file at this moment.
        if not is_same:
            write_text(files.config, config)
    except OSError as error:
        raise UserError(f"--run-dir {run_dir}: {error.strerror}") from None


def _carry_out(plan: "LaunchPlan", job: "Job", claim: int, display: "Display") -> int:
    from scaletrain.cli import progress_bar
    from scaletrain.launching.supervision import supervise

    # The bar comes first: it sets a variable that the workers have to inherit. Programs that read
    # the output want rank 0's lines instead.
    is_for_people = display.form == "text"
    with progress_bar.shown(job.run_dir) if is_for_people else contextlib.nullcontext():
        return supervise.run(plan, job, claim=claim, display=display)


def _show_server_statistics(run_dir: Path, screen: "Screen") -> None:
    from scaletrain.scaling.measure import servers

    text = servers.text(servers.read(run_dir))
    if text:
        screen.say(text)
