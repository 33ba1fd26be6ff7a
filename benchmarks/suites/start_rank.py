"""One rank of ``python -m benchmarks.lab start``: a DDP job that ends after its first step.

Usage: ``scaletrain launch -n WORKERS -- benchmarks/suites/start_rank.py OUT``, or under torchrun.
Every rank writes the time of its first step's end to ``OUT/<rank>``.
"""

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def main(out: Path) -> None:
    """Make one step, and note when it has ended, in unix seconds."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    model = DistributedDataParallel(nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(8, 64)).square().mean().backward()
    optimizer.step()
    out.joinpath(os.environ["RANK"]).write_text(str(time.time()), encoding="utf-8")
    # A rank that left early would close connections that others still use.
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
