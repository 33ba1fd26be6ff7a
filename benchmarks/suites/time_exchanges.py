"""Time one allreduce under each collective, and note how long the cores were busy for it.

``python -m benchmarks.lab prediction`` runs it on emulated hosts:

scaletrain launch -n 4 --launcher rehearsal -- benchmarks/suites/time_exchanges.py OUT.json BYTES
REPEATS ring,tree,star
"""

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import scaletrain  # noqa: F401  (registers the backend)
from scaletrain.engine.choice import Options

CORES = os.cpu_count() or 1


def idle_s() -> float:
    """Seconds that this machine's cores had nothing to do, since it started."""
    idle, waiting = Path("/proc/stat").read_text().split()[4:6]
    return (int(idle) + int(waiting)) / os.sysconf("SC_CLK_TCK")


WARMUP = 2  # the first one connects; in the second, buffers still grow
out, num_bytes, repeats, names = (
    sys.argv[1],
    int(sys.argv[2]),
    int(sys.argv[3]),
    sys.argv[4].split(","),
)
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
tensor = torch.zeros(num_bytes // 4)
measured, busy = {}, {}
for name in names:
    group = dist.new_group(
        backend="scaletrain", pg_options=Options(collective=name, transport="gloo")
    )
    seconds, worked = [], []
    for repeat in range(WARMUP + repeats):
        tensor.fill_(rank + 1.0)
        dist.barrier()
        began, idle = time.monotonic(), idle_s()
        dist.all_reduce(tensor, group=group)
        took = torch.tensor([time.monotonic() - began])
        dist.all_reduce(
            took, op=dist.ReduceOp.MAX
        )  # an exchange has ended when it has ended everywhere
        busy_s = CORES * (time.monotonic() - began) - (idle_s() - idle)
        wrong = (tensor != size * (size + 1) / 2).nonzero().flatten()
        assert not len(wrong), f"{name}: {len(wrong)} wrong sums, {tensor[wrong[0]]} at {wrong[0]}"
        if repeat >= WARMUP:
            seconds.append(took.item())
            worked.append(busy_s)
    measured[name], busy[name] = seconds, worked
    dist.barrier()
if rank == 0:
    with open(out, "w", encoding="utf-8") as file:
        json.dump(
            {"workers": size, "num_bytes": num_bytes, "seconds": measured, "busy_s": busy}, file
        )
dist.destroy_process_group()
