"""Tests of models/hashed_mlp.py against virtual weights that a plain loop looks up."""

from pathlib import Path

import numpy as np
import pytest
import torch

from scaletrain.training.models import hashed_mlp
from tests.ranks import run_ranks
from tests.training import jobs

JOB = {
    "model": {"name": "hashed_mlp", "sizes": [8, 40, 4], "smaller": 8.0},
    "data": "tests.training.jobs:vectors",
    "batch_size": 16,
    "steps": 6,
    "optimizer": {"name": "sgd", "lr": 0.2},
    "exchange": "native",
}
_MASK = 2**64 - 1


def splitmix(place: int, seed: int) -> int:
    mixed = (place + (seed + 1) * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)


def test_the_hash_is_splitmix_of_known_value():
    """Its first output for the seed 0 is known from the reference implementation."""
    assert splitmix(0, 0) == 0xE220A8397B1DCDAF
    found = hashed_mlp._hash(np.arange(5, dtype=np.uint64), 7)
    assert [int(each) for each in found] == [splitmix(place, 7) for place in range(5)]


def test_a_layer_is_linear_in_the_real_weights():
    layer = hashed_mlp.HashedLinear(5, 3, 4, seed=2)
    virtual = torch.zeros(3, 6)
    with torch.no_grad():
        for place in range(18):
            sign = -1 if splitmix(place, 5) % 2 else 1
            virtual[place // 6, place % 6] = sign * layer.weight[splitmix(place, 4) % 4]
    inputs = torch.randn(7, 5)
    expected = inputs @ virtual[:, :5].T + virtual[:, 5]
    torch.testing.assert_close(layer(inputs), expected)


def test_virtual_weights_are_spread_evenly():
    """Bug it catches: a hash that leaves real weights without use, or signs that lean."""
    layer = hashed_mlp.HashedLinear(100, 80, 1000, seed=0)
    used = torch.bincount(layer._index, minlength=1000)
    assert used.float().var() / used.float().mean() == pytest.approx(1, abs=0.15)
    assert abs(layer._sign.mean()) < 0.05


def test_only_real_weights_are_trained_saved_and_exchanged(tmp_path: Path):
    net = hashed_mlp.model(sizes=[784, 1000, 10], smaller=8.0)
    assert sum(each.numel() for each in net.parameters()) == 785_000 // 8 + round(10_010 / 8)
    assert not [*net.buffers()], "DDP would send them in each step"
    (alone,) = run_ranks(jobs.train_rank, 1, JOB, tmp_path)
    several = run_ranks(jobs.train_rank, 3, JOB, tmp_path)
    assert {name: value.shape for name, value in alone["state"].items()} == {
        "1.weight": (45,),
        "3.weight": (20,),  # 164 / 8, to the even number
    }
    for rank in several:
        for name, value in alone["state"].items():
            np.testing.assert_allclose(rank["state"][name], value, rtol=1e-4, atol=1e-6)
