"""The machine and the versions that a run was measured on."""

import os
from pathlib import Path
from typing import Any


def environment() -> dict[str, Any]:
    """What a reader needs to judge a figure: host, processor, cores, versions, commit. Imports no torch."""
    import importlib.metadata
    import platform
    import subprocess

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    processor = next(
        (
            line.partition(":")[2].strip()
            for line in _lines("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.processor() or platform.machine(),
    )
    commit = git("rev-parse", "--short=12", "HEAD")
    # Pages of results are not what was measured: a run that writes several does not mark the later ones.
    if commit and git(
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        ":/",
        ":(top,exclude)benchmarks/results",
    ):
        commit += "-dirty"
    return {
        "host": platform.node(),
        "os": platform.platform(),
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "versions": {
            name: version(name)
            for name in ("scaletrain", "torch", "numpy", "mpi4py", "horovod", "pyzmq")
        },
        "commit": commit,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
