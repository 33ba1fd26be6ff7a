"""One worker of a checked allreduce: ``python -m scaletrain.programs.probe``.

Its arguments are the backend and the run directory.

A launcher starts it; the doctor uses it as evidence. Every rank contributes values that only it
could give, and checks every element of the sum. Rank 0 prints one line of JSON.
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

programs.begin(__name__)  # before torch is imported

import torch
import torch.distributed as dist

from scaletrain.engine import rendezvous
from scaletrain.world import World

_COUNTS = (1, 1000, 1 << 20)  # elements of the messages
_FLOAT_BYTES = 4
_REPEATS = 5
_TIMEOUT = timedelta(seconds=30)


def main(backend: str, run_dir: Path) -> None:
    """Join the job, and check and time allreduces of a few sizes. Collective.

    Args:
        backend: of torch.distributed, such as ``gloo``.
        run_dir: the run directory.

    Raises:
        ArithmeticError: a sum is wrong.
    """
    programs.done()
    world = World.from_env()
    # It moves nothing that matters, and hosts without a shared directory are to be probed, too.
    store = rendezvous.join(world, run_dir, _TIMEOUT, is_private=False)
    # Some launchers do not say the local rank, which chooses the GPU.
    world = rendezvous.place(world, store)
    device = torch.device("cpu")
    if backend == "nccl":
        device = torch.device("cuda", world.local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, store=store, rank=world.rank, world_size=world.size, timeout=_TIMEOUT
    )
    seconds: dict[int, float] = {}
    for count in _COUNTS:
        times = [_timed_allreduce(count, device, world, backend) for _ in range(_REPEATS)]
        seconds[count * _FLOAT_BYTES] = statistics.median(times)
    # The doctor looks for this line among the job's output, by its key "backend".
    if world.rank == 0:
        evidence = {
            "backend": backend,
            "size": world.size,
            "seconds": seconds,
            "host": socket.gethostname(),
            "pid": os.getpid(),
        }
        print(json.dumps(evidence), flush=True)
    # Rank 0 may serve the store, which the others need up to here.
    dist.barrier()
    dist.destroy_process_group()


def _timed_allreduce(count: int, device: torch.device, world: World, backend: str) -> float:
    """Return the seconds of an allreduce of ``count`` float32, after a check. Collective.

    Raises:
        ArithmeticError: the sum is wrong.
    """
    # Whole numbers below 2^24, so that float32 sums are exact in any order and can be compared for
    # equality. The factor differs from rank to rank: a doubled or lost contribution shows.
    index = torch.arange(count, dtype=torch.float32, device=device) % 1000
    values = index * (world.rank + 1) + 1
    sum_of_factors = sum(rank + 1 for rank in range(world.size))
    expected = index * sum_of_factors + world.size
    # Ranks begin together: otherwise the wait for the last one would count.
    dist.barrier()
    began = time.perf_counter()
    dist.all_reduce(values)
    if device.type == "cuda":
        # On a GPU the call returns before the sum is there.
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    if not torch.equal(values, expected):
        raise ArithmeticError(
            f"rank {world.rank}: allreduce of {count} float32 over {backend} gave a wrong sum"
        )
    return seconds


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
