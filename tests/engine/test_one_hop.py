"""Tests engine/one_hop_calls.py and engine/blocks.py: collectives in shared memory beside gloo's.

Every rank contributes what only it could. What gloo refuses is refused; strided tensors, of which
gloo passes on the storage, are held against the values themselves.
"""

import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from scaletrain.run import flight
from scaletrain.run.layout import RunDir
from tests.ranks import run_ranks

COPIED = [torch.float32, torch.float64, torch.bfloat16, torch.uint8, torch.int64, torch.bool]
REDUCED = [torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.uint8]
SUM, MAX, AVG = dist.ReduceOp.SUM, dist.ReduceOp.MAX, dist.ReduceOp.AVG


def join(rank: int, size: int, path: str, timeout_s: float = 30) -> tuple[Any, Any]:
    """Return a group of ours and one of gloo."""
    import scaletrain  # registers the backend

    assert scaletrain.__version__
    limit = timedelta(seconds=timeout_s)
    store = dist.FileStore(path, size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=limit)
    return dist.new_group(backend="scaletrain", timeout=limit), dist.group.WORLD


def mine(rank: int, shape: tuple[int, ...], dtype: torch.dtype, salt: int = 0) -> Tensor:
    """Small integers that only this rank could give; their sums are exact in every dtype."""
    generator = torch.Generator().manual_seed(1000 * rank + salt)
    return torch.randint(0, 5, shape, generator=generator).to(dtype)


