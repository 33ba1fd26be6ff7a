"""Tests engine/process_group.py and engine/lane.py: the calls of a backend, right and wrong."""

import gc
import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

import scaletrain  # noqa: F401  (registers the backend)
from scaletrain.engine import backend, lane
from scaletrain.engine.choice import Options
from scaletrain.errors import UserError
from tests.ranks import run_ranks

pytestmark = pytest.mark.slow


def join(
    rank: int,
    size: int,
    port: str,
    timeout_s: float = 30,
    backend: str = "scaletrain",
    **options: str,
) -> Any:
    """Join over a TCPStore, as scripts do: rank 0 serves it. ``port`` is a file for its number."""
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, size, True, timedelta(seconds=30), False)
        Path(f"{port}.new").write_text(str(store.port))
        os.rename(f"{port}.new", port)
    else:
        while not Path(port).exists():
            time.sleep(0.01)
        number = int(Path(port).read_text())
        store = dist.TCPStore("127.0.0.1", number, size, False, timedelta(seconds=30), False)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
        pg_options=Options(**options) if options else None,
    )
    return dist.group.WORLD


def error_of(call: Any) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return ""


# Callbacks


def callbacks(rank: int, size: int, port: str) -> dict[str, Any]:
    join(rank, size, port)
    found = {}

    def doubled(future: torch.futures.Future) -> Any:
        mine = future.value()[0] * 2
        return dist.all_reduce(mine, async_op=True).get_future().wait()

    first = dist.all_reduce(torch.tensor([rank + 1.0]), async_op=True)
    chained = first.get_future().then(doubled).then(lambda future: future.value()[0] + 1)
    # A collective that is called while the callback may run: the order is that of the calls.
    later = torch.tensor([10.0 * (rank + 1)])
    dist.all_reduce(later)
    found["chained"] = chained.wait().tolist()
    found["later"] = later.tolist()

    works: list[Any] = []

    def waits_for_later(future: torch.futures.Future) -> float:
        works[0].wait()
        return float(tensors[1])

    tensors = [torch.full((1 << 20,), rank + 1.0), torch.tensor([rank + 5.0])]
    # The task of the second is given out while the first one's runs.
    early = dist.all_reduce(tensors[0], async_op=True).get_future()
    works.append(dist.all_reduce(tensors[1], async_op=True))
    found["waited"] = early.then(waits_for_later).wait()
    return found


def test_callback_may_run_a_collective_and_wait_for_it(tmp_path: Path):
    for found in run_ranks(callbacks, 2, str(tmp_path / "port")):
        assert found == {"chained": [13.0], "later": [30.0], "waited": 11.0}


def hooked(rank: int, size: int, port: str, backend: str, hook: str) -> list[float]:
    join(rank, size, port, backend=backend)
    torch.manual_seed(0)
    model = DistributedDataParallel(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), bucket_cap_mb=0.01
    )
    if hook == "power_sgd":
        state = PowerSGDState(None, matrix_approximation_rank=2, start_powerSGD_iter=2)
        model.register_comm_hook(state, powerSGD_hook)
    else:
        model.register_comm_hook(None, fp16_compress_hook)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(6):
        inputs = torch.randn(16, 64, generator=torch.Generator().manual_seed(100 * step + rank))
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]).tolist()


@pytest.mark.parametrize("hook", ["power_sgd", "fp16"])
def test_hooks_of_ddp_train_as_under_gloo(tmp_path: Path, hook: str):
    ours = run_ranks(hooked, 2, str(tmp_path / "a"), "scaletrain", hook)
    gloo = run_ranks(hooked, 2, str(tmp_path / "b"), "gloo", hook)
    assert ours[0] == ours[1]
    assert torch.allclose(torch.tensor(ours[0]), torch.tensor(gloo[0]), atol=1e-5)


# Calls that do not match


def mismatches(rank: int, size: int, port: str, wire: str, what: str) -> tuple[str, str, float]:
    join(rank, size, port, 3, collective="ring" if wire == "gloo" else "auto", transport=wire)
    dist.all_reduce(torch.ones(5))
    tensor = torch.ones(1000)
    operation = dist.ReduceOp.SUM
    if rank == 1 and what == "elements":
        tensor = torch.ones(1001)
    elif rank == 1 and what == "dtype":
        tensor = torch.ones(1000, dtype=torch.int32)
    elif rank == 1 and what == "operation":
        operation = dist.ReduceOp.MAX
    elif rank == 1 and what == "number":
        # A collective that the other ranks do not call; its root does not wait for them to.
        dist.group.WORLD.broadcast([torch.ones(1)], root(1))
    began = time.monotonic()
    first = error_of(lambda: dist.all_reduce(tensor, operation))
    seconds = time.monotonic() - began
    return first, error_of(lambda: dist.all_reduce(torch.ones(5))), seconds


