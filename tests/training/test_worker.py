"""Which device a worker takes. No GPU is needed: what CUDA says of the machine is put in its place."""

import pytest
import torch

from scaletrain.config import RunConfig
from scaletrain.errors import UserError
from scaletrain.training import worker
from scaletrain.world import World


def on(device: str) -> RunConfig:
    return RunConfig(model="cnn", data="digits", batch_size=96, epochs=1, device=device)


@pytest.mark.parametrize(
    ("visible", "local_rank", "index"),
    [(4, 0, 0), (4, 3, 3), (1, 3, 0), (2, 3, 1)],
    ids=["first", "its own", "narrowed to its own", "shared"],
)
def test_a_gpu_for_each_local_rank(monkeypatch: pytest.MonkeyPatch, visible: int, local_rank: int, index: int):
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    # On the second of two hosts: its rank in the job must not count.
    world = World(rank=4 + local_rank, size=8, local_rank=local_rank, local_size=4, node=1, num_nodes=2)
    assert worker.choose_device(on("auto"), world) == torch.device("cuda", index)
    assert taken == [torch.device("cuda", index)]
    assert worker.choose_device(on("cpu"), world) == torch.device("cpu")


def test_without_cuda(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert worker.choose_device(on("auto"), World()) == torch.device("cpu")
    with pytest.raises(UserError, match="allowed here: cpu, auto"):
        worker.choose_device(on("cuda"), World())
