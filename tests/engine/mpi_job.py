"""One rank of tests/engine/test_transports_mpi.py, under mpirun.

Its arguments are ``PART STORE RESULTS``.
"""

import pickle
import sys
from pathlib import Path

from scaletrain import programs

programs.begin(__name__)

import torch
import torch.distributed as dist
from mpi4py import MPI

from tests.engine import conformance


def main() -> None:
    programs.done()
    part, path, results = sys.argv[1:]
    torch.set_num_threads(1)
    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    store = dist.FileStore(path, size)
    found = {"conform": conformance.conform, "late": conformance.late}[part](
        "mpi", store, rank, size
    )
    Path(results, str(rank)).write_bytes(pickle.dumps(found))
    MPI.COMM_WORLD.Barrier()


if __name__ == "__main__":
    main()
