"""horovodrun (gloo or MPI), on this host or on those of a list; for Horovod's own users."""

import os
import shutil
from typing import Literal

from scaletrain.errors import UserError
from scaletrain.launching.hosts import expand
from scaletrain.launching.job import Command, Job, LaunchPlan


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
    """One horovodrun. ``hosts`` is ``h1:2,h2:2``, or ``h[1-2]:2`` (slots after the colon); they are reached by ssh, as horovodrun does it.

    Any exchange runs under it; the exchange ``horovod`` also runs under every other launcher.
    """
    if hosts and hostfile:
        raise UserError(
            "launcher.hosts and launcher.hostfile: name the hosts in one of them, not in both"
        )
    cores = len(os.sched_getaffinity(0))
    hosts = ",".join(expand(hosts)) if hosts else ""
    elsewhere = bool(hosts or hostfile)
    threads = job.threads or (1 if elsewhere else max(1, cores // job.workers))
    argv = [
        command,
        "-np",
        str(job.workers),
        f"--{controller}",
        "--start-timeout",
        str(max(30, round(job.timeout_s))),
    ]
    # Without a host list, horovodrun takes this host for as many slots as are asked for.
    argv += (
        ["-H", hosts]
        if hosts
        else ["-hostfile", hostfile]
        if hostfile
        else ["-H", f"localhost:{job.workers}"]
    )
    argv += ["--network-interfaces", interfaces] if interfaces else []
    if controller == "mpi" and os.geteuid() == 0:
        argv += ["--mpi-args=--allow-run-as-root"]
    argv += [*map(str, arguments), *job.argv]
    env = (("OMP_NUM_THREADS", str(threads)), *job.env)
    explain = [
        f"{job.workers} workers by horovodrun over {controller}, {threads} thread{'s' * (threads > 1)} each"
    ]
    if elsewhere:
        explain.append("the run directory must be a folder that all hosts share")
    missing = ""
    if shutil.which(command) is None:
        missing = (
            f"launcher.command: {command!r} was not found; build Horovod (make horovod),"
            " or give horovodrun's path"
        )
    return LaunchPlan(
        (Command("horovodrun", tuple(argv), env, stop_s=10.0),),
        explain=tuple(explain),
        companions=job.companions,
        missing=missing,
    )
