"""A plan as a value: everything that a launcher would start.

``plan(job)`` of every file in ``launchers/`` is pure: the same job gives the same plan, and
``--dry-run`` prints it. ``supervision.supervise.run`` carries it out.
"""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from scaletrain.errors import UserError
from scaletrain.host import cores
from scaletrain.launching.job import Companion, Environment, Job
from scaletrain.world import started_by_another


class Command(NamedTuple):
    """One process to start. If there are several, ``name`` stands before its output."""

    name: str
    argv: tuple[str, ...]
    env: Environment = ()  # added to the supervisor's own environment
    # The worker that this is. None: a launcher such as mpirun, which starts workers of its own.
    rank: int | None = None
    # A launcher that goes on when a worker fails; only its own end ends the job.
    restarts_workers: bool = False
    # The signal that reaches the workers, where SIGINT would make the launcher kill them.
    interrupt: int | None = None
    # How a launcher labels the output of its workers: a regular expression with the group ``rank``,
    # found at the beginning of lines and where the writer changes. Empty: it does not.
    labels: str = ""
    stop_s: float = 3.0  # from SIGTERM to SIGKILL; a launcher has to pass the signal on first
    cores: tuple[int, ...] = ()  # the process is kept on these cores; empty: on any

    @property
    def bound_argv(self) -> tuple[str, ...]:
        """The command line, with the one that keeps the process on its cores before it."""
        if not self.cores:
            return self.argv
        # taskset turns into the worker, so that the process that we watch is the worker itself.
        return ("taskset", "--cpu-list", ",".join(map(str, self.cores)), *self.argv)


class LaunchPlan(NamedTuple):
    """Everything that would run. The files are written first, then every command starts."""

    commands: tuple[Command, ...]
    files: tuple[tuple[Path, str], ...] = ()
    explain: tuple[str, ...] = ()  # one line each: threads, cores, ports and their reasons
    # If set: the supervisor binds a free port here and hands the socket to the process that serves
    # the store. All workers get the address as MASTER_ADDR and MASTER_PORT.
    store_address: str = ""
    companions: tuple[Companion, ...] = ()  # the job's, as this launcher starts them
    # Other hosts start their parts of the same job, in the same run directory.
    is_part: bool = False
    # All workers run on this host, with its files: what a run needs can be looked for here.
    is_local: bool = False
    # If set: this host cannot carry the plan out, and the error says why.
    missing: str = ""
    # Workers run in images of their own: a script need not be a file of this host.
    in_containers: bool = False

    def __str__(self) -> str:
        """Return the plan as shell text, as ``--dry-run`` prints it."""
        lines = [f"# {line}" for line in self.explain]
        for path, text in self.files:
            lines.append(f"# file {path}\n{text.rstrip()}")
        for companion in self.companions:
            lines.append(_shell_line(companion.env, companion.argv) + " &")
        store = ""
        if self.store_address:
            store = f"MASTER_ADDR={self.store_address} MASTER_PORT=$PORT "
        for command in self.commands:
            lines.append(store + _shell_line(command.env, command.bound_argv))
        return "\n".join(lines)


def check_start(plan: LaunchPlan, env: Mapping[str, str] | None = None) -> None:
    """Raise UserError if this process cannot start a plan, or is another launcher's worker.

    Args:
        plan: the plan.
        env: the variables; default: ``os.environ``.
    """
    if plan.missing:
        raise UserError(plan.missing)
    place = "" if plan.is_part else started_by_another(env)
    if place:
        raise UserError(
            f"{place}: this process is one of several, and each would start a job of its own;"
            " let them be the workers (scaletrain worker RUN_DIR), start the command once, or set"
            " SCALETRAIN_LAUNCHER=python to start a job here"
        )


def tell_users_threads(plan: LaunchPlan, asked: Job, job: Job) -> LaunchPlan:
    """Return the plan with a line that says so if a job has the threads of OMP_NUM_THREADS.

    Args:
        plan: of the job.
        asked: the job as it was asked for.
        job: the same ``with_users_threads``.
    """
    if job == asked:
        return plan
    kept = dict(job.env)["OMP_NUM_THREADS"]
    return plan._replace(explain=(*plan.explain, f"OMP_NUM_THREADS={kept} of this shell is kept"))


def threads_each(job: Job, workers_here: int) -> int:
    """Return the threads of one worker: as the job says, or its share of this host's cores.

    Args:
        workers_here: how many workers share this host.
    """
    return job.threads or max(1, cores.count() // workers_here)


def _shell_line(env: Environment, argv: tuple[str, ...]) -> str:
    assignments = [f"{name}={shlex.quote(value)}" for name, value in env]
    return " ".join([*assignments, shlex.join(argv)])
