"""engine/ddp_end.py. Bug it catches: a rank waits for ever when DDP is freed after its group."""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scaletrain.engine import ddp_end
from tests.ranks import run_ranks


def begin_and_end(rank: int, size: int, folder: str, times: int) -> int:
    ddp_end.mend()
    for number in range(times):
        store = dist.FileStore(f"{folder}/{number}", size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
        model = DistributedDataParallel(nn.Linear(4, 4))
        model(torch.full((2, 4), float(rank))).sum().backward()
        total = torch.ones(1)
        dist.all_reduce(total)
        dist.destroy_process_group()
        # The only other one that holds the group.
        del model
    return times


def test_ddp_may_be_freed_after_its_process_group(tmp_path):
    assert run_ranks(begin_and_end, 3, str(tmp_path), 20, timeout_s=60) == [20] * 3
