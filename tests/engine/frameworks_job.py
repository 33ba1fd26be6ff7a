"""One rank of tests/engine/test_frameworks.py: ``frameworks_job.py PART BACKEND``.

Its scripts know nothing of scaletrain but its name.
"""

import copy
import sys

import torch
import torch.distributed as dist
from torch import nn

STEPS = 3


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))


def batch(step: int, rank: int) -> torch.Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(100 * step + rank))


def reference(size: int) -> list[torch.Tensor]:
    """The weights after the same steps by one process on everybody's samples."""
    single = model()
    optimizer = torch.optim.SGD(single.parameters(), 0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        (sum(single(batch(step, rank)).pow(2).mean() for rank in range(size)) / size).backward()
        optimizer.step()
    return [p.detach() for p in single.parameters()]


def loop(
    module: nn.Module, optimizer: torch.optim.Optimizer, rank: int, backward=torch.Tensor.backward
) -> None:
    for step in range(STEPS):
        optimizer.zero_grad()
        backward(module(batch(step, rank)).pow(2).mean())
        optimizer.step()


def fsdp(rank: int, size: int) -> list[torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = copy.deepcopy(model())
    fully_shard(module, mesh=init_device_mesh("cpu", (size,)))
    loop(module, torch.optim.SGD(module.parameters(), 0.1), rank)
    return [p.full_tensor() for p in module.parameters()]


def ddp(rank: int, size: int) -> list[torch.Tensor]:
    module = nn.parallel.DistributedDataParallel(model())
    loop(module, torch.optim.SGD(module.parameters(), 0.1), rank)
    return list(module.parameters())


def accelerate(rank: int, size: int) -> list[torch.Tensor]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)  # uses the process group that is there
    module = model()
    module, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), 0.1))
    loop(module, optimizer, rank, accelerator.backward)
    return list(module.parameters())


def fabric(rank: int, size: int) -> list[torch.Tensor]:
    from lightning_fabric import Fabric
    from lightning_fabric.strategies import DDPStrategy

    made = Fabric(
        accelerator="cpu", devices=size, strategy=DDPStrategy(process_group_backend=sys.argv[2])
    )
    made.launch()
    module = model()
    module, optimizer = made.setup(module, torch.optim.SGD(module.parameters(), 0.1))
    loop(module, optimizer, rank, made.backward)
    return list(module.parameters())


def main() -> None:
    what = {"ddp": ddp, "fsdp": fsdp, "accelerate": accelerate, "fabric": fabric}[sys.argv[1]]
    torch.set_num_threads(1)
    dist.init_process_group(sys.argv[2])
    rank, size = dist.get_rank(), dist.get_world_size()
    for found, expected in zip(what(rank, size), reference(size), strict=True):
        torch.testing.assert_close(found.detach(), expected, rtol=1e-5, atol=1e-6)
    assert dist.get_backend() == sys.argv[2]
    assert type(dist.group.WORLD).__module__ == "scaletrain.engine.process_group"
    dist.destroy_process_group()
    print(f"rank {rank} right\n", end="")


if __name__ == "__main__":
    main()
