"""Tests of engine/accelerator.py.

Several workers on one GPU, which NCCL refuses: allreduces through page-locked and shared memory.
Skipped without a device.
"""

from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import scaletrain  # noqa: F401  (registers the backend)
from scaletrain.engine.choice import Options
from tests.engine.conformance import close, contribution, reference
from tests.parameter_server import job
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def join(rank: int, size: int, path: str, collective: str, device: int = 0) -> None:
    torch.cuda.set_device(device)
    dist.init_process_group(
        "scaletrain", store=dist.FileStore(path, size), rank=rank, world_size=size, timeout=timedelta(seconds=60),
        pg_options=Options(collective),
    )  # fmt: skip


def _allreduces(rank: int, size: int, path: str, collective: str) -> None:
    join(rank, size, path, collective)
    for count in (1, 7, 5_000_001):
        made = contribution(rank, count)
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(50_000_000)  # the allreduce has to wait for what makes its tensor
            tensor = made.cuda(non_blocking=True)
            work = dist.all_reduce(tensor, async_op=True)
            work.wait()
            doubled = tensor * 2  # and this for the allreduce
        torch.cuda.synchronize()
        assert close(doubled.cpu() / 2, reference(size, count, torch.float32, "add")), (
            f"{count} elements"
        )
    dist.broadcast(values := torch.full((3,), float(rank), device="cuda"), 1)
    assert values.tolist() == [1.0] * 3
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("collective", ["auto", "ring"])
def test_allreduces_follow_the_streams(collective: str, tmp_path: Path):
    run_ranks(_allreduces, 3, str(tmp_path / "store"), collective, timeout_s=100)


def ddp(rank: int, size: int, path: str, collective: str, device: int = 0) -> list[np.ndarray]:
    """DDP's weights after 12 steps."""
    join(rank, size, path, collective, device)
    net = DistributedDataParallel(job.model().cuda())
    optimizer = torch.optim.SGD(net.parameters(), **job.SGD)
    for step in range(12):
        optimizer.zero_grad()
        job.loss(net, step, rank).backward()
        optimizer.step()
    dist.destroy_process_group()
    return [
        p.detach().cpu().numpy() for p in net.parameters()
    ]  # a tensor's memory would end with this rank


def test_ddp_on_one_device_is_single_process_training(tmp_path: Path):
    for weights in run_ranks(ddp, 3, str(tmp_path / "store"), "auto", timeout_s=100):
        for weight, expected in zip(weights, job.single(12, 3), strict=True):
            torch.testing.assert_close(torch.from_numpy(weight), expected, rtol=1e-4, atol=1e-4)
