"""``scaletrain launch``: run a person's own script as workers."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from scaletrain import plugins
from scaletrain.cli.options import (
    check_shared,
    directory_name,
    new_directory,
    output_options,
)
from scaletrain.errors import UserError
from scaletrain.timeouts import LONGEST_S

if TYPE_CHECKING:
    from scaletrain.launching.job import Job
    from scaletrain.launching.plan import LaunchPlan


_USAGE = 2  # the status with which argparse, click and others refuse options


# Our options end where the command begins: all later words belong to it, also without `--`.
@click.command(context_settings={"allow_interspersed_args": False})
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
    type=click.FloatRange(min=0, min_open=True, max=LONGEST_S),
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="A worker that reports steps is hung after such a silence.",
)
@click.option(
    "--as",
    "as_backend",
    type=click.Choice(["gloo"]),
    help="Let this torch.distributed backend be ours: for scripts that insist on it.",
)
@click.option(
    "--threads",
    metavar="N|auto",
    help="OpenMP threads of a worker; auto: its share of the cores [default: OMP_NUM_THREADS, else"
    " auto].",
)
@click.option(
    "--bind",
    type=click.Choice(["cores", "none"]),
    help="Keep each worker on its own cores (local, mpirun, slurm) [default: none].",
)
@click.option("--cold", is_flag=True, help="Let each worker import torch itself.")
@output_options
@click.option("--dry-run", is_flag=True, help="Print what would be started, and start nothing.")
@click.argument("argv", metavar="COMMAND...", nargs=-1, type=click.UNPROCESSED, required=True)
def command(
    workers: int,
    launcher: str,
    settings: tuple[str, ...],
    run_dir: Path | None,
    timeout_s: float,
    as_backend: str | None,
    threads: str | None,
    bind: str | None,
    cold: bool,
    show: Literal["all", "0", "errors"],
    log_format: Literal["text", "json"],
    dry_run: bool,
    argv: tuple[str, ...],
) -> None:
    """Run your own script as workers.

    COMMAND is script.py, -m MODULE, -c CODE, python ... or any other program. Our options stand
    before it; all words behind it belong to it.

    The script finds the variables of torch.distributed (RANK, WORLD_SIZE, MASTER_ADDR, ...) in its
    environment.

    \b
    Example:
      scaletrain launch -n 2 script.py --its-own-arguments
      scaletrain launch -n 2 -- -m package.train --its-own-arguments
    """
    from scaletrain import config
    from scaletrain.launching.job import (
        Program,
        environment,
        script_job,
        with_users_threads,
    )
    from scaletrain.launching.plan import check_start, tell_users_threads
    from scaletrain.launching.supervision import supervise
    from scaletrain.launching.supervision.screen import Display, Screen
    from scaletrain.run import claim

    chosen = dict(config.parse_setting(text) for text in settings)
    chosen |= _binding(bind, launcher)
    options = config.plugin_options("launcher", launcher, chosen)
    if threads not in (None, "auto") and not re.fullmatch(r"[1-9]\d{0,4}", str(threads)):
        raise UserError(f"--threads: {threads!r} is not allowed (allowed: a whole number, auto)")

    def planned(directory: Path) -> "tuple[Job, LaunchPlan]":
        # Absolute: workers may start in another directory, and other hosts do not know ours.
        asked = script_job(argv, workers, directory.resolve(), timeout_s)._replace(cold=cold)
        if as_backend:
            asked = asked._replace(env=environment({"SCALETRAIN_AS": as_backend}))
        if threads and threads != "auto":
            asked = asked._replace(threads=int(threads))
        job = asked if threads else with_users_threads(asked)
        plan = plugins.load("launcher", launcher)(job, **options)
        return job, tell_users_threads(plan, asked, job)

    directory = run_dir or directory_name("launch")
    job, plan = planned(directory)
    # Before the checks below: a plan can be read on a machine that lacks the launcher.
    if dry_run:
        click.echo(str(plan))
        return
    check_start(plan)
    check_shared(run_dir, plan.is_part)
    if job.program is Program.SCRIPT and not plan.in_containers:
        script = job.command[0]
        if not script.startswith("-") and not Path(script).exists():
            raise UserError(f"{script}: there is no such file")
    display = Display(log_format, show)
    supervise.check_display(plan, display)
    if run_dir is None:
        directory, (job, plan) = new_directory(directory, (job, plan), planned)
    with claim.in_use(directory, "--run-dir", shared=plan.is_part) as descriptor:
        screen = Screen(display)
        # Standard output belongs to the script.
        for line in [f"run directory: {directory}", *plan.explain]:
            screen.say(line, error=True)
        status = supervise.run(plan, job, claim=descriptor, display=display)
        if status == _USAGE:
            misplaced = _own_options(argv)
            if misplaced:
                screen.say(
                    f"scaletrain: {misplaced[0]} stands behind the command, and was passed on to it;"
                    " options of launch stand before it",
                    error=True,
                )
        sys.exit(status)


def _own_options(argv: tuple[str, ...]) -> list[str]:
    """Return the words of a person's command that are options of ``launch``, too."""
    own = set()
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            own.update(parameter.opts)
    return [word for word in argv[1:] if word.partition("=")[0] in own]


def _binding(bind: str | None, launcher: str) -> dict[str, bool]:
    """Return the launcher's option for ``--bind``.

    Raises:
        UserError: the launcher cannot bind its workers.
    """
    if bind is None:
        return {}
    binding = []
    for name in plugins.names("launcher"):
        options = plugins.options("launcher", name)
        if options is not None and "bind" in options.model_fields:
            binding.append(name)
    cannot = launcher in plugins.names("launcher") and launcher not in binding
    if cannot and bind == "none":
        return {}
    if cannot:
        raise UserError(
            f"--bind: {bind!r} is not allowed with {launcher}, which does not place its workers on"
            f" cores (allowed with: {', '.join(binding)})"
        )
    return {"bind": bind == "cores"}
