"""Tests of engine/transport/nccl.py.

NCCL: every algorithm between CUDA devices, one process a rank. Skipped without a device.

Where there are fewer devices than ranks, each rank claims to be a host of its own (NCCL_HOSTID):
NCCL then lets ranks share a device and connects them by sockets. The schedules, messages and
streams are the same, their speed is not.
"""

import os
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from scaletrain import plugins
from scaletrain.engine.execute import execute
from scaletrain.engine.program import RankProgram
from scaletrain.engine.transport import Group, Receive
from tests.engine import conformance
from tests.gpu.test_shared_device import ddp, join
from tests.parameter_server import job
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _device(rank: int, size: int) -> int:
    """The rank's device."""
    if torch.cuda.device_count() < size:
        os.environ.update(NCCL_HOSTID=f"rank-{rank}", NCCL_SOCKET_IFNAME="lo", NCCL_IB_DISABLE="1")
    return rank % torch.cuda.device_count()


def _group(rank: int, size: int, path: str) -> Group:
    torch.cuda.set_device(_device(rank, size))
    return Group(
        dist.PrefixStore("group/", dist.FileStore(path, size)), rank, size, timedelta(seconds=60)
    )


def _every_algorithm(rank: int, size: int, path: str) -> dict[str, bytes]:
    transport = plugins.load("transport", "nccl")(_group(rank, size, path))
    found = {}
    for name in conformance.ALGORITHMS:
        program = RankProgram.of(plugins.load("collective", name)(size), rank)
        for count in (1, 7, 300_001):
            tensor = conformance.contribution(rank, count).cuda()
            execute(program, transport, tensor, torch.add, 2)
            expected = conformance.reference(size, count, torch.float32, "add")
            assert conformance.close(tensor.cpu(), expected), f"{name}, {count} elements"
            found[f"{name} {count}"] = tensor.cpu().numpy().tobytes()
    transport.close()
    return found


def _streams(rank: int, size: int, path: str) -> None:
    """A message waits for the kernel that makes its contents, and a kernel for the message it
    reads, on a stream of our own.
    """
    transport = plugins.load("transport", "nccl")(_group(rank, size, path))
    with torch.cuda.stream(torch.cuda.Stream()):
        sent, got = torch.zeros(1 << 22, device="cuda"), torch.zeros(1 << 22, device="cuda")
        torch.cuda._sleep(100_000_000)
        sent += rank + 1
        transport.start([((rank + 1) % size, sent)], [Receive((rank - 1) % size, got)])()
        doubled = got * 2
    torch.cuda.synchronize()
    assert (doubled == 2 * ((rank - 1) % size + 1)).all()
    transport.close()


def _ddp(rank: int, size: int, path: str, collective: str) -> list[np.ndarray]:
    return ddp(rank, size, path, collective, _device(rank, size))


def _collectives(rank: int, size: int, path: str) -> None:
    """What the backend hands on to NCCL, and its own allreduces of what is not plain."""
    join(rank, size, path, "ring", _device(rank, size))
    mine = torch.full((4,), rank + 1.0, device="cuda")
    dist.broadcast(first := mine.clone(), 0)
    assert first.tolist() == [1.0] * 4
    dist.all_gather(parts := [torch.empty_like(mine) for _ in range(size)], mine)
    dist.all_gather_into_tensor(whole := torch.empty(4 * size, device="cuda"), mine)
    assert (
        torch.cat(parts).tolist()
        == whole.tolist()
        == [r + 1.0 for r in range(size) for _ in range(4)]
    )
    dist.reduce_scatter_tensor(part := torch.empty(4, device="cuda"), whole * (rank + 1))
    assert part.tolist() == [(rank + 1.0) * sum(range(1, size + 1))] * 4
    dist.all_to_all_single(
        turned := torch.empty(size, device="cuda"), torch.arange(size, device="cuda") + 10.0 * rank
    )
    assert turned.tolist() == [10.0 * r + rank for r in range(size)]
    if rank == 0:
        dist.send(mine, 1)
    elif rank == 1:
        dist.recv(got := torch.empty(4, device="cuda"), 0)
        assert got.tolist() == [1.0] * 4
    dist.all_gather_object(objects := [None] * size, {"rank": rank})
    assert objects == [{"rank": r} for r in range(size)]
    dist.all_reduce(half := mine.to(torch.bfloat16)[::2])
    dist.all_reduce(mean := mine.clone(), dist.ReduceOp.AVG)
    assert half.tolist() == [sum(range(1, size + 1))] * 2 and mean.tolist() == [(size + 1) / 2] * 4
    dist.all_reduce(on_host := torch.tensor([rank]))
    assert on_host.item() == sum(range(size))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8])
def test_every_algorithm(size: int, tmp_path: Path):
    found = run_ranks(_every_algorithm, size, str(tmp_path / "store"), timeout_s=100)
    assert all(results == found[0] for results in found)


def test_messages_follow_the_stream(tmp_path: Path):
    run_ranks(_streams, 2, str(tmp_path / "store"))


def test_every_other_collective(tmp_path: Path):
    run_ranks(_collectives, 3, str(tmp_path / "store"))


@pytest.mark.parametrize("collective", ["auto", "ring", "tree"])
def test_ddp_is_single_process_training(collective: str, tmp_path: Path):
    """``auto`` is NCCL's own allreduce, an algorithm its schedule over NCCL's messages."""
    for weights in run_ranks(_ddp, 2, str(tmp_path / "store"), collective, timeout_s=100):
        for weight, expected in zip(weights, job.single(12, 2), strict=True):
            torch.testing.assert_close(torch.from_numpy(weight), expected, rtol=1e-4, atol=1e-4)