def root(rank: int) -> dist.BroadcastOptions:
    options = dist.BroadcastOptions()
    options.rootRank = rank
    return options


@pytest.mark.parametrize("what", ["elements", "dtype", "operation", "number"])
def test_ranks_that_want_different_things_are_named(tmp_path: Path, what: str):
    wanted = {
        "elements": "#2 of 1,001 float32 (add)",
        "dtype": "#2 of 1,000 int32 (add)",
        "operation": "#2 of 1,000 float32 (maximum)",
        "number": "broadcast #2 of 1 float32, root 1",
    }[what]
    ends = run_ranks(mismatches, 2, str(tmp_path / "port"), "shared_memory", what)
    for first, later, seconds in ends:
        assert "the ranks' calls do not match" in first
        assert "rank 0 is in allreduce #2 of 1,000 float32 (add)" in first or wanted in first
        assert wanted in first
        assert "an earlier one failed" in later
        assert seconds < 2  # at once, not after the group's timeout


def test_mismatch_over_tcp_is_no_wrong_sum(tmp_path: Path):
    ends = run_ranks(mismatches, 2, str(tmp_path / "port"), "gloo", "elements")
    errors = [first for first, _, _ in ends]
    assert all("timed out" in error for error in errors)
    # Which other rank wants what is known where its answer came in time.
    assert any("1,001 float32" in error and "1,000 float32" in error for error in errors)


def local_errors(rank: int, size: int, port: str) -> dict[str, Any]:
    join(rank, size, port)
    found: dict[str, Any] = {}
    base = torch.tensor([rank + 1.0])
    dist.all_reduce(base.expand(4))
    found["expanded"] = base.tolist()
    negative = torch._neg_view(torch.full((3,), rank + 1.0))
    # torch 2.14 hands backends a copy of such a view, and forgets it: gloo's sum is lost, too.
    calls = backend.calls_of(dist.group.WORLD)
    calls.allreduce([negative], dist.AllreduceOptions()).wait()
    found["negative"] = negative.tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lane, "_without_repetitions", _no_memory)
        found["refused"] = error_of(lambda: dist.all_reduce(torch.ones(3, 2).t()))
    after = torch.tensor([rank + 1.0])
    dist.all_reduce(after)
    found["after"] = after.tolist()
    resized = torch.ones(4)
    dist.all_reduce(resized)
    resized.untyped_storage().resize_(800)
    found["resized"] = resized.untyped_storage().nbytes()
    return found


