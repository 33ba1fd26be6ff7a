"""Tests of training/batch_norm.py.

Bugs it catches: uneven shares that count alike, a gradient without what a sample does to the
other ranks' statistics, running statistics that torch would not have.
"""

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map_only

from scaletrain.training import batch_norm
from tests.ranks import run_ranks

SHARES = [1, 4, 3]


def network(momentum: float | None = 0.1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=momentum), nn.Flatten())


def batch() -> torch.Tensor:
    images = torch.randn(sum(SHARES), 3, 5, 5, generator=torch.Generator().manual_seed(1))
    return images * torch.linspace(0.1, 3, len(images))[:, None, None, None]  # ranks differ


def figures(model: nn.Module, images: torch.Tensor) -> dict[str, Any]:
    for _ in range(2):
        output = model(images)
    (output.square() * torch.linspace(0, 1, output.size(1))).sum().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    state = dict(model.state_dict())
    return {"output": output.detach(), "gradients": gradients, "state": state}


def part_of(rank: int, size: int, folder: str, momentum: float | None) -> dict[str, Any]:
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/store", size), rank=rank, world_size=size
    )

    def total(values: torch.Tensor) -> torch.Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    model = network(momentum)
    batch_norm.share_statistics(model, total)
    found = figures(model, batch().split(SHARES)[rank])
    for gradient in found["gradients"].values():
        dist.all_reduce(gradient)
    with batch_norm.alone():  # no other rank comes
        if rank == 0:
            model(batch()[:2])
    copy.deepcopy(model).eval()(batch()[: rank + 1])
    # Tensors would outlive their process no longer than it takes to end.
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach().numpy(), dict(found))


@pytest.mark.slow
@pytest.mark.parametrize("momentum", [0.1, None])
def test_three_ranks_with_uneven_shares_are_one(momentum: float | None, tmp_path):
    expected = figures(network(momentum), batch())
    results = run_ranks(part_of, 3, str(tmp_path), momentum)
    results = tree_map_only(np.ndarray, torch.as_tensor, results)
    output = torch.cat([result["output"] for result in results])
    torch.testing.assert_close(output, expected["output"], rtol=1e-5, atol=1e-5)
    for result in results:
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(result["gradients"][name], gradient, rtol=1e-4, atol=1e-4)
    for result in results[1:]:  # rank 0's were taken after one pass more
        assert list(result["state"]) == list(expected["state"])
        torch.testing.assert_close(result["state"], expected["state"], rtol=1e-5, atol=1e-6)
