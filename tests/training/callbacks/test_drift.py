"""Tests of training/callbacks/drift.py: replicas that differ are found, and the place is named."""

from pathlib import Path
from typing import Any

import pytest
import torch

from scaletrain.training.trainer import Trainer
from tests.ranks import run_ranks
from tests.training import jobs

JOB = {
    "model": {"name": "mlp", "sizes": [8, 16, 16, 4]},
    "data": "tests.training.jobs:vectors",
    "batch_size": 18,
    "steps": 6,
    "exchange": "native",
    "callbacks": [{"name": "drift", "every": 2}],
}


def _harmed(rank: int, size: int, tree: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Train, and change one bit of one weight on the last rank after the second step."""
    step = Trainer.step

    def harming_step(trainer: Trainer) -> Any:
        record = step(trainer)
        if rank == size - 1 and record.step == 2:
            weight = dict(trainer.module.named_parameters())["3.weight"]
            with torch.no_grad():
                weight.view(torch.int32)[0, 0] ^= 1
        return record

    Trainer.step = harming_step  # type: ignore[method-assign]
    return jobs.train_rank(rank, size, tree, run_dir)


@pytest.mark.slow
def test_equal_replicas_go_on(tmp_path: Path):
    results = run_ranks(jobs.train_rank, 3, JOB, tmp_path)
    assert all(result["summary"]["finished"] for result in results)


@pytest.mark.slow
def test_one_bit_of_one_rank_is_found_and_named(tmp_path: Path):
    told = r"step 3: the weights have drifted apart: 3\.weight of rank 2 is not that of rank 0"
    with pytest.raises(AssertionError, match=told):
        run_ranks(_harmed, 3, JOB, tmp_path)
