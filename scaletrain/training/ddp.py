"""Shared by the allreduce exchanges: DistributedDataParallel over a process group."""

import contextlib
import functools
import re
import time
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scaletrain.engine import ddp_end
from scaletrain.engine.backend import calls_of
from scaletrain.engine.rendezvous import for_nccl
from scaletrain.errors import UserError
from scaletrain.run import progress, spans
from scaletrain.training.exchange import Exchange, Setup, Sums, attached
from scaletrain.world import World


class ProcessGroupSums(Sums):
    """Sums over a process group of torch.distributed.

    Args:
        world: this worker's place in the group.
        device: on which sums are made.
        process_group: of torch.distributed.
    """

    def __init__(self, world: World, device: torch.device, process_group: Any):
        self.world = world
        self._device = device
        self._process_group = process_group

    def begin_sum(self, values: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin a sum that runs beside forward."""
        total = values.to(self._device)
        work = dist.all_reduce(total, group=self._process_group, async_op=True)

        def finish() -> torch.Tensor:
            work.wait()
            return total.cpu()

        return finish

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks of a small CPU tensor."""
        return self.begin_sum(values)()


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
        groups: of consecutive ranks, each with a model and a process group of its own.
        options: of the backend.

    Raises:
        UserError: there is a default process group already, or the workers cannot be split into
            so many groups.
    """

    def __init__(
        self,
        world: World,
        setup: Setup,
        *,
        backend: str,
        bucket_mb: float,
        find_unused_parameters: bool = False,
        groups: int = 1,
        options: Any = None,
    ):
        place = world.in_group(groups)
        if dist.is_initialized():
            raise UserError(
                "exchange: this process has a default process group already (allowed: one exchange a"
                " process, and no init_process_group beside it; close() ends an exchange)"
            )
        store = setup.store
        limit = setup.timeouts.first_collective
        if backend == "gloo":
            limit = progress.library_limit(limit)
        if backend == "nccl":
            store = for_nccl(store, on_one_host=world.num_nodes == 1)
        dist.init_process_group(
            backend,
            store=store,
            rank=world.rank,
            world_size=world.size,
            timeout=limit,
            pg_options=options,
        )
        self.world = world
        self.groups = groups
        self._sums = ProcessGroupSums(world, setup.device, dist.group.WORLD)
        # Of the ranks whose gradients are averaged.
        self.process_group: Any = dist.group.WORLD
        if groups > 1:
            # Every rank takes part in making every group.
            for number in range(groups):
                ranks = range(number * place.size, (number + 1) * place.size)
                made = dist.new_group(
                    ranks=[*ranks],
                    timeout=limit,
                    backend=backend,
                    pg_options=options,
                )
                if world.rank in ranks:
                    self.process_group = made
        self._group = ProcessGroupSums(place, setup.device, self.process_group)
        self._bucket_mb = bucket_mb
        self._find_unused_parameters = find_unused_parameters
        self._device = setup.device
        # By model, in the order of ``attach``: the order of its gradients, once it is known.
        self._gradients: list[Gradients] = []
        # Of the run before, in the same order.
        self._orders_before: list[list[int]] = []
        self._timeouts = setup.timeouts
        self._is_starting = True  # until the first step
        # By the module that ``attach`` returned: models in one training have an optimizer each.
        self._optimizers: dict[nn.Module, torch.optim.Optimizer] = {}
        self._traced: set[nn.Module] = set()  # those whose buckets are spans
        # Of all models since the last ``record``; None: not measured.
        self._waited_s: float | None = None

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> nn.Module:
        """Wrap the model in DDP."""
        # The view saves a copy: gradients lie in the buckets that travel.
        wrapped = _OrderedDDP(
            model,
            self._order_before(),
            process_group=self.process_group,
            bucket_cap_mb=self._bucket_mb,
            find_unused_parameters=self._find_unused_parameters,
            gradient_as_bucket_view=True,
        )
        ddp_end.group_last(wrapped)
        # On CUDA, hooks run when backward is enqueued, and tell nothing about its time.
        timed = self._device.type == "cpu"
        varies = self._find_unused_parameters
        self._gradients.append(Gradients(model, timed=timed, varies=varies))
        self._optimizers[wrapped] = optimizer
        if spans.on():
            self.trace_buckets()
        return wrapped

    def state_dict(self) -> dict[str, Any]:
        """Return the order in which each model's gradients came, as far as it is known."""
        return {"orders": [gradients.order for gradients in self._gradients]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let models that are attached from now on have the buckets of the run before."""
        self._orders_before = state["orders"]

    def _order_before(self) -> list[int]:
        """Return the order of the gradients of the model that is attached next, if it is known."""
        number = len(self._gradients)
        # Then DDP never orders its buckets anew.
        if self._find_unused_parameters or number >= len(self._orders_before):
            return []
        return self._orders_before[number]

    def trace_buckets(self) -> None:
        """Put a hook under all models that have none yet.

        It replaces DDP's built-in allreduce, so a run without a trace or profile gets none.
        """
        for wrapped in self._optimizers:
            if wrapped not in self._traced:
                self._traced.add(wrapped)
                assert isinstance(wrapped, DistributedDataParallel)
                wrapped.register_comm_hook(self.process_group, _traced_allreduce)

    def accumulate(self, model: nn.Module | None = None) -> contextlib.AbstractContextManager[None]:
        """Return DDP's ``no_sync``."""
        wrapped = attached(self._optimizers, model)
        assert isinstance(wrapped, DistributedDataParallel)
        return wrapped.no_sync()

    def synchronise(self, model: nn.Module | None = None) -> None:
        """Note how long DDP's backward waited: it returns once all means are there."""
        for gradients in self._gradients:
            if gradients.last_at is not None:
                waited_s = time.perf_counter() - gradients.last_at
                self._waited_s = (self._waited_s or 0.0) + waited_s
                gradients.last_at = None

    def step(self, model: nn.Module | None = None) -> None:
        """Run the optimizer on gradients that are the mean over all ranks."""
        self.synchronise(model)  # unless the caller has done so
        wrapped = attached(self._optimizers, model)
        self._optimizers[wrapped].step()
        for gradients in self._gradients:
            gradients.end_step()
        if self._is_starting:
            self._is_starting = False
            self._limit(self._timeouts.collective)

    def record(self) -> dict[str, float]:
        """Return the waits for other ranks, over all models, since it was last asked.

        ``wait_in_backward_s`` counts from this rank's last gradient to the end of backward, when
        all means are there. ``wait_in_forward_s`` is the broadcast of buffers before forward.
        """
        if self._waited_s is None:
            return {}
        waits = {"wait_in_backward_s": self._waited_s}
        self._waited_s = None
        in_forward_s = 0.0
        for wrapped in self._optimizers:
            in_forward_s += wrapped.take_wait_s()  # type: ignore[operator]
        if in_forward_s:
            waits["wait_in_forward_s"] = in_forward_s
        return waits

    def begin_sum(self, values: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin a sum that runs beside forward."""
        return self._sums.begin_sum(values)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Return the sum over the ranks of a small CPU tensor."""
        return self._sums.sum(values)

    @property
    def group(self) -> Sums:
        """This worker's end of sums over its group."""
        return self if self.groups == 1 else self._group

    def broadcast(self, tensors: Iterable[torch.Tensor], source: int) -> None:
        """Overwrite tensors with those of a rank (collective over all groups).

        Args:
            tensors: on this worker's device, of the same shapes and dtypes on every rank.
            source: the rank that keeps its own.
        """
        for tensor in tensors:
            dist.broadcast(tensor, source)

    def close(self) -> None:
        """Meet the other ranks once more, then end the process group."""
        # Without it, NCCL's barrier has to guess which GPU this rank uses.
        device_ids = [self._device.index] if dist.get_backend() == "nccl" else None
        dist.barrier(device_ids=device_ids)
        dist.destroy_process_group()

    def _limit(self, timeout: timedelta) -> None:
        """Change the time that others may take from now on in collectives."""
        for group in {dist.group.WORLD, self.process_group}:
            calls = calls_of(group)
            if calls is not None:
                calls.limit(timeout)
            elif dist.get_backend(group) == "gloo":
                dist.distributed_c10d._set_pg_timeout(progress.library_limit(timeout), group)
            else:
                dist.distributed_c10d._set_pg_timeout(timeout, group)


class Gradients:
    """Notes the order of a model's gradients, and when the last one of a step comes.

    The order is that of the first step. DDP orders its buckets in this way from then on, and with
    them the sums over more than two ranks. A resumed run needs the same order from its first step
    on; otherwise its last bits differ.

    A hook costs some microseconds. Once the order is known, only the gradient that came last keeps
    its own.

    Args:
        model: its trained parameters are numbered as they are registered.
        timed: note times as well.
        varies: the order may change from step to step.
    """

    def __init__(self, model: nn.Module, *, timed: bool, varies: bool):
        self.order: list[int] = []  # numbers of parameters, once it is known
        # When the last gradient came; None: not measured. Whoever reads it sets it to None.
        self.last_at: float | None = None
        self._timed = timed
        self._varies = varies
        # Of all passes of the first step. Written by backward's thread.
        self._came: list[int] = []
        self._is_first_step = True
        self._hooks: list[Any] = []
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for number, parameter in enumerate(trained):
            note = functools.partial(self._note, number)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(note))

    def end_step(self) -> None:
        """Take the order of the first step's last pass, in which all gradients travelled."""
        if not self._came:
            return
        num_trained = len(self._hooks)
        last = self._came[-num_trained:]
        if len(set(last)) == num_trained:
            self.order = last
        self._came = []
        self._is_first_step = False
        any_may_be_last = self._varies or not self.order
        for number, hook in enumerate(self._hooks):
            if not self._timed or not (any_may_be_last or number == last[-1]):
                hook.remove()

    def _note(self, number: int, parameter: torch.Tensor) -> None:
        if self._is_first_step:
            self._came.append(number)
        if self._timed:
            self.last_at = time.perf_counter()  # the next gradient overwrites it


class _OrderedDDP(DistributedDataParallel):
    """DDP with buckets in a known order of gradients from the first step on.

    Without an order, or if it is not one of this model's parameters, it is plain DDP.
    """

    def __init__(self, model: nn.Module, order: list[int], **options: Any):
        self._known_order = order
        self._wait_s = 0.0  # before forward, since it was last asked for
        super().__init__(model, **options)
        if self._is_known:
            # As if all gradients had come once, in the order in which DDP has the parameters.
            self.reducer._push_all_rebuilt_params()
            self.reducer._rebuild_buckets()

    def take_wait_s(self) -> float:
        """Return the seconds of waiting for other ranks before forward, since the last call."""
        wait_s, self._wait_s = self._wait_s, 0.0
        return wait_s

    def _sync_buffers(self) -> None:
        """Broadcast rank 0's buffers, and note how long this rank waited for them."""
        began = time.perf_counter()
        super()._sync_buffers()
        self._wait_s += time.perf_counter() - began

    def _pre_forward(self, *inputs: Any, **options: Any) -> Any:
        try:
            return super()._pre_forward(*inputs, **options)
        except RuntimeError as error:
            if "finished reduction in the prior iteration" not in str(error):
                raise
            raise _without_gradient(error, self._numbered_names()) from None

    def _numbered_names(self) -> list[str]:
        """Return the names of the trained parameters in the order in which DDP numbers them."""
        names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        return [names[id(parameter)] for parameter in self._build_params_for_reducer()[0]]

    def _build_params_for_reducer(self) -> tuple[list[Any], list[bool]]:
        parameters, are_sparse = super()._build_params_for_reducer()
        order = self._known_order
        self._is_known = sorted(order) == [*range(len(parameters))]
        if not self._is_known:
            return parameters, are_sparse
        return [parameters[each] for each in order], [are_sparse[each] for each in order]


def _without_gradient(error: RuntimeError, names: list[str]) -> UserError:
    """Return DDP's error about parameters without a gradient in the words of a job.

    Args:
        error: of DDP, which names parameters by their numbers.
        names: of the parameters, by number.
    """
    described = "some parameters"
    numbers = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
    if numbers:
        described = ", ".join(names[int(number)] for number in numbers[1].split())
    return UserError(
        f"model: the loss of the last step gave no gradient to {described} (allowed: a loss that"
        " depends on all trained parameters, freeze: [names] for those that it never needs, or"
        " --set exchange.find_unused_parameters=true for those that it needs in some steps)"
    )


# DDP insists on the parameter's name ``bucket``, and on annotations that are not strings.
def _traced_allreduce(state: Any, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket as DDP does without a hook, and write it into the trace.

    Args:
        state: the process group.
        bucket: of gradients.
    """
    began = time.time()
    index, buffer = bucket.index(), bucket.buffer()
    # Before the sum, which could overflow in half precision.
    buffer.div_(dist.get_world_size(state))

    def finish(future: torch.futures.Future) -> torch.Tensor:
        reduced = future.value()[0]
        spans.add("bucket", f"bucket {index}", began, bytes=buffer.nbytes)
        return reduced

    return dist.all_reduce(buffer, group=state, async_op=True).get_future().then(finish)