def _no_memory(tensor: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no memory for a copy")


def test_what_concerns_one_tensor_alone_ends_no_group(tmp_path: Path):
    for found in run_ranks(local_errors, 2, str(tmp_path / "port")):
        assert "no memory for a copy" in found.pop("refused")
        assert found == {
            "expanded": [3.0],
            "negative": [-3.0] * 3,
            "after": [3.0],
            "resized": 800,
        }


# Failing fast


def death_before_the_first(_: int, __: int, port: str, victim: int) -> tuple[float, str]:
    """Fork two ranks, of which one dies; return when the other noticed, and how."""
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            join(rank, 2, port, 60)
            if rank == victim:
                while not Path(f"{port}.joined").exists():
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
            Path(f"{port}.joined").write_text("")
            began = time.monotonic()
            error = error_of(lambda: dist.all_reduce(torch.ones(3)))
            Path(f"{port}.end").write_text(f"{time.monotonic() - began} {error}")
            os._exit(0)
        pids.append(pid)
    os.waitpid(pids[victim], 0)
    deadline = time.monotonic() + 30
    while not os.waitpid(pids[1 - victim], os.WNOHANG)[0]:
        if time.monotonic() > deadline:
            os.kill(pids[1 - victim], signal.SIGKILL)
        time.sleep(0.01)
    seconds, _, error = Path(f"{port}.end").read_text().partition(" ")
    return float(seconds), error


@pytest.mark.parametrize("victim", [0, 1])  # rank 0 serves the store
def test_a_death_before_the_first_allreduce_is_noticed(tmp_path: Path, victim: int):
    ((seconds, error),) = run_ranks(death_before_the_first, 1, str(tmp_path / "port"), victim)
    assert seconds < 10
    assert "is lost: it has ended" in error or "the store where the ranks meet is gone" in error


def aborted(rank: int, size: int, port: str, wire: str, earlier: int) -> tuple[str, float]:
    group = join(rank, size, port, 60, collective="ring", transport=wire)
    for _ in range(earlier):
        dist.all_reduce(torch.ones(3))
    if rank == 1:
        while not Path(f"{port}.end").exists():
            time.sleep(0.01)
        return "", 0.0
    threading.Timer(0.5, group.abort).start()
    began = time.monotonic()
    error = error_of(lambda: dist.all_reduce(torch.ones(3)))
    Path(f"{port}.end").write_text("")
    return error, time.monotonic() - began


# A wait inside gloo lasts for gloo's own limit.
@pytest.mark.parametrize(
    ("wire", "earlier"), [("shared_memory", 0), ("shared_memory", 1), ("gloo", 0)]
)
def test_abort_ends_a_wait_for_peers(tmp_path: Path, wire: str, earlier: int):
    (error, seconds), _ = run_ranks(aborted, 2, str(tmp_path / "port"), wire, earlier)
    assert "has ended the group (abort)" in error or "is lost" in error
    assert seconds < 10


def after_abort(rank: int, size: int, port: str, wire: str) -> tuple[str, list[float]]:
    group = join(rank, size, port, 60, collective="ring", transport=wire)
    tensor = torch.full((3,), rank + 1.0)
    dist.all_reduce(tensor)
    group.abort()
    return error_of(lambda: dist.all_reduce(tensor)), tensor.tolist()


@pytest.mark.parametrize("wire", ["shared_memory", "gloo"])
def test_no_allreduce_runs_after_abort(tmp_path: Path, wire: str):
    for error, values in run_ranks(after_abort, 2, str(tmp_path / "port"), wire):
        assert "this rank has ended the group (abort)" in error
        assert values == [3.0] * 3


def interrupted(rank: int, size: int, port: str) -> float:
    join(rank, size, port, 60)
    if rank == 1:
        while not Path(f"{port}.end").exists():
            time.sleep(0.01)
        return 0.0
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    began = time.monotonic()
    try:
        dist.all_reduce(torch.ones(3), async_op=True).wait()
    except KeyboardInterrupt:
        return time.monotonic() - began
    finally:
        Path(f"{port}.end").write_text("")
        dist.group.WORLD.abort()
    return -1.0


def test_ctrl_c_ends_a_wait_before_the_first_allreduce(tmp_path: Path):
    seconds, _ = run_ranks(interrupted, 2, str(tmp_path / "port"))
    assert 0 < seconds < 10


# Threads, groups, spellings


def threads(rank: int, size: int, port: str) -> list[list[float]]:
    join(rank, size, port)
    tensors = [torch.full((5,), rank + 1.0) for _ in range(6)]
    callers = [threading.Thread(target=dist.all_reduce, args=(tensor,)) for tensor in tensors]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    return [tensor.tolist() for tensor in tensors]


def test_first_allreduces_of_several_threads_share_a_lane(tmp_path: Path):
    for sums in run_ranks(threads, 2, str(tmp_path / "port")):
        assert sums == [[3.0] * 5] * 6


class Held(NamedTuple):
    """What a process holds at a moment."""

    descriptors: int
    threads: int
    mib: float  # of memory that is no file's

    @classmethod
    def now(cls) -> "Held":
        gc.collect()
        status = dict(
            line.split(":") for line in Path("/proc/self/status").read_text().splitlines()
        )
        kib = sum(int(status[name].split()[0]) for name in ("RssAnon", "RssShmem"))
        return cls(len(os.listdir("/proc/self/fd")), int(status["Threads"]), kib / 1024)

    @classmethod
    def around(cls, use: Callable[[int], None], warm_up: int, total: int) -> tuple["Held", "Held"]:
        """Use something again and again; return what is held after the warm-up and at the end."""
        for number in range(warm_up):
            use(number)
        before = cls.now()
        for number in range(warm_up, total):
            use(number)
        return before, cls.now()


def groups(rank: int, size: int, port: str) -> tuple[Held, Held, list[float]]:
    join(rank, size, port)

    sums: list[float] = []

    def use(number: int) -> None:
        group = dist.new_group([0, 1])
        tensor = torch.tensor([rank + 1.0 + number])
        dist.all_reduce(tensor, group=group)
        dist.barrier(group)
        dist.destroy_process_group(group)
        sums.append(float(tensor))

    return *Held.around(use, 50, 200), sums


def test_two_hundred_groups_leave_nothing(tmp_path: Path):
    for before, after, sums in run_ranks(groups, 2, str(tmp_path / "port")):
        assert sums == [3.0 + 2 * number for number in range(200)]
        assert after.descriptors <= before.descriptors + 2
        assert after.threads <= before.threads + 2
        assert after.mib < before.mib + 3  # 20 KiB a group


def collectives(rank: int, size: int, port: str) -> tuple[Held, Held]:
    join(rank, size, port)

    def use(number: int) -> None:
        dist.all_reduce(total := torch.full((1000,), rank + 1.0 + number))
        gathered = torch.empty(2000)
        dist.all_gather_into_tensor(gathered, torch.full((1000,), rank + 1.0))
        dist.reduce_scatter_tensor(part := torch.empty(1000), gathered)
        dist.broadcast(sent := torch.full((1000,), float(rank)), 1)
        dist.all_to_all_single(turned := torch.empty(2), torch.tensor([rank, rank + 10.0]))
        works = [dist.all_reduce(torch.ones(10), async_op=True) for _ in range(4)]
        for work in works:
            work.wait()
        dist.barrier()
        assert total[0] == 3 + 2 * number and part[-1] == 2 * (rank + 1) and sent[0] == 1
        assert turned.tolist() == [10.0 * rank, 10.0 * rank + 1]

    return Held.around(use, 200, 1200)


def test_ten_thousand_collectives_leave_nothing(tmp_path: Path):
    for before, after in run_ranks(collectives, 2, str(tmp_path / "port")):
        assert after.descriptors == before.descriptors and after.threads == before.threads
        assert after.mib < before.mib + 3  # 300 bytes a collective


def spellings(rank: int, size: int, port: str, backend: str) -> dict[str, Any]:
    group: Any = join(rank, size, port, backend=backend)
    limit = timedelta(seconds=20)
    maximum = dist.ReduceOp.MAX
    options = dist.AllreduceOptions()
    calls = {
        "a tensor": lambda t: group.allreduce(t),
        "a tensor, an operation": lambda t: group.allreduce(t, maximum),
        "a list, an operation": lambda t: group.allreduce([t], maximum),
        "op=": lambda t: group.allreduce(t, op=maximum),
        "tensor=": lambda t: group.allreduce(tensor=t, op=maximum),
        "tensors=, opts=": lambda t: group.allreduce(tensors=[t], opts=options),
        "timeout=": lambda t: group.allreduce(t, timeout=limit),
        "a list, an operation, a timeout": lambda t: group.allreduce([t], maximum, limit),
        "barrier": lambda t: group.barrier(),
        "barrier, options": lambda t: group.barrier(dist.BarrierOptions()),
        "barrier, timeout=": lambda t: group.barrier(timeout=limit),
        "broadcast, root=": lambda t: group.broadcast(t, root=0),
        "reduce": lambda t: group.reduce(t, 0),
        "gather": lambda t: group.allgather([torch.empty(3) for _ in range(size)], t),
    }
    found: dict[str, Any] = {}
    for name, call in calls.items():
        tensor = torch.full((3,), rank + 1.0)
        call(tensor).wait()
        found[name] = tensor.tolist()
    found["store"] = isinstance(group.get_group_store(), dist.Store)
    found["number"] = group._get_sequence_number_for_group() >= len(calls)
    return found


def test_other_spellings_of_calls_do_as_under_gloo(tmp_path: Path):
    ours = run_ranks(spellings, 2, str(tmp_path / "a"), "scaletrain")
    gloo = run_ranks(spellings, 2, str(tmp_path / "b"), "gloo")
    for mine, expected in zip(ours, gloo, strict=True):
        # A reduce leaves the tensors of the other ranks to the backend.
        if ours.index(mine) == 1:
            mine["reduce"] = expected["reduce"]
        assert mine == expected


def is_ours(group: Any) -> bool:
    return group is not dist.GroupMember.NON_GROUP_MEMBER and backend.calls_of(group) is not None


def named_gloo(rank: int, size: int, port: str) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCALETRAIN_AS", "gloo")
        backend.register()  # as torch does while it is imported
    join(rank, size, port, backend="gloo")
    pair = dist.new_group([0, 1])
    alone = dist.new_group([1])
    tensor = torch.tensor([rank + 1.0])
    dist.all_reduce(tensor, group=pair)
    dist.monitored_barrier()
    return {
        "names": [dist.get_backend(), dist.get_backend(pair)],
        "ours": is_ours(pair),
        "alone": is_ours(alone),
        "sum": float(tensor),
    }


def test_the_name_gloo_may_mean_ours(tmp_path: Path):
    first, second = run_ranks(named_gloo, 2, str(tmp_path / "port"))
    assert first == {"names": ["gloo", "gloo"], "ours": True, "alone": False, "sum": 3.0}
    assert second == {**first, "alone": True}


def test_other_names_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SCALETRAIN_AS", "nccl")
    with pytest.raises(UserError, match=r"SCALETRAIN_AS: nccl is not allowed \(allowed: gloo\)"):
        backend.register()
