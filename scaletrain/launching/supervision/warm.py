"""Warm starts of the programs that load torch: which commands, and the server that forks them.

Every worker imports torch for seconds of processor time. A forkserver (``host.forkserver``) does it
once for all workers of this host. A command that it cannot start, for whatever reason, starts cold:
as a program of its own, which imports everything itself.
"""

import os
import signal
import subprocess
from collections.abc import Mapping

from scaletrain.host import forkserver
from scaletrain.launching.job import Job, Program
from scaletrain.launching.plan import Command, LaunchPlan

# Programs that compute with torch, and that a server may fork.
_PROGRAMS = (Program.TRAINING, Program.SCRIPT)
_PAYS_FROM = 2  # workers; for a single one the server would only be in the way


def server(job: Job, plan: LaunchPlan, environ: Mapping[str, str]) -> forkserver.Server | None:
    """Return a server for a plan's workers, which may still be loading; None: they start cold.

    Args:
        job: the job.
        plan: its plan.
        environ: of the workers, without the variables that their commands add.
    """
    inherited = forkserver.inherited
    commands = [command for command in plan.commands if program_of(command.argv)]
    if job.cold or job.program is None or not commands:
        if inherited:
            inherited.close()
        return None
    # It has loaded everything, so it pays for a single worker, too.
    if inherited:
        return inherited
    if len(commands) < _PAYS_FROM:
        return None
    start = Program.FORKSERVER.command(job.program.value)
    try:
        return forkserver.Server.start(start, {**environ, **dict(commands[0].env)})
    except OSError:
        return None


def start(
    server: forkserver.Server,
    command: Command,
    environ: dict[str, str],
    descriptors: tuple[int, ...],
    death_signal: int,
    standard_input: int,
) -> forkserver.Forked | None:
    """Fork a process for a command; return None if that cannot be done."""
    program = program_of(command.argv)
    if program is None:
        return None
    order = forkserver.Order(
        program.value,
        program.arguments_of(command.argv) or (),
        environ,
        os.getpid(),
        cores=command.cores,
        death_signal=death_signal,
        descriptors=descriptors,
    )
    return server.fork(order, stdin=standard_input, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def start_supervisor(
    environ: dict[str, str], blocked: tuple[signal.Signals, ...], descriptors: tuple[int, ...]
) -> forkserver.Forked | None:
    """Fork the supervisor, with a server for its workers, if this process was forked itself.

    Its standard input and output are pipes, its standard error is ours.
    """
    if forkserver.inherited is None:
        return None
    order = forkserver.Order(
        Program.SUPERVISOR.value,
        (),
        environ,
        os.getpid(),
        computes=False,
        blocked=tuple(map(int, blocked)),
        new_session=True,
        serves=True,
        descriptors=descriptors,
    )
    supervisor = forkserver.inherited.fork(order, stdin=subprocess.PIPE, stderr=2)
    forkserver.inherited.close()  # this process starts nothing else
    return supervisor


def program_of(argv: tuple[str, ...]) -> Program | None:
    """Return the program that a command line starts, if a server may fork it."""
    for program in _PROGRAMS:
        if program.arguments_of(argv) is not None:
            return program
    return None
