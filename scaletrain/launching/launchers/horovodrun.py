"""horovodrun (gloo or MPI), on this host or on a list of hosts; for Horovod's own users."""

import os
import shutil
from typing import Literal

from scaletrain.launching.hosts import SHARE_RUN_DIR, from_options
from scaletrain.launching.job import Job, environment
from scaletrain.launching.plan import Command, LaunchPlan, threads_each
from scaletrain.timeouts import Timeouts
from scaletrain.units import plural

# With gloo, and with MPI, whose mpirun writes the number of its job first.
_LABELS = r"\[(?:\d+,)?(?P<rank>\d+)\]<std(?:out|err)>:"


def plan(
    job: Job,
    *,
    controller: Literal["gloo", "mpi"] = "gloo",
    command: str = "horovodrun",
    hosts: str = "",
    hostfile: str = "",
    interfaces: str = "",
    arguments: list = [],  # noqa: B006 (read as a literal)
) -> LaunchPlan:
    """Start one horovodrun.

    Any exchange runs under it. The exchange ``horovod`` also runs under every other launcher.
    A dry run needs no horovodrun.

    Args:
        job: the job to plan.
        controller: how its processes find each other.
        command: the name or path of horovodrun.
        hosts: ``h1:2,h2:2`` or ``h[1-2]:2``, slots after the colon; horovodrun reaches them by ssh.
        hostfile: a file that lists the hosts, in place of ``hosts``.
        interfaces: network interfaces to use, separated by commas.
        arguments: passed on to horovodrun as they are.
    """
    listed = from_options(hosts, hostfile)
    elsewhere = bool(listed or hostfile)
    if elsewhere:
        threads = job.threads or 1  # the cores of other hosts are not known here
    else:
        threads = threads_each(job, job.workers)
    argv = [
        command,
        "-np",
        str(job.workers),
        f"--{controller}",
        "--start-timeout",
        str(round(Timeouts(job.timeout_s).join_s)),
    ]
    if listed:
        argv += ["-H", ",".join(listed)]
    elif hostfile:
        argv += ["-hostfile", hostfile]
    else:  # horovodrun takes this host for as many slots as are asked for
        argv += ["-H", f"localhost:{job.workers}"]
    if interfaces:
        argv += ["--network-interfaces", interfaces]
    # Open MPI refuses to run as root, as in a container, unless it is told to.
    if controller == "mpi" and os.geteuid() == 0:
        argv.append("--mpi-args=--allow-run-as-root")
    argv += [*map(str, arguments), *job.argv]
    workers = plural(job.workers, "worker")
    explain = [f"{workers} by horovodrun over {controller}, {plural(threads, 'thread')} each"]
    if elsewhere:
        explain.append(SHARE_RUN_DIR)
    horovodrun = Command(
        "horovodrun",
        tuple(argv),
        environment(job.variables(threads)),
        labels=_LABELS,
        stop_s=10.0,
    )
    return LaunchPlan(
        (horovodrun,),
        explain=tuple(explain),
        companions=job.companions,
        missing=_missing(command),
    )


def _missing(command: str) -> str:
    """Return the error that says how to get a horovodrun; empty if there is one."""
    if shutil.which(command):
        return ""
    return (
        f"launcher.command: {command!r} was not found; build Horovod (make horovod),"
        " or give horovodrun's path"
    )
