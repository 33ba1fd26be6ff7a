"""What a launcher is given (Job) and what it answers (LaunchPlan): values first, then carried out.

``plan(job)`` of every file in ``launchers/`` is pure: the same job gives the same plan, and ``--dry-run`` prints it.
"""

import shlex
from pathlib import Path
from typing import Any, NamedTuple


class Companion(NamedTuple):
    """A process beside the workers, such as a parameter server: started before them, ended after them."""

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


class Command(NamedTuple):
    """One process to start. Its output is shown prefixed with ``name``."""

    name: str
    argv: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()  # added to the launcher's environment


class LaunchPlan(NamedTuple):
    """What would run: files written first, then every command. ``explain`` lines tell a reader why (threads, cores, ports)."""

    commands: tuple[Command, ...]
    files: tuple[tuple[Path, str], ...] = ()
    explain: tuple[str, ...] = ()

    def __str__(self) -> str:
        """The plan as shell text, as ``--dry-run`` prints it."""
        parts = [f"# {line}" for line in self.explain]
        parts += [f"# file {path}\n{text.rstrip()}" for path, text in self.files]
        for command in self.commands:
            assignments = [f"{key}={shlex.quote(value)}" for key, value in command.env]
            parts.append(" ".join([*assignments, shlex.join(command.argv)]))
        return "\n".join(parts)


class Failure(NamedTuple):
    """The first cause of a job's end. Written as RUN_DIR/failure-<rank>.json by the worker, or made by the supervisor."""

    rank: int | None
    host: str
    step: int | None
    time: float  # unix seconds; the earliest is the cause, the others are consequences
    kind: str  # "exception", "signal", "exit", "hang", "user" (a person's mistake: one line, no traceback)
    message: str
    traceback: str = ""
    collective: str = ""  # the last collective this rank entered, when known

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Failure":
        return cls(**{key: value[key] for key in cls._fields if key in value})
