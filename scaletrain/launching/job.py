"""A job as a value: everything that a launcher needs to know.

A launcher (``launchers/``) turns a job into a plan (``plan.LaunchPlan``), and
``supervision.supervise.run`` carries the plan out.

>>> job = Job(command=("./simulate", "--fast"), workers=4, run_dir=Path("runs/simulate"))
>>> job.argv
('./simulate', '--fast')
"""

import enum
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

Environment = tuple[tuple[str, str], ...]  # variables of a process, as a value


# The variable with the descriptor of the listening socket on which a process is to serve the store.
STORE_FD = "SCALETRAIN_STORE_FD"


class Program(enum.Enum):
    """The programs of this package that start with ``python -m``, by their modules' names."""

    TRAINING = "scaletrain.programs.worker"
    SCRIPT = "scaletrain.programs.script"
    PARAMETER_SERVER = "scaletrain.programs.parameter_server"
    STORE = "scaletrain.programs.store"
    SUPERVISOR = "scaletrain.programs.supervisor"
    FORKSERVER = "scaletrain.programs.forkserver"
    FIRST_CAUSE = "scaletrain.programs.first_cause"
    FOLLOW_SLURM = "scaletrain.programs.follow_slurm"
    FOLLOW_KUBERNETES = "scaletrain.programs.follow_kubernetes"
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

    def arguments_of(self, argv: Sequence[str]) -> tuple[str, ...] | None:
        """Return the arguments of a command line that ``command`` made; None for another one."""
        start = self.command()
        if tuple(argv[: len(start)]) != start:
            return None
        return tuple(argv[len(start) :])


def environment(variables: Mapping[str, object]) -> Environment:
    """Return variables as a value, in their order.

    >>> environment({"RANK": 0})
    (('RANK', '0'),)
    """
    return tuple((name, str(value)) for name, value in variables.items())


class Companion(NamedTuple):
    """A process beside the workers, such as a parameter server.

    It starts before the workers and ends (SIGTERM) after them.
    """

    name: str  # shown in messages, "server 0"
    argv: tuple[str, ...]
    env: Environment = ()
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
    timeout_s: float = 60.0  # a worker without progress for this long counts as hung
    threads: int | None = None  # OMP threads of a worker; None: its share of the host's cores
    env: Environment = ()  # added to the environment of every worker
    cold: bool = False  # each worker imports torch itself (see ``supervision.warm``)
    companions: tuple[Companion, ...] = ()
    # A training run's configuration as text, for workers that do not see this host's files.
    config: str = ""

    @property
    def argv(self) -> tuple[str, ...]:
        """The command line of one worker."""
        if self.program is None:
            return self.command
        argv = self.program.command(self.run_dir, *self.command)
        return (*argv, "--resume") if self.resume else argv

    @property
    def argv_for_torchrun(self) -> tuple[str, ...]:
        """The command line of one worker, as torchrun wants it: torchrun adds the Python itself."""
        if self.program is None:
            return ("--no-python", *self.argv)
        return self.argv[1:]

    @property
    def trains(self) -> bool:
        """True if the workers train for us: they write records, and can resume."""
        return self.program is Program.TRAINING

    @property
    def joins_store(self) -> bool:
        """True if the workers meet in the job's store (``rendezvous.join``).

        Only then can rank 0 serve the store.
        """
        return self.program is not None

    @property
    def serves_store(self) -> bool:
        """True if rank 0 serves the job's store itself.

        Other programs get a process beside them that serves it. So do jobs that
        may outlive rank 0.
        """
        return self.joins_store and self.min_workers is None

    def variables(self, threads: int) -> dict[str, str]:
        """Return the variables that every worker gets, whatever starts it.

        Args:
            threads: of one worker, for OpenMP.
        """
        return {"OMP_NUM_THREADS": str(threads), **dict(self.env)}


def script_job(command: Sequence[str], workers: int, run_dir: Path, timeout_s: float = 60.0) -> Job:
    """Return the job of a person's own program.

    A ``.py`` file runs inside ``Program.SCRIPT``, which reports its traceback and sets the
    variables that torch.distributed needs under every launcher. Any other command runs as it is.
    """
    program = Program.SCRIPT if command[0].endswith(".py") else None
    return Job(tuple(command), workers, run_dir, program, timeout_s=timeout_s)
