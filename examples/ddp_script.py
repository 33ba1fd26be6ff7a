"""An ordinary DDP script. The only line about scaletrain is the backend's name:

scaletrain launch -n 2 -- examples/ddp_script.py      (or: torchrun --nproc-per-node 2
examples/ddp_script.py)
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import scaletrain  # noqa: F401  (registers the backend)

dist.init_process_group("scaletrain")  # instead of "gloo"
rank, size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
model = DistributedDataParallel(nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 1)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
inputs = torch.randn(256, 20)
targets = inputs.sum(1, keepdim=True)
for _ in range(100):
    optimizer.zero_grad()
    loss = nn.functional.mse_loss(model(inputs[rank::size]), targets[rank::size])
    loss.backward()
    optimizer.step()
dist.all_reduce(total := loss.detach().clone())
if rank == 0:
    print(f"{size} workers, loss {total.item() / size:.4f}")
dist.destroy_process_group()
