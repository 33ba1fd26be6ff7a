"""What the allreduce exchanges share: DistributedDataParallel over the default process group; the worker runs the optimizer."""

import contextlib
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scaletrain.run import spans
from scaletrain.training.exchange import Exchange, Setup
from scaletrain.world import World


def _traced_allreduce(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """What DDP does without a hook, and when a bucket is there the trace has it. DDP insists on the name ``bucket``."""
    began, index, buffer = time.time(), bucket.index(), bucket.buffer()
    buffer.div_(dist.get_world_size())

    def there(future: torch.futures.Future) -> torch.Tensor:
        reduced = future.value()[0]
        spans.add("bucket", f"bucket {index}", began, bytes=buffer.nbytes)
        return reduced

    return dist.all_reduce(buffer, async_op=True).get_future().then(there)


class AllreduceExchange(Exchange):
    """Averages gradients by allreduce, bucket by bucket while backward runs, through whichever backend is given.

    Constructed by all ranks; initialises torch.distributed's default process group.
    """

    def __init__(
        self, world: World, setup: Setup, *, backend: str, bucket_mb: float, options: Any = None
    ):
        dist.init_process_group(
            backend,
            store=setup.store,
            rank=world.rank,
            world_size=world.size,
            timeout=setup.timeout,
            pg_options=options,
        )
        self.world = world
        self._bucket_mb = bucket_mb
        self._device = setup.device
        self._last_gradient: float | None = None  # when this step's came
        self._record: dict[str, float] = {}

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        self._optimizer = optimizer
        if self._device.type == "cpu":  # on CUDA backward is only enqueued when its hooks run
            for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                parameter.register_post_accumulate_grad_hook(self._on_gradient)
        self._ddp = DistributedDataParallel(
            model, bucket_cap_mb=self._bucket_mb, gradient_as_bucket_view=True
        )
        if spans.on():
            self._ddp.register_comm_hook(None, _traced_allreduce)
        return self._ddp

    def accumulate(self) -> contextlib.AbstractContextManager[None]:
        return self._ddp.no_sync()

    def step(self, lr: float) -> None:
        if self._last_gradient is not None:
            self._record = {"wait_in_backward_s": time.perf_counter() - self._last_gradient}
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()

    def record(self) -> dict[str, float]:
        """``wait_in_backward_s``: from a rank's last gradient to the end of backward, when the means of all are there."""
        return self._record

    def _on_gradient(self, parameter: torch.Tensor) -> None:
        self._last_gradient = time.perf_counter()

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        total = values.to(self._device)
        dist.all_reduce(total)
        return total.cpu()

    def close(self) -> None:
        dist.barrier(device_ids=[self._device.index] if dist.get_backend() == "nccl" else None)
        dist.destroy_process_group()
