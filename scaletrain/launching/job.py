"""What a launcher is given (Job) and what it answers (LaunchPlan): values first, then carried out.

``plan(job)`` of every file in ``launchers/`` is pure: the same job gives the same plan, and
``--dry-run`` prints it. ``supervise.run(plan, job)`` carries it out.
"""

import enum
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Program(enum.Enum):
    """The programs of this package that are started with ``python -m``; a value is a module's name."""

    TRAINING = "scaletrain.programs.worker"
    SCRIPT = "scaletrain.programs.script"
    PARAMETER_SERVER = "scaletrain.programs.parameter_server"
    STORE = "scaletrain.programs.store"
    SUPERVISOR = "scaletrain.programs.supervisor"
    FIRST_CAUSE = "scaletrain.programs.first_cause"
    FOLLOW_SLURM = "scaletrain.programs.follow_slurm"
    REHEARSAL_ENTER = "scaletrain.programs.rehearsal_enter"
    REHEARSAL_SERVE = "scaletrain.programs.rehearsal_serve"
    REHEARSAL_STORE = "scaletrain.programs.rehearsal_store"
    PROBE = "scaletrain.programs.probe"
    BENCH_COLLECTIVES = "scaletrain.programs.bench_collectives"
    BENCH_PARAMETER_SERVER = "scaletrain.programs.bench_parameter_server"
    COMMAND_LINE = "scaletrain.cli"  # the command ``scaletrain`` itself, for sweeps

    def command(self, *arguments: object) -> tuple[str, ...]:
        """Return the command line that starts this program under the present Python."""
        return (sys.executable, "-m", self.value, *map(str, arguments))


class Companion(NamedTuple):
    """A process beside the workers, such as a parameter server.

    It is started before the workers and ended (SIGTERM) after them.
    """

    name: str  # shown in messages, "server 0"
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    restarts: int = 0  # how often it is started again when it dies; then its death ends the job


class Job(NamedTuple):
    """N workers that all run the same command.

    Each worker learns its rank from its environment (``World.from_env``).
    """

    command: tuple[str, ...]  # a person's own command, without rank; empty for a training run
    workers: int
    run_dir: Path  # records, failures and rendezvous; on several hosts a shared directory
    program: Program | None = None  # what the workers run; None: ``command`` as it is
    resume: bool = False  # a training run that goes on from its last checkpoint
    min_workers: int | None = None  # the job goes on while this many live; None: all of them
    timeout_s: float = 60.0  # a worker without progress for this long is taken as hung
    threads: int | None = None  # OMP threads of a worker; None: its share of the host's cores
    env: tuple[tuple[str, str], ...] = ()
    companions: tuple[Companion, ...] = ()

    @property
    def argv(self) -> tuple[str, ...]:
        """The command line of one worker."""
        if self.program is None:
            return self.command
        resume = ["--resume"] if self.resume else []
        return self.program.command(self.run_dir, *self.command, *resume)

    @property
    def trains(self) -> bool:
        """Whether the workers are ours: they write records, and can resume."""
        return self.program is Program.TRAINING

    @property
    def joins_store(self) -> bool:
        """Whether the workers meet in the job's store (``rendezvous.join``), so that rank 0 can serve it."""
        return self.program is not None

    @property
    def serves_store(self) -> bool:
        """Whether rank 0 serves the job's store itself.

        Other programs get a process beside them that serves it. So do jobs that outlive rank 0.
        """
        return self.joins_store and self.min_workers is None


def script_job(command: Sequence[str], workers: int, run_dir: Path, timeout_s: float = 60.0) -> Job:
    """Return the job of a person's own program.

    A ``.py`` file runs inside ``Program.SCRIPT``, which reports its traceback and sets the variables
    that torch.distributed needs under every launcher. Any other command runs as it is.
    """
    program = Program.SCRIPT if command[0].endswith(".py") else None
    return Job(tuple(command), workers, run_dir, program, timeout_s=timeout_s)


class Command(NamedTuple):
    """One process to start. Its output is shown prefixed with ``name`` when there are several."""

    name: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()  # added to the launcher's environment
    rank: int | None = (
        None  # the worker this is; None: a launcher such as mpirun, which starts workers of its own
    )
    restarts_workers: bool = (
        False  # a launcher that goes on when a worker fails; only its own end ends the job
    )
    interrupt: int | None = (
        None  # signal that reaches the workers, where SIGINT would make the launcher kill them
    )
    stop_s: float = 3.0  # from SIGTERM to SIGKILL; a launcher must pass the signal on first


class LaunchPlan(NamedTuple):
    """What would run: files written first, then every command. ``explain`` lines tell a reader why (threads, cores, ports)."""

    commands: tuple[Command, ...]
    files: tuple[tuple[Path, str], ...] = ()
    explain: tuple[str, ...] = ()
    # If set: bind a free port here, hand the socket to who serves the store, tell all as MASTER_ADDR and MASTER_PORT.
    store_address: str = ""
    companions: tuple[Companion, ...] | None = (
        None  # in place of the job's, where the launcher starts them its own way
    )
    # What this machine lacks to carry the plan out, and how to get it. A dry run needs none of it.
    missing: str = ""

    def __str__(self) -> str:
        """The plan as shell text, as ``--dry-run`` prints it."""
        parts = [f"# {line}" for line in self.explain]
        parts += [f"# file {path}\n{text.rstrip()}" for path, text in self.files]
        bound = f"MASTER_ADDR={self.store_address} MASTER_PORT=$PORT " if self.store_address else ""
        for companion in self.companions or ():
            assignments = [f"{key}={shlex.quote(value)}" for key, value in companion.env]
            parts.append(" ".join([*assignments, shlex.join(companion.argv), "&"]))
        for command in self.commands:
            assignments = [f"{key}={shlex.quote(value)}" for key, value in command.env]
            parts.append(bound + " ".join([*assignments, shlex.join(command.argv)]))
        return "\n".join(parts)
