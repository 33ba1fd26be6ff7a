"""Tests of training/callbacks/max_norm.py: N workers stay within the norm as one does."""

from pathlib import Path

import pytest
import torch

from tests.ranks import run_ranks
from tests.training import jobs

JOB = {
    "model": {"name": "mlp", "sizes": [8, 16, 4]},
    "data": "tests.training.jobs:vectors",
    "batch_size": 16,
    "steps": 6,
    "optimizer": {"name": "sgd", "lr": 0.5, "momentum": 0.9},
}
LIMITED = JOB | {"callbacks": [{"name": "max_norm", "limit": 0.5}]}


@pytest.mark.slow
def test_the_weights_of_every_unit_stay_within_the_norm_on_every_rank(tmp_path: Path):
    results = run_ranks(jobs.train_rank, 2, LIMITED, tmp_path)
    alone = jobs.train_rank(0, 1, LIMITED, tmp_path)["state"]
    free = jobs.train_rank(0, 1, JOB, tmp_path)["state"]
    for name, weight in alone.items():
        if name.endswith("weight"):
            lengths = torch.from_numpy(weight).norm(dim=1)
            assert lengths.max() <= 0.5 + 1e-5 and (lengths > 0.49).any()
            assert torch.from_numpy(free[name]).norm(dim=1).max() > 0.6, "the limit must matter"
        for result in results:
            torch.testing.assert_close(
                torch.from_numpy(result["state"][name]),
                torch.from_numpy(weight),
                rtol=1e-4,
                atol=1e-6,
            )
