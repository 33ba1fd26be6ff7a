"""One rank of tests/engine/test_mpi4py.py, under mpirun.

It is an ordinary script that asks torch.distributed for the backend ``mpi4py``.
"""

import sys

import torch
import torch.distributed as dist
from mpi4py import MPI

from scaletrain.engine.backend import calls_of


def main() -> None:
    torch.set_num_threads(1)
    rank, size = MPI.COMM_WORLD.rank, MPI.COMM_WORLD.size
    dist.init_process_group(
        "mpi4py", store=dist.FileStore(sys.argv[1], size), rank=rank, world_size=size
    )
    for dtype in (torch.float32, torch.bfloat16, torch.int64):
        tensor = (torch.arange(1000) % 7 + rank).to(dtype)
        dist.all_reduce(tensor)
        assert torch.equal(
            tensor, (size * (torch.arange(1000) % 7) + size * (size - 1) // 2).to(dtype)
        ), dtype
    assert calls_of(dist.group.WORLD).record()["transport"] == "mpi"
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    weight = model.weight.detach().clone()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    parallel(torch.full((2, 4), float(rank))).sum().backward()
    assert torch.allclose(model.weight.grad, torch.full_like(weight, 2 * sum(range(size)) / size))
    everyone = [torch.zeros(2) for _ in range(size)]
    dist.all_gather(everyone, torch.full((2,), float(rank)))
    assert [t[0].item() for t in everyone] == list(range(size))
    dist.barrier()
    dist.destroy_process_group()
    print(f"rank {rank} right")


if __name__ == "__main__":
    main()
