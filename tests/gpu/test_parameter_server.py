"""Tests of parameter_server/worker/staging.py.

The parameter server with models on a CUDA device: gradients and weights through page-locked
memory. Skipped without a device.
"""

import pytest
import torch

from scaletrain.parameter_server.protocol.settings import Settings
from tests.parameter_server import job

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("link", ["unix", "tcp"])
def test_sync_on_a_device_is_single_process_training(tmp_path, link):
    made = Settings(3, 60, servers=2, link=link, block_mb=0.002)
    for weights, _ in job.train(made, tmp_path, 12, device="cuda"):
        for weight, expected in zip(weights, job.single(12, 3), strict=True):
            torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-4)


def test_backward_is_not_held_up(tmp_path):
    """A gradient is pushed when the device has made it; the thread that trains does not wait for
    that.
    """
    made = Settings(1, 60)
    with job.servers(made, tmp_path):
        net = job.model().cuda()
        optimizer = torch.optim.SGD(net.parameters(), **job.SGD)
        job.loss(net, 0, 0).backward()  # loads the kernels, which waits for the device
        optimizer.zero_grad()
        joined = job.exchange(made, tmp_path, 0)
        joined.attach(net, optimizer)
        loss = job.loss(net, 0, 0)
        after = torch.cuda.Event()
        torch.cuda.synchronize()
        torch.cuda._sleep(1_000_000_000)  # half a second or so
        loss.backward()
        after.record()
        assert not after.query()  # backward is through, the device is not
        joined.step()
        joined.close()
    for weight, expected in zip(net.parameters(), job.single(1, 1), strict=True):
        torch.testing.assert_close(weight.detach().cpu(), expected, rtol=1e-4, atol=1e-4)
