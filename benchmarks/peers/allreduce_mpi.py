"""MPI's own Allreduce, in place, on float32: the peer `mpi` of `scaletrain bench collectives`.
Needs mpi4py and numpy, nothing else.
"""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from mpi4py import MPI


def main(folder: Path) -> None:
    task = json.loads(folder.joinpath("task.json").read_text(encoding="utf-8"))
    comm = MPI.COMM_WORLD
    cores = sorted(os.sched_getaffinity(0))
    if task["bind"] and len(cores) >= comm.size:  # else mpirun has bound it, or there are too few
        os.sched_setaffinity(0, {cores[comm.rank]})
    library = " ".join(MPI.Get_library_version().split()[:3]).replace("Version:", "").strip(" ,v")
    name = (
        "MPICH " + MPI.Get_library_version().split()[2]
        if "MPICH" in library
        else library.split(",")[0]
    )
    results = []
    for num_bytes in task["sizes"]:
        count = max(1, num_bytes // 4)
        array = np.empty(count, np.float32)
        wrong = 0
        for _ in range(2):
            array[:] = np.arange(count) % 251 + comm.rank
            comm.Allreduce(MPI.IN_PLACE, array, MPI.SUM)
            wrong += int(
                (
                    array != comm.size * (np.arange(count) % 251) + comm.size * (comm.size - 1) // 2
                ).sum()
            )
        array[:] = 0
        comm.Barrier()
        began = time.perf_counter()
        comm.Allreduce(MPI.IN_PLACE, array, MPI.SUM)
        once = comm.allreduce(time.perf_counter() - began, MPI.MAX)
        times = []
        comm.Barrier()
        for _ in range(max(3, min(400, int(task["seconds"] / once)))):
            began = time.perf_counter()
            comm.Allreduce(MPI.IN_PLACE, array, MPI.SUM)
            times.append(time.perf_counter() - began)
        results.append(
            {"contender": f"mpi: {name}", "size_bytes": num_bytes, "times_s": times, "wrong": wrong}
        )
    folder.joinpath(f"{comm.rank}.json").write_text(json.dumps(results), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
