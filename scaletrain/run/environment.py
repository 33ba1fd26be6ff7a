"""The machine and the versions that a run was measured on."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import NotRequired, TypedDict

_PACKAGES = ("scaletrain", "torch", "numpy", "mpi4py", "horovod", "pyzmq")


class Environment(TypedDict):
    """The facts behind a figure, as JSON files hold them."""

    host: str
    os: str
    processor: str
    cores: int  # that the measuring process may use
    memory_bytes: int
    python: str
    versions: dict[str, str | None]  # of packages; None: not installed
    commit: str | None  # several, with commas, if measuring went on at another; None: no git
    load_average: NotRequired[float]  # over five minutes, when measuring began


def environment() -> Environment:
    """Return the facts behind a figure: host, processor, cores, versions, commit.

    It asks for versions without importing the packages.
    """
    return {
        "host": platform.node(),
        "os": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in _PACKAGES},
        "commit": _commit(),
    }


def _processor() -> str:
    """Return the processor's model as the kernel names it, else as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    """Return the version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return this source tree's commit, marked if files differ from it; None outside of git."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return commit
    # Pages of results take no part in a measurement: a run that writes several pages must not mark
    # the later ones as changed.
    changed = _git(
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        ":/",
        ":(top,exclude)benchmarks/results",
    )
    return f"{commit}-dirty" if changed else commit


def _git(*arguments: str) -> str | None:
    """Return the output of a git command on this source tree; None if it failed."""
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
