"""NCCL: every algorithm between CUDA devices, one process a device. Skipped without two devices."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scaletrain import plugins
from scaletrain.engine.execute import Program, execute
from scaletrain.engine.transport import Group, Receive
from tests.engine import conformance
from tests.gpu.test_shared_device import ddp
from tests.parameter_server import job
from tests.ranks import run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def _group(rank: int, size: int, path: str) -> Group:
    torch.cuda.set_device(rank)
    return Group(dist.PrefixStore("group/", dist.FileStore(path, size)), rank, size, timedelta(seconds=60))


def _every_algorithm(rank: int, size: int, path: str) -> dict[str, bytes]:
    transport = plugins.load("transport", "nccl")(_group(rank, size, path))
    found = {}
    for name in conformance.ALGORITHMS:
        program = Program.of(plugins.load("collective", name)(size), rank)
        for count in (1, 7, 300_001):
            tensor = conformance.contribution(rank, count).cuda()
            execute(program, transport, tensor, torch.add, 2)
            expected = conformance.reference(size, count, torch.float32, "add")
            assert conformance.close(tensor.cpu(), expected), f"{name}, {count} elements"
            found[f"{name} {count}"] = tensor.cpu().numpy().tobytes()
    transport.close()
    return found


def _streams(rank: int, size: int, path: str) -> None:
    """A message waits for the kernel that makes its contents, and a kernel for the message it reads, on a stream of our own."""
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


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8])
def test_every_algorithm(size: int, tmp_path: Path):
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} CUDA devices")
    found = run_ranks(_every_algorithm, size, str(tmp_path / "store"), timeout_s=100)
    assert all(results == found[0] for results in found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_messages_follow_the_stream(tmp_path: Path):
    run_ranks(_streams, 2, str(tmp_path / "store"))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("collective", ["auto", "ring", "tree"])
def test_ddp_is_single_process_training(collective: str, tmp_path: Path):
    """``auto`` is NCCL's own allreduce, an algorithm its schedule over NCCL's messages."""
    for weights in run_ranks(ddp, 2, str(tmp_path / "store"), collective, True, timeout_s=100):
        for weight, expected in zip(weights, job.single(12, 2), strict=True):
            torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-4)