def cases(rank: int, size: int, n: int) -> dict[str, Callable[[Any], list[Tensor]]]:
    """Calls on a group, by name, that return the results of this rank."""

    def outputs(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
        return [torch.zeros(shape, dtype=dtype) for _ in range(size)]

    found: dict[str, Callable[[Any], list[Tensor]]] = {}
    for dtype in COPIED:

        def broadcast(group, dtype=dtype):
            tensor = mine(rank, (n, 3), dtype)
            dist.broadcast(tensor, size - 1, group=group)
            return [tensor]

        def all_gather(group, dtype=dtype):
            into = outputs((n, 3), dtype)
            dist.all_gather(into, mine(rank, (n, 3), dtype), group=group)
            return into

        def all_gather_turned(group, dtype=dtype):
            into = [tensor.t() for tensor in outputs((3, n), dtype)]
            dist.all_gather(into, mine(rank, (3, n), dtype).t(), group=group)
            return into

        def all_gather_into(group, dtype=dtype):
            into = torch.zeros((n * size, 2), dtype=dtype)
            dist.all_gather_into_tensor(into, mine(rank, (n, 2), dtype), group=group)
            return [into]

        def all_gather_in_place(group, dtype=dtype):
            into = mine(rank, (n * size,), dtype)
            dist.all_gather_into_tensor(into, into.chunk(size)[rank], group=group)
            return [into]

        def gather(group, dtype=dtype):
            into = outputs((n,), dtype) if rank == size - 1 else None
            dist.gather(mine(rank, (n,), dtype), into, size - 1, group=group)
            return into or []

        def scatter(group, dtype=dtype):
            into = torch.zeros(n, dtype=dtype)
            parts = [mine(7, (n,), dtype, peer) for peer in range(size)] if rank == 0 else None
            dist.scatter(into, parts, 0, group=group)
            return [into]

        def all_to_all_single(group, dtype=dtype):
            into = torch.zeros(n * size, dtype=dtype)
            dist.all_to_all_single(into, mine(rank, (n * size,), dtype), group=group)
            return [into]

        def all_to_all_uneven(group, dtype=dtype):
            # From rank a to rank b go (a + 1) * b rows: some ranks get nothing.
            sends = [(rank + 1) * peer for peer in range(size)]
            receives = [(peer + 1) * rank for peer in range(size)]
            into = torch.zeros((sum(receives), n), dtype=dtype)
            source = mine(rank, (sum(sends), n), dtype)
            dist.all_to_all_single(into, source, receives, sends, group=group)
            return [into]

        def all_to_all(group, dtype=dtype):
            into = outputs((n, 2), dtype)
            parts = [mine(rank, (n, 2), dtype, peer) for peer in range(size)]
            dist.all_to_all(into, parts, group=group)
            return into

        for call in (broadcast, all_gather, all_gather_turned, all_gather_into, gather, scatter):
            found[f"{call.__name__} {dtype}"] = call
        for call in (all_gather_in_place, all_to_all_single, all_to_all_uneven, all_to_all):
            found[f"{call.__name__} {dtype}"] = call
    for dtype in REDUCED:
        for operation in (SUM, MAX, AVG) if dtype.is_floating_point else (SUM, MAX):

            def reduce(group, dtype=dtype, operation=operation):
                tensor = mine(rank, (n,), dtype)
                dist.reduce(tensor, size - 1, operation, group=group)
                return [tensor] if rank == size - 1 else []

            def reduce_scatter(group, dtype=dtype, operation=operation):
                into = torch.zeros(n + rank, dtype=dtype)
                parts = [mine(rank, (n + peer,), dtype, peer) for peer in range(size)]
                dist.reduce_scatter(into, parts, operation, group=group)
                return [into]

            def reduce_scatter_tensor(group, dtype=dtype, operation=operation):
                into = torch.zeros((n, 2), dtype=dtype)
                source = mine(rank, (n * size, 2), dtype)
                dist.reduce_scatter_tensor(into, source, operation, group=group)
                return [into]

            for call in (reduce, reduce_scatter, reduce_scatter_tensor):
                found[f"{call.__name__} {dtype} {operation}"] = call
    return found


def beside_gloo(rank: int, size: int, path: str) -> list[str]:
    ours, gloo = join(rank, size, path)
    wrong = []
    for n in (1, 700):
        for name, call in cases(rank, size, n).items():
            for got, expected in zip(call(ours), call(gloo), strict=True):
                if not torch.equal(got, expected):
                    wrong.append(f"{name} {n}")
    # Larger than the blocks: many pieces.
    for call in (dist.all_gather_into_tensor, dist.reduce_scatter_tensor):
        few, many = 1_000_003, 1_000_003 * size
        sizes = (many, few) if call is dist.all_gather_into_tensor else (few, many)
        results = []
        for group in (ours, gloo):
            into = torch.zeros(sizes[0])
            call(into, mine(rank, (sizes[1],), torch.float32), group=group)
            results.append(into)
        if not torch.equal(*results):
            wrong.append(f"{call.__name__} large")
    assert ours.calls.record()["transport"] == "shared_memory"  # not all of it was gloo's
    return wrong


@pytest.mark.parametrize("size", [2, 3])
def test_results_are_those_of_gloo(tmp_path: Path, size: int):
    for wrong in run_ranks(beside_gloo, size, str(tmp_path / "store")):
        assert wrong == []


def values_not_storage(rank: int, size: int, path: str) -> dict[str, list[float]]:
    ours, _ = join(rank, size, path)
    every_second = torch.full((6,), 10.0 * rank)[::2]
    dist.broadcast(every_second, 1, group=ours)
    found = {"broadcast": every_second.storage().tolist()}
    negative = torch._neg_view(torch.full((3,), rank + 1.0))
    dist.reduce(negative, 0, group=ours)
    found["reduce"] = negative.tolist() if rank == 0 else []
    into = torch.zeros(8)[::2]
    dist.all_to_all_single(into, mine(rank, (8,), torch.float32)[::2].contiguous(), group=ours)
    found["all_to_all"] = into.tolist()
    scattered = torch.zeros(4)[::2]
    parts = [torch.full((2,), 5.0), torch.full((2,), 6.0)] if rank == 0 else None
    dist.scatter(scattered, parts, 0, group=ours)
    found["scatter"] = scattered.storage().tolist()
    return found


def test_strided_tensors_get_the_values_and_nothing_between_them(tmp_path: Path):
    first, second = run_ranks(values_not_storage, 2, str(tmp_path / "store"))
    assert first["broadcast"] == [10.0, 0.0] * 3
    assert second["broadcast"] == [10.0] * 6
    assert first["reduce"] == [-3.0] * 3
    sent = [mine(rank, (8,), torch.float32)[::2].tolist() for rank in range(2)]
    assert first["all_to_all"] == sent[0][:2] + sent[1][:2]
    assert second["all_to_all"] == sent[0][2:] + sent[1][2:]
    assert [first["scatter"], second["scatter"]] == [[5.0, 0.0, 5.0, 0.0], [6.0, 0.0, 6.0, 0.0]]


def works(rank: int, size: int, path: str) -> dict[str, Any]:
    ours, _ = join(rank, size, path)
    found: dict[str, Any] = {}
    tensors = [mine(rank, (100 + n,), torch.float32, n) for n in range(20)]
    begun = [dist.broadcast(tensor, n % size, ours, True) for n, tensor in enumerate(tensors)]
    # A barrier comes after all that was called before it.
    dist.barrier(ours)
    found["barrier"] = all(work.is_completed() for work in begun)
    found["async"] = all(
        torch.equal(tensor, mine(n % size, (100 + n,), torch.float32, n))
        for n, tensor in enumerate(tensors)
    )
    into = torch.zeros(2 * size)
    work = dist.all_gather_into_tensor(into, torch.full((2,), float(rank)), ours, True)
    work.wait()
    gathered = torch.cat(work.get_future().wait())
    found["future"] = torch.equal(gathered, into) and into.tolist()[::2] == [*range(size)]
    empty = torch.zeros(0)
    dist.broadcast(empty, 0, group=ours)
    dist.all_to_all_single(torch.zeros(0), torch.zeros(0), group=ours)
    try:
        dist.all_gather([torch.zeros(2) for _ in range(size)], torch.zeros(3), group=ours)
    except RuntimeError as error:
        found["refused"] = "invalid tensor size" in str(error)
    after = torch.tensor([float(rank)])
    dist.all_reduce(after, group=ours)
    found["after"] = after.item() == size * (size - 1) / 2
    return found


def test_works_futures_and_what_gloo_refuses(tmp_path: Path):
    for found in run_ranks(works, 3, str(tmp_path / "store")):
        assert all(found.values()) and len(found) == 5, found


def differ(rank: int, size: int, path: str, how: str) -> tuple[str, float]:
    ours, _ = join(rank, size, path, 20)
    dist.barrier(ours)
    began = time.monotonic()
    try:
        if how == "collective" and rank == 0:
            dist.broadcast(torch.zeros(4), 1, group=ours)
        elif how == "root":
            dist.reduce(torch.zeros(4), rank, group=ours)
        elif how == "elements":
            dist.all_gather_into_tensor(torch.zeros(4 + 2 * rank), torch.zeros(2 + rank), ours)
        elif how == "splits":
            splits = [[1, 2], [3, 4]][rank]
            dist.all_to_all_single(torch.zeros(5), torch.zeros(sum(splits)), [1, 4], splits, ours)
        else:
            dist.all_gather_into_tensor(torch.zeros(8), torch.zeros(4), ours)
    except RuntimeError as error:
        return str(error), time.monotonic() - began
    # In a reduce, only the root looks at the others' blocks.
    return "", 0.0


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ("collective", ["in broadcast #2 of 4 float32, root 1", "in all_gather #2 of 4 float32"]),
        ("root", ["reduce #2 of 4 float32 (add), root 0", "of 4 float32 (add), root 1"]),
        ("elements", ["all_gather #2 of 2 float32", "all_gather #2 of 3 float32"]),
        ("splits", ["expects 16 bytes from rank 1, which sends 12", "which sends 8"]),
    ],
)
def test_calls_that_do_not_match_are_named(tmp_path: Path, how: str, words: list[str]):
    ends = run_ranks(differ, 2, str(tmp_path / "store"), how)
    errors = " ".join(error for error, _ in ends)
    assert "the ranks' calls do not match" in errors
    assert all(word in errors for word in words), errors
    assert all(seconds < 10 for _, seconds in ends)


