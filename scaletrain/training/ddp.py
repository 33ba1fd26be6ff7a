"""Shared by the allreduce exchanges: DistributedDataParallel over the default process group."""

import contextlib
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scaletrain.errors import UserError
from scaletrain.run import spans
from scaletrain.training.exchange import Exchange, Setup, attached
from scaletrain.world import World


class AllreduceExchange(Exchange):
    """Averages gradients by allreduce, bucket by bucket while backward runs.

    The worker runs the optimizer. All ranks construct it: it initialises torch.distributed's
    default process group.

    Args:
        world: this worker's place.
        setup: the job's store, the device and the time limit.
        backend: of torch.distributed: gloo, nccl or scaletrain.
        bucket_mb: size of DDP's gradient buckets in MiB.
        find_unused_parameters: let DDP look for parameters without a gradient after each forward.
        options: of the backend.

    Raises:
        UserError: there is a default process group already.
    """

    def __init__(
        self,
        world: World,
        setup: Setup,
        *,
        backend: str,
        bucket_mb: float,
        find_unused_parameters: bool = False,
        options: Any = None,
    ):
        if dist.is_initialized():
            raise UserError(
                "exchange: this process has a default process group already (allowed: one exchange a"
                " process, and no init_process_group beside it; close() ends an exchange)"
            )
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
        self._find_unused_parameters = find_unused_parameters
        self._device = setup.device
        # By what ``attach`` returned: models that train together have an optimizer each.
        self._optimizers: dict[nn.Module, torch.optim.Optimizer] = {}
        # When backward made its last gradient; None on CUDA. Written by backward's thread.
        self._last_gradient_at: float | None = None
        self._waited_s: float | None = None  # of all models since the last ``record``

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Wrap the model in DDP."""
        # On CUDA, hooks run when backward is enqueued, and tell nothing about its time.
        if self._device.type == "cpu":
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.register_post_accumulate_grad_hook(self._note_gradient)
        # The view saves a copy: gradients lie in the buckets that travel.
        wrapped = DistributedDataParallel(
            model,
            bucket_cap_mb=self._bucket_mb,
            find_unused_parameters=self._find_unused_parameters,
            gradient_as_bucket_view=True,
        )
        # A hook replaces DDP's built-in allreduce, so a run without a trace does not get one.
        if spans.on():
            wrapped.register_comm_hook(None, _traced_allreduce)
        self._optimizers[wrapped] = optimizer
        return wrapped

    def accumulate(self, model: nn.Module | None = None) -> contextlib.AbstractContextManager[None]:
        """Return DDP's ``no_sync``."""
        wrapped = attached(self._optimizers, model)
        assert isinstance(wrapped, DistributedDataParallel)
        return wrapped.no_sync()

    def step(self, model: nn.Module | None = None) -> None:
        """Run the optimizer on gradients that are the mean over all ranks."""
        if self._last_gradient_at is not None:
            # DDP's backward returns once all means are there, and this method runs right after it.
            waited_s = time.perf_counter() - self._last_gradient_at
            self._waited_s = (self._waited_s or 0.0) + waited_s
        self._optimizers[attached(self._optimizers, model)].step()

    def record(self) -> dict[str, float]:
        """Return ``wait_in_backward_s``, over all models, since it was last asked.

        It counts from this rank's last gradient to the end of backward, when all means are there.
        """
        if self._waited_s is None:
            return {}
        waited_s, self._waited_s = self._waited_s, None
        return {"wait_in_backward_s": waited_s}

    def begin_sum(self, values: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin a sum that runs beside forward."""
        total = values.to(self._device)
        work = dist.all_reduce(total, async_op=True)

        def finish() -> torch.Tensor:
            work.wait()
            return total.cpu()

        return finish

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks of a small CPU tensor."""
        return self.begin_sum(values)()

    def close(self) -> None:
        """Meet the other ranks once more, then end the process group."""
        # Without it, NCCL's barrier has to guess which GPU this rank uses.
        device_ids = [self._device.index] if dist.get_backend() == "nccl" else None
        dist.barrier(device_ids=device_ids)
        dist.destroy_process_group()

    def _note_gradient(self, parameter: torch.Tensor) -> None:
        # Each gradient overwrites the time of the one before, so that of the last one remains.
        self._last_gradient_at = time.perf_counter()


# DDP insists on the parameter's name ``bucket``, and on annotations that are not strings.
def _traced_allreduce(state: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket as DDP does without a hook, and write it into the trace."""
    began = time.time()
    index, buffer = bucket.index(), bucket.buffer()
    # Before the sum, which could overflow in half precision.
    buffer.div_(dist.get_world_size())

    def finish(future: torch.futures.Future) -> torch.Tensor:
        reduced = future.value()[0]
        spans.add("bucket", f"bucket {index}", began, bytes=buffer.nbytes)
        return reduced

    return dist.all_reduce(buffer, async_op=True).get_future().then(finish)
