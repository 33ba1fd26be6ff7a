"""Seconds of one allreduce under each collective, measured by its own workers; run by ``scaletrain bench prediction``.

scaletrain launch -n 4 --launcher rehearsal -- benchmarks/suites/time_exchanges.py OUT.json BYTES REPEATS ring,tree,star
"""

import json
import sys
import time

import torch
import torch.distributed as dist

import scaletrain  # noqa: F401  (registers the backend)
from scaletrain.engine.process_group import Options

WARMUP = 2  # the first one connects; in the second, buffers still grow
out, num_bytes, repeats, names = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4].split(",")
dist.init_process_group("gloo")
rank, size = dist.get_rank(), dist.get_world_size()
tensor = torch.zeros(num_bytes // 4)
measured = {}
for name in names:
    group = dist.new_group(backend="scaletrain", pg_options=Options(collective=name, transport="gloo"))
    seconds = []
    for repeat in range(WARMUP + repeats):
        tensor.fill_(rank + 1.0)
        dist.barrier()
        began = time.monotonic()
        dist.all_reduce(tensor, group=group)
        took = torch.tensor([time.monotonic() - began])
        wrong = (tensor != size * (size + 1) / 2).nonzero().flatten()
        assert not len(wrong), f"{name}: {len(wrong)} wrong sums, {tensor[wrong[0]]} at {wrong[0]}"
        dist.all_reduce(took, op=dist.ReduceOp.MAX)  # an exchange has ended when it has ended everywhere
        if repeat >= WARMUP:
            seconds.append(took.item())
    measured[name] = seconds
    dist.barrier()
if rank == 0:
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"workers": size, "num_bytes": num_bytes, "seconds": measured}, file)
dist.destroy_process_group()
