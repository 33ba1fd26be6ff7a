"""Tests engine/execute.py and engine/program.py: sums of any size are those of one process.

The backend (engine/process_group.py) gives the results that gloo gives.
"""

import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from scaletrain import plugins
from scaletrain.engine.execute import execute
from scaletrain.engine.program import RankProgram
from scaletrain.engine.transport import Group
from tests.ranks import run_ranks

ALGORITHMS = plugins.names("collective")


def contribution(rank: int, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Integers that only this rank can contribute; their sums are exact in every dtype."""
    return ((torch.arange(numel) + 3 * rank + 1) % 5 + rank).to(dtype)


def expected(size: int, numel: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return sum(
        (contribution(r, numel, torch.float64) for r in range(size)),
        torch.zeros(numel, dtype=torch.float64),
    ).to(dtype)


def on_threads(size: int, work) -> list:
    """``[work(rank, transport)]`` on threads of this process, with a hard timeout."""
    store, results, errors = dist.HashStore(), [None] * size, []

    def rank_main(rank: int) -> None:
        try:
            wire = plugins.load("transport", "threads")(
                Group(store, rank, size, timedelta(seconds=10))
            )
            results[rank] = work(rank, wire)
        except BaseException as error:
            errors.append(error)

    threads = [
        threading.Thread(target=rank_main, args=(rank,), daemon=True) for rank in range(size)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
    return results


@given(
    name=st.sampled_from(ALGORITHMS),
    size=st.integers(1, 9),
    numel=st.integers(1, 60),
    segments=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.int64, torch.uint8, torch.bfloat16]),
)
@settings(max_examples=150, deadline=None)
def test_any_size_on_threads(name: str, size: int, numel: int, segments: int, dtype: torch.dtype):
    """Also fewer elements than ranks, and odd numbers of both."""
    schedule = plugins.load("collective", name)(size)
    programs = [RankProgram.of(schedule, rank) for rank in range(size)]

    def work(rank, wire):
        tensor = contribution(rank, numel, dtype)
        execute(programs[rank], wire, tensor, torch.add, segments)
        return tensor

    for result in on_threads(size, work):
        assert torch.equal(result, expected(size, numel, dtype))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_replicas_are_bitwise_equal(name: str):
    """With numbers whose sum depends on the order of additions."""
    size, numel = 5, 1003
    schedule = plugins.load("collective", name)(size)
    programs = [RankProgram.of(schedule, rank) for rank in range(size)]

    def work(rank, wire):
        tensor = torch.randn(numel, generator=torch.Generator().manual_seed(rank)) * 10.0 ** (
            rank % 3
        )
        execute(programs[rank], wire, tensor, torch.add, 2)
        return tensor

    first, *others = on_threads(size, work)
    assert all(torch.equal(first, other) for other in others)
    assert all(torch.equal(first, again) for again in on_threads(size, work)), (
        "the same from run to run"
    )


def every_dtype(rank: int, size: int, path: str) -> list[str]:
    """Through the process group: dtypes, operations, shapes and strides that gloo takes give what
    gloo gives.
    """
    import scaletrain  # registers the backend

    assert scaletrain.__version__
    dist.init_process_group(
        "scaletrain", store=dist.FileStore(path, size), rank=rank, world_size=size
    )
    gloo = dist.new_group(backend="gloo")
    wrong = []
    dtypes = [
        torch.float32,
        torch.float64,
        torch.float16,
        torch.bfloat16,
        torch.int8,
        torch.uint8,
        torch.int32,
        torch.int64,
    ]
    operations = [dist.ReduceOp.SUM, dist.ReduceOp.PRODUCT, dist.ReduceOp.MIN, dist.ReduceOp.MAX]
    for dtype in dtypes:
        for operation in operations:
            for numel in (0, 1, 5, 4099, 300_001):
                ours = contribution(rank, numel, dtype) % 3
                theirs = ours.clone()
                dist.all_reduce(ours, operation)
                dist.all_reduce(theirs, operation, group=gloo)
                wrong += [] if torch.equal(ours, theirs) else [f"{dtype} {operation} {numel}"]
    # Non-contiguous: an expanded view's base, a transposed matrix, a strided slice
    matrix = contribution(rank, 12).view(3, 4).t()
    dist.all_reduce(matrix)
    wrong += [] if torch.equal(matrix, expected(size, 12).view(3, 4).t()) else ["transposed"]
    base = contribution(rank, 20)
    before = base.clone()
    dist.all_reduce(base[::2])
    same = torch.equal(base[1::2], before[1::2]) and torch.equal(base[::2], expected(size, 20)[::2])
    wrong += [] if same else ["strided"]
    scalar = torch.tensor(float(rank + 1))
    dist.all_reduce(scalar)
    wrong += [] if scalar.item() == size * (size + 1) / 2 else ["scalar"]
    many = [contribution(rank, n) for n in range(1, 30)]
    works = [dist.all_reduce(t, async_op=True) for t in many]
    for work in works:
        work.wait()
    wrong += [f"async {t.numel()}" for t in many if not torch.equal(t, expected(size, t.numel()))]
    # Forwarded: everything else that gloo does
    gathered = [torch.zeros(3) for _ in range(size)]
    dist.all_gather(gathered, contribution(rank, 3))
    wrong += (
        []
        if all(torch.equal(g, contribution(r, 3)) for r, g in enumerate(gathered))
        else ["all_gather"]
    )
    told = contribution(rank, 4)
    dist.broadcast(told, size - 1)
    wrong += [] if torch.equal(told, contribution(size - 1, 4)) else ["broadcast"]
    part = torch.zeros(2)
    dist.reduce_scatter_tensor(part, contribution(rank, 2 * size))
    wrong += (
        []
        if torch.equal(part, expected(size, 2 * size)[2 * rank : 2 * rank + 2])
        else ["reduce_scatter"]
    )
    objects = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    wrong += [] if [o["rank"] for o in objects] == list(range(size)) else ["object"]
    pair = dist.new_group([0, size - 1], backend="scaletrain")
    if rank in (0, size - 1):
        both = contribution(rank, 9)
        dist.all_reduce(both, group=pair)
        wrong += (
            []
            if torch.equal(both, contribution(0, 9) + contribution(size - 1, 9))
            else ["subgroup"]
        )
    dist.barrier()
    dist.destroy_process_group()
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("transport", ["auto", "gloo"])
def test_the_backend_gives_what_gloo_gives(size: int, transport: str, tmp_path, monkeypatch):
    monkeypatch.setenv("SCALETRAIN_TRANSPORT", transport)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run_ranks(every_dtype, size, str(tmp_path / "store"), timeout_s=100) == [[]] * size


def half_sums(rank: int, size: int, path: str) -> dict[str, bytes]:
    """Terms that half precision loses one by one: 256 + 1 + 1 is 256 in bfloat16, and 258 when
    rounded once.
    """
    import scaletrain

    assert scaletrain.__version__
    dist.init_process_group(
        "scaletrain", store=dist.FileStore(path, size), rank=rank, world_size=size
    )
    found = {}
    for dtype, large in ((torch.bfloat16, 256.0), (torch.float16, 2048.0)):
        few = torch.tensor([large if rank == owner else 1.0 for owner in range(size)], dtype=dtype)
        dist.all_reduce(few)
        whole = torch.full((size,), large + size - 1).to(dtype)
        assert torch.equal(few, whole), f"{dtype}: {few.tolist()} is not {whole.tolist()}"
        terms = [
            torch.randn(300_001, generator=torch.Generator().manual_seed(r)).to(dtype)
            for r in range(size)
        ]
        many = terms[rank].clone()
        dist.all_reduce(many)
        exact = sum(term.double() for term in terms)
        assert torch.allclose(
            many.double(), exact, rtol=torch.finfo(dtype).eps / 2 * 1.01, atol=1e-6
        ), "rounded once"
        found[str(dtype)] = many.view(torch.uint8).numpy().tobytes()
    dist.destroy_process_group()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shared_memory", "gloo"])
@pytest.mark.parametrize("size", [2, 3])
def test_half_precision_is_rounded_once(size: int, transport: str, tmp_path, monkeypatch):
    """Equal bits on every replica, and no worse than the float32 sum rounded."""
    monkeypatch.setenv("SCALETRAIN_TRANSPORT", transport)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first, *others = run_ranks(half_sums, size, str(tmp_path / "store"), timeout_s=60)
    assert all(other == first for other in others)
