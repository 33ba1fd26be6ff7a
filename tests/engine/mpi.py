"""Runs a module as the ranks of a real MPI job, under any of the MPIs that the tests know."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from scaletrain.launching.launchers.mpirun import ALLOW_ROOT
from tests.conftest import require

ROOT = Path(__file__).parents[2]
KINDS = ["openmpi4", "openmpi5", "mpich"]


def mpirun(kind: str) -> Path:
    """The system's ``openmpi4``, or the ``openmpi5`` or ``mpich`` that ``make peers`` installs from
    their wheels.
    """
    if kind == "openmpi4":
        found = shutil.which("mpirun", path="/usr/bin:/usr/local/bin")
        version = (
            subprocess.run([found, "--version"], capture_output=True, text=True).stdout
            if found
            else ""
        )
        require("mpi", "(Open MPI) 4" in version, "Debian: apt-get install openmpi-bin")
        return Path(str(found))
    path = ROOT / "build" / kind.rstrip("5") / "bin" / "mpirun"
    require("mpi", path.exists(), "make peers")
    return path


def run_mpi(kind: str, size: int, *arguments: str, timeout_s: float = 90.0) -> str:
    """Output of ``python -m ARGUMENTS`` on ``size`` ranks of one host; fails unless all of them end
    well.
    """
    try:
        import mpi4py  # noqa: F401  (initialises nothing)
    except ImportError:
        require("mpi", False, "pip install mpi4py")
    command = mpirun(kind)
    # What mpi4py must load for it; the system's it finds by itself.
    libraries = {"openmpi5": "libmpi.so.40", "mpich": "libmpi.so.12"}
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PMI_"))
    } | ALLOW_ROOT
    environment |= {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "OMPI_MCA_mpi_yield_when_idle": "1",
    }
    if kind in libraries:
        library = command.parents[1] / "lib" / libraries[kind]
        environment |= {"MPI4PY_LIBMPI": str(library), "LD_LIBRARY_PATH": str(library.parent)}
    argv = [
        str(command),
        "-n",
        str(size),
        *([] if kind == "mpich" else ["--oversubscribe", "--bind-to", "none"]),
    ]
    argv += [sys.executable, "-m", *arguments]
    done = subprocess.run(
        argv,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout_s,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout
