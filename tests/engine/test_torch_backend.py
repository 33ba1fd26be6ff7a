"""Tests engine/torch_backend.py: torch's own machinery around collectives works as with gloo.

The class is for torch 2.14 and later. ``make test-torch TORCH=2.14.1`` runs these tests there.
"""

import os
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import scaletrain  # noqa: F401  (registers the backend)
from scaletrain.engine import torch_backend
from scaletrain.engine.backend import calls_of
from tests.engine.test_compatibility import join
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow
needs_torch_2_14 = pytest.mark.skipif(
    not torch_backend.SUPPORTED, reason="needs torch 2.14: see make test-torch"
)


def both(function: Any, tmp_path: Path, *arguments: Any) -> None:
    """Assert that a function of 2 ranks gives the same under gloo and under scaletrain."""
    gloo = run_ranks(function, 2, "gloo", str(tmp_path / "gloo"), *arguments)
    ours = run_ranks(function, 2, "scaletrain", str(tmp_path / "ours"), *arguments)
    assert ours == gloo


class Seen(TorchDispatchMode):
    """Notes the collectives that torch's dispatcher is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        if function.namespace in ("c10d", "_c10d_functional"):
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


def seen(rank: int, size: int, backend: str, path: str) -> Any:
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.utils.flop_counter import FlopCounterMode

    warnings.simplefilter("ignore", FutureWarning)  # names that torch will change
    join(backend, rank, size, path)
    tensor = torch.ones(4)
    with Seen() as mode:
        dist.all_reduce(tensor)
        dist.broadcast(tensor, 0)
        dist.all_gather_into_tensor(torch.empty(8), tensor)
        dist.reduce_scatter_tensor(torch.empty(2), tensor)
        dist.barrier()
    with CommDebugMode() as counted:
        dist.all_reduce(tensor)
    with FlopCounterMode(display=False) as flops:
        dist.all_reduce(tensor @ tensor)
    counts = {str(name): count for name, count in counted.get_comm_counts().items()}
    return mode.names, counts, flops.get_total_flops()


@needs_torch_2_14
def test_dispatch_modes_see_the_collectives(tmp_path: Path):
    both(seen, tmp_path)


def compiled(rank: int, size: int, backend: str, path: str) -> list[float]:
    join(backend, rank, size, path)
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model: Any = torch.compile(DistributedDataParallel(layers), backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.full((4, 8), rank + step + 1.0)).square().mean().backward()
        optimizer.step()
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return weights.tolist()


@pytest.mark.timeout(180)
def test_a_compiled_ddp_trains_as_under_gloo(tmp_path: Path):
    # The sum of two terms is the same in either order.
    both(compiled, tmp_path)


def built_in_hook(rank: int, size: int, backend: str, path: str, hook: str) -> list[float]:
    join(backend, rank, size, path)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Linear(16, 4), bucket_cap_mb=1e-5)
    model._register_builtin_comm_hook(getattr(dist.BuiltinCommHookType, hook))
    for step in range(2):
        model(torch.full((4, 16), 0.3 * rank + step + 1.0)).square().mean().backward()
    gradients = [parameter.grad.flatten() for parameter in model.parameters()]  # type: ignore[union-attr]
    return torch.cat(gradients).tolist()


@pytest.mark.parametrize("hook", ["ALLREDUCE", "FP16_COMPRESS"])
def test_built_in_hooks_give_the_gradients_of_gloo(tmp_path: Path, hook: str):
    both(built_in_hook, tmp_path, hook)


def works(rank: int, size: int, backend: str, path: str) -> Any:
    join(backend, rank, size, path)
    calls = {
        "all_reduce": lambda: dist.all_reduce(torch.ones(3), async_op=True),
        "broadcast": lambda: dist.broadcast(torch.ones(3), 0, async_op=True),
        "barrier": lambda: dist.barrier(async_op=True),
        "send": lambda: dist.isend(torch.ones(3), 1) if rank == 0 else dist.irecv(torch.ones(3), 0),
    }
    found = {}
    for name, call in calls.items():
        work: Any = call()
        deadline = time.monotonic() + 20
        # As a script may: it does not wait, but asks again and again.
        while name != "send" and not work.is_completed():
            assert time.monotonic() < deadline, name
            time.sleep(0.001)
        work.wait()
        found[name] = [work.is_completed(), work.is_success()]
        if torch.__version__ >= "2.13":  # earlier ones cannot convert gloo's answer
            found[name].append(work.exception())
    if rank == 0:
        dist.send(torch.ones(2), 1)
    else:
        found["source"] = dist.recv(torch.empty(2))
    return found


def test_works_answer_as_those_of_gloo(tmp_path: Path):
    both(works, tmp_path)


def debugged(rank: int, size: int, backend: str, path: str) -> Any:
    os.environ["TORCH_DISTRIBUTED_DEBUG"] = "DETAIL"
    dist.set_debug_level_from_env()
    join(backend, rank, size, path)
    tensor = torch.tensor([rank + 1.0])
    dist.all_reduce(tensor)
    is_ours = calls_of(dist.group.WORLD) is not None
    try:
        dist.all_reduce(torch.ones(3 + rank))
    except RuntimeError as error:
        message = str(error)
    # Both have read what the other one wants before either ends.
    store = dist.PrefixStore("over/", dist.FileStore(path, size))
    store.add("done", 1)
    while store.add("done", 0) < size:
        time.sleep(0.01)
    return tensor.item(), is_ours == (backend == "scaletrain"), "TensorShape=[4]" in message


@needs_torch_2_14
def test_debug_level_detail_compares_the_calls(tmp_path: Path):
    both(debugged, tmp_path)


def without_deprecated_calls(rank: int, size: int, path: str) -> float:
    # FutureWarning is torch's for names that it will take away.
    warnings.simplefilter("error", FutureWarning)
    warnings.simplefilter("error", DeprecationWarning)
    join("scaletrain", rank, size, path)
    group = dist.new_group([0, 1])
    calls = calls_of(group)
    assert calls is not None
    tensors = [torch.ones(2), torch.ones(2)]
    options = {
        name: getattr(torch._C._distributed_c10d, f"{name}Options")()
        for name in ("Allgather", "AllreduceCoalesced", "AllToAll", "ReduceScatter", "Gather")
    }
    # Every call that reaches gloo, under the name that it has there.
    works = [
        dist.all_reduce(torch.ones(2), group=group, async_op=True),
        calls.allgather([tensors], [torch.ones(2)], options["Allgather"]),
        calls._allgather_base(torch.ones(4), torch.ones(2), options["Allgather"]),
        calls.allgather_coalesced(
            [[tensor] for tensor in tensors], [torch.ones(2)], options["Allgather"]
        ),
        calls.allreduce_coalesced(tensors, options["AllreduceCoalesced"]),
        calls.alltoall(tensors, tensors, options["AllToAll"]),
        calls.alltoall_base(torch.ones(2), torch.ones(2), [], [], options["AllToAll"]),
        calls.reduce_scatter([torch.ones(2)], [tensors], options["ReduceScatter"]),
        calls._reduce_scatter_base(torch.ones(2), torch.ones(4), options["ReduceScatter"]),
    ]
    for work in works:
        work.wait()
    calls.limit(timedelta(seconds=20))
    model = DistributedDataParallel(nn.Linear(4, 1))
    model(torch.ones(2, 4)).sum().backward()
    dist.barrier()
    dist.destroy_process_group(group)
    dist.destroy_process_group()
    return float(model.module.weight.grad.sum())


def test_the_backend_calls_nothing_that_torch_deprecates(tmp_path: Path):
    assert run_ranks(without_deprecated_calls, 2, str(tmp_path / "store")) == [8.0, 8.0]
