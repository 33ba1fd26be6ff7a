"""A job as a value: everything that a launcher needs to know.

A launcher (``launchers/``) turns a job into a plan (``plan.LaunchPlan``), and
``supervision.supervise.run`` carries the plan out.

>>> job = Job(command=("./simulate", "--fast"), workers=4, run_dir=Path("runs/simulate"))
>>> job.argv
('./simulate', '--fast')
"""

import enum
import os
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from scaletrain.errors import UserError
from scaletrain.run.progress import LAUNCH_MARK

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
    HOST_FACTS = "scaletrain.programs.host_facts"
    BENCH_COLLECTIVES = "scaletrain.programs.bench_collectives"
    BENCH_PARAMETER_SERVER = "scaletrain.programs.bench_parameter_server"
    COMMAND_LINE = "scaletrain.cli"  # the command ``scaletrain`` itself, for sweeps

    def command(self, *arguments: object, python_options: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the command line that starts this program under the present Python.

        Args:
            arguments: of the program.
            python_options: of Python, such as ``-u``.
        """
        # With -P, files of the working directory such as json.py do not hide what we import.
        return (sys.executable, *python_options, "-P", "-m", self.value, *map(str, arguments))

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


def under_python(python: str, argv: Sequence[str]) -> tuple[str, ...]:
    """Return a command line with the Python of an image in the place of this one.

    >>> under_python("python3", [sys.executable, "-m", "http.server"])
    ('python3', '-m', 'http.server')
    """
    words = []
    for word in argv:
        words.append(python if word == sys.executable else word)
    return tuple(words)


# Variables that decide what a worker does, wherever it runs.
_SETTINGS = ("PYTHONPATH", "SCALETRAIN_COLLECTIVE", "SCALETRAIN_INTERFACE", "SCALETRAIN_TRANSPORT")


def settings() -> dict[str, str]:
    """Return the variables of this process that workers on other hosts need, too."""
    return {name: os.environ[name] for name in _SETTINGS if name in os.environ}


def check_set(names: Sequence[str]) -> None:
    """Raise UserError unless the variables that are to travel to the workers are set here.

    Only their names are planned: their values may be secret.
    """
    for name in names:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z_0-9]*", str(name)):
            raise UserError(
                f"launcher.environment: {name!r} is not allowed (allowed: names of variables)"
            )
        if name not in os.environ:
            raise UserError(f"launcher.environment: {name} is not set here (export {name}=...)")


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
    program: Program | None = None  # the workers run it; None: ``command`` as it is
    resume: bool = False  # a training run that goes on from its last checkpoint
    min_workers: int | None = None  # the job goes on while this many live; None: all of them
    timeout_s: float = 60.0  # a worker without progress for this long counts as hung
    threads: int | None = None  # OMP threads of a worker; None: its share of the host's cores
    env: Environment = ()  # added to the environment of every worker
    cold: bool = False  # each worker imports torch itself (see ``supervision.warm``)
    companions: tuple[Companion, ...] = ()
    # A training run's configuration as text, for workers that do not see this host's files.
    config: str = ""
    python_options: tuple[str, ...] = ()  # of the Python that runs ``program``

    @property
    def argv(self) -> tuple[str, ...]:
        """The command line of one worker."""
        if self.program is None:
            return self.command
        argv = self.program.command(self.run_dir, *self.command, python_options=self.python_options)
        return (*argv, "--resume") if self.resume else argv

    @property
    def argv_for_torchrun(self) -> tuple[str, ...]:
        """The command line of one worker, as torchrun wants it.

        torchrun would add a Python of its own, without our options.
        """
        return ("--no-python", *self.argv)

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


def with_users_threads(job: Job, env: Mapping[str, str] | None = None) -> Job:
    """Return the job with the threads that a person has set by OMP_NUM_THREADS, if it names none.

    Inside a launch the variable belongs to that launch, and says nothing about another job.

    Args:
        job: the job.
        env: the variables; default: ``os.environ``.
    """
    env = os.environ if env is None else env
    text = env.get("OMP_NUM_THREADS", "")
    if job.threads or LAUNCH_MARK in env or not re.fullmatch(r"[1-9]\d{0,4}(,\d+)*", text):
        return job
    # OpenMP also takes a list, with a number for each nesting level, which says nothing to us.
    threads = int(text) if text.isdigit() else None
    return job._replace(threads=threads, env=(*job.env, ("OMP_NUM_THREADS", text)))


def script_job(command: Sequence[str], workers: int, run_dir: Path, timeout_s: float = 60.0) -> Job:
    """Return the job of a person's own program.

    A Python program runs inside ``Program.SCRIPT``, which reports its traceback and sets the
    variables that torch.distributed needs under every launcher. Any other command runs as it is.

    Args:
        command: ``script.py``, ``python script.py``, ``python -m module``, ``-m module``,
            ``-c code`` or any other command, with its arguments.
        workers: how many.
        run_dir: the run's directory.
        timeout_s: how long workers may take to meet and to stop.

    Raises:
        UserError: the command begins with an option that Python does not have.
    """
    own = _python_program(tuple(command))
    if own is None:
        return Job(tuple(command), workers, run_dir, timeout_s=timeout_s)
    return Job(
        own.words,
        workers,
        run_dir,
        Program.SCRIPT,
        timeout_s=timeout_s,
        python_options=own.options,
    )


class _PythonProgram(NamedTuple):
    options: tuple[str, ...]  # of Python
    words: tuple[str, ...]  # script.py, -m module or -c code, and its arguments


# Options of Python that a program can be run with. A command with another, such as -i, runs as it
# is, and so does a compiled file.
_PYTHON_FLAGS = frozenset("bBdEIOPqsuv")


def _python_program(command: tuple[str, ...]) -> _PythonProgram | None:
    """Return the Python program that a command runs; None if it runs something else."""
    first = command[0]
    if _is_this_python(first):
        return _split_python_options(command[1:])
    if first.startswith("-"):
        own = _split_python_options(command)
        if own is None:
            raise UserError(
                f"COMMAND: {first!r} is not allowed (allowed: script.py, -m MODULE, -c CODE,"
                " python ..., or any program)"
            )
        return own
    return _PythonProgram((), command) if first.endswith(".py") else None


def _is_this_python(word: str) -> bool:
    """Return True if a command starts the present Python: in another, this package may lack."""
    if not re.fullmatch(r"python[\d.]*", os.path.basename(word)):
        return False
    found = shutil.which(word)
    if found is None:
        return False
    return os.path.realpath(os.path.dirname(found)) == os.path.realpath(
        os.path.dirname(sys.executable)
    )


def _split_python_options(words: tuple[str, ...]) -> _PythonProgram | None:
    """Split a command line of Python into its options and its program.

    Letters may stand together, and a value may follow its letter at once: ``-uWerror -mpackage``.
    """
    options: list[str] = []
    rest = list(words)
    # -P and -I keep the script's directory out of sys.path. Our own -P must not say that for them.
    is_safe: tuple[str, ...] = ()
    while rest:
        word = rest.pop(0)
        if word == "-" or word.endswith(".pyc"):
            return None
        if not word.startswith("-"):
            return _PythonProgram(tuple(options), (*is_safe, word, *rest))
        for place, letter in enumerate(word[1:], start=1):
            if letter in _PYTHON_FLAGS:
                options.append(f"-{letter}")
                if letter in "IP":
                    is_safe = ("-P",)
                continue
            value = word[place + 1 :]
            if not value and rest:
                value = rest.pop(0)
            if not value or letter not in "mcWX":
                return None
            if letter in "mc":
                return _PythonProgram(tuple(options), (*is_safe, f"-{letter}", value, *rest))
            options += [f"-{letter}", value]
            break
    return None