def left_alone(rank: int, size: int, path: str, end: str) -> tuple[str, float]:
    """Rank 1 does not come, or rank 0 aborts; return what rank 0 is told, and when."""
    ours, _ = join(rank, size, path, 2 if end == "late" else 30)
    dist.barrier(ours)
    if rank == 1:
        time.sleep(3 if end == "late" else 1)
        return "", 0.0
    if end == "abort":
        threading.Timer(0.3, ours.abort).start()
    began = time.monotonic()
    try:
        dist.all_gather_into_tensor(torch.zeros(4), torch.zeros(2), ours)
    except RuntimeError as error:
        return str(error), time.monotonic() - began
    return "", 0.0


@pytest.mark.parametrize(
    ("end", "words"),
    [("late", "rank 1 did not answer: timed out after 2 s"), ("abort", "has ended the group")],
)
def test_a_wait_for_a_rank_ends(tmp_path: Path, end: str, words: str):
    (error, seconds), _ = run_ranks(left_alone, 2, str(tmp_path / "store"), end)
    assert words in error and "all_gather #2" in error
    assert seconds < 10


def _record(rank: int, size: int, path: str, run_dir: Path) -> list[str]:
    files = RunDir(run_dir)
    with flight.recorded(files, rank, size):
        group, _ = join(rank, size, path)
        dist.all_gather([torch.zeros(2) for _ in range(size)], torch.ones(2), group=group)
        dist.all_to_all_single(torch.zeros(size), torch.ones(size), group=group)
        dist.broadcast(torch.ones(3), 0, group=group)
    dump = flight.read_dump(files.collectives(rank))
    assert dump is not None
    dist.destroy_process_group()
    return [entry["profiling_name"] for entry in dump["entries"]]


def test_torchs_analyser_knows_every_collective_by_name(tmp_path: Path):
    """Bug it catches: a collective under a name that the recorder leaves out of its dumps."""
    for found in run_ranks(_record, 2, str(tmp_path / "store"), tmp_path):
        assert found == ["gloo:all_gather", "gloo:all_to_all", "gloo:broadcast"]
