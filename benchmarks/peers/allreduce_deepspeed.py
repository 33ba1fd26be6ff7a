"""DeepSpeed's allreduce in shared memory: the peer `deepspeed` of `scaletrain bench collectives`.

It is built once from the sources of DeepSpeed's package, by torch's own build of extensions: a C++
compiler is needed, the package itself is not. The operator is for inference: SUM alone, and no rank
may be late by much, since all of them spin.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils import cpp_extension

from scaletrain.programs.bench_cases import CASES
from scaletrain.programs.bench_collectives import measure


class DeepSpeedCase(CASES["all_reduce"]):  # type: ignore[misc]
    def run(self) -> None:
        torch.ops.deepspeed.inference_all_reduce_(self.tensor)


def build(sources: Path) -> Any:
    """Build the operator, or find it built, and load it."""
    folder = sources / "csrc" / "cpu" / "comm"
    return cpp_extension.load(
        name="deepspeed_shm",
        sources=[str(folder / "shm.cpp"), str(folder / "shm_interface.cpp")],
        extra_cflags=["-O3", "-fopenmp", "-march=native"],
        extra_ldflags=["-lrt", "-fopenmp"],
    )


def connect(kernel: Any, folder: Path, rank: int, size: int) -> None:
    """Let the ranks share memory. The operator leaves its files: they are removed here."""
    names = {"LOCAL_SIZE": str(size), "MASTER_ADDR": "bench", "MASTER_PORT": folder.name}
    os.environ.update(names)
    kernel.initialize(size, rank)
    dist.barrier()
    file = f"deepspeed_allreduce_buffer_{os.getuid()}_bench_{folder.name}_{rank}"
    Path("/dev/shm", file).unlink()


def largest(seconds: float) -> float:
    value = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def main(folder: Path, sources: Path) -> None:
    torch.set_num_threads(1)
    task = json.loads(folder.joinpath("task.json").read_text(encoding="utf-8"))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(folder / "store"), size)
    limit = timedelta(seconds=600)  # the first rank builds while the others wait
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    kernel = build(sources) if rank == 0 else None
    dist.barrier()
    connect(kernel or build(sources), folder, rank, size)
    results = []
    for num_bytes in task["sizes"]:
        case = DeepSpeedCase(dist.group.WORLD, num_bytes, torch.device("cpu"))
        wrong = case.wrong_elements() + case.wrong_elements()
        case.rest()
        results.append(
            {
                "contender": "deepspeed",
                "size_bytes": num_bytes,
                "times_s": measure(case.run, dist.barrier, task["seconds"], largest),
                "after_s": measure(
                    case.run, dist.barrier, task["seconds"], largest, barrier_before_each=True
                ),
                "wrong": wrong,
            }
        )
    folder.joinpath(f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
