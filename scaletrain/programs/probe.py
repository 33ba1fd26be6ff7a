"""One worker of a checked allreduce: ``python -m scaletrain.programs.probe BACKEND``, started by a launcher; the doctor's evidence.

Every rank contributes what only it could; each checks every element. Rank 0 prints one line of JSON.
"""

import json
import os
import socket
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path

from scaletrain import programs

programs.begin(__name__)

import torch
import torch.distributed as dist

from scaletrain.engine import rendezvous
from scaletrain.world import World


def main(backend: str, run_dir: Path) -> None:
    """All ranks. Raises ``ArithmeticError`` when a sum is wrong."""
    programs.done()
    world, timeout = World.from_env(), timedelta(seconds=30)
    store = rendezvous.join(world, run_dir, timeout)
    world = rendezvous.place(world, store)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout
    )
    seconds: dict[int, float] = {}
    for count in (1, 1000, 1 << 20):
        index = torch.arange(count, dtype=torch.float32, device=device) % 1000
        expected = index * sum(r + 1 for r in range(world.size)) + world.size
        times = []
        for _ in range(5):
            values = index * (world.rank + 1) + 1
            dist.barrier()
            began = time.perf_counter()
            dist.all_reduce(values)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - began)
            if not torch.equal(values, expected):
                raise ArithmeticError(
                    f"rank {world.rank}: allreduce of {count} float32 over {backend} gave a wrong sum"
                )
        seconds[4 * count] = statistics.median(times)
    if world.rank == 0:
        where = {"host": socket.gethostname(), "pid": os.getpid()}
        print(
            json.dumps({"backend": backend, "size": world.size, "seconds": seconds, **where}),
            flush=True,
        )
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
