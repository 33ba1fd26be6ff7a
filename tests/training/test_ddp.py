"""Tests of training/ddp.py: one exchange a process. What it averages: test_trainer.py."""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scaletrain import plugins
from scaletrain.errors import UserError
from scaletrain.training.exchange import Setup
from scaletrain.world import World
from tests.ranks import run_ranks


def _join_twice(rank: int, size: int, folder: Path) -> int:
    store = dist.FileStore(str(folder / "store"), size)
    setup = Setup(store, torch.device("cpu"), timedelta(seconds=20), folder)
    native = plugins.load("exchange", "native")
    joined = native(World(rank, size, rank, size), setup)
    with pytest.raises(UserError, match="has a default process group already"):
        native(World(rank, size, rank, size), setup)
    total = int(joined.begin_sum(torch.tensor([float(rank + 1)]))())
    joined.close()
    return total


@pytest.mark.slow
def test_a_second_exchange_is_refused_and_the_first_goes_on(tmp_path: Path):
    assert run_ranks(_join_twice, 2, tmp_path) == [3, 3]
