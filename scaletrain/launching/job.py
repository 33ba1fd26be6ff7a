"""What a launcher is given (Job) and what it answers (LaunchPlan): values first, then carried out.

``plan(job)`` of every file in ``launchers/`` is pure: the same job gives the same plan, and ``--dry-run`` prints it.
``supervise.run(plan, job)`` carries it out.
"""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Companion(NamedTuple):
    """A process beside the workers, such as a parameter server: started before them, ended (SIGTERM) after them."""

    name: str  # shown in messages, "server 0"
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()
    restarts: int = 0  # how often it is started again when it dies; then its death ends the job


class Job(NamedTuple):
    """N workers that all run ``argv``; each learns who it is from the environment (``World.from_env``)."""

    argv: tuple[str, ...]  # one worker's command, without rank
    workers: int
    run_dir: Path  # records, failures and rendezvous files; on several hosts a shared folder
    min_workers: int | None = None  # the job goes on while this many live; None: all of them
    timeout_s: float = 60.0  # a worker without progress for this long is taken as hung
    threads: int | None = None  # OMP threads a worker; None: its share of the host's cores
    env: tuple[tuple[str, str], ...] = ()
    companions: tuple[Companion, ...] = ()

    @property
    def serves_store(self) -> bool:
        """Whether rank 0 of these workers serves the job's store itself, as everything that calls ``rendezvous.join`` does.

        Other programs get a process beside them that serves it. So do jobs that outlive rank 0.
        """
        return (
            self.argv[1:2] == ("-m",)
            and self.argv[2].startswith("scaletrain.")
            and self.min_workers is None
        )


def script_job(command: Sequence[str], workers: int, run_dir: Path, timeout_s: float = 60.0) -> Job:
    """The job of a person's own program. A ``.py`` file runs inside ``scaletrain.training.script``, which reports its traceback
    and sets the variables torch.distributed needs under every launcher; any other command runs as it is."""
    argv = tuple(command)
    if argv[0].endswith(".py"):
        argv = (sys.executable, "-m", "scaletrain.training.script", str(run_dir), *argv)
    return Job(argv, workers, run_dir, timeout_s=timeout_s)


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


class Failure(NamedTuple):
    """The first cause of a job's end. Written as RUN_DIR/failure-<rank>.json by the worker, or made by the supervisor."""

    rank: int | None
    host: str
    step: int | None
    time: float  # unix seconds; among equals the earliest is the cause, the others are consequences
    # "exception", "user" (a person's mistake: one line), "signal", "exit", "hang"; consequences: "peer" (lost another rank), "launcher"
    kind: str
    message: str
    traceback: str = ""
    collective: str = ""  # the last collective this rank entered, when known
    exit_code: int = 1

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Failure":
        return cls(**{key: value[key] for key in cls._fields if key in value})
