"""Tests engine/accelerator.py on the CPU, where streams do nothing. ``tests/gpu`` has the rest.

The parts of a message, its way through another memory and back, and what is left to NCCL.
"""

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scaletrain.engine import accelerator, group_calls
from scaletrain.engine.accelerator import AcceleratorLane
from scaletrain.engine.choice import Options
from scaletrain.engine.operations import OPERATIONS
from scaletrain.engine.roll_call import RollCall
from scaletrain.engine.transport import Group
from scaletrain.errors import UserError
from tests.engine.conformance import close, contribution, reference
from tests.ranks import run_ranks

COUNTS = (
    1,
    1000,
    7001,
    3,
)  # in parts of 4 KiB: one, one, seven; larger ones first and then smaller


def _staged(rank: int, size: int, path: str) -> list[bytes]:
    accelerator._PART_BYTES = 4096
    store, timeout = dist.FileStore(path, size), timedelta(seconds=30)
    group = Group(dist.PrefixStore("wire/", store), rank, size, timeout)
    lane = AcceleratorLane(
        group,
        RollCall(store, rank, size, timeout),
        "auto",
        "auto",
        torch.device("cpu"),
    )
    total, found = OPERATIONS[int(dist.ReduceOp.SUM)], []
    for at_once in (True, False):
        tensors = [contribution(rank, count) for count in COUNTS]
        works = [lane.allreduce([tensor], total, at_once) for tensor in tensors]
        for work, tensor, count in zip(works, tensors, COUNTS, strict=True):
            assert work.get_future().wait()[0] is tensor and work.wait()
            assert close(tensor, reference(size, count, torch.float32, "add")), f"{count} elements"
            found.append(tensor.numpy().tobytes())
    average, half = OPERATIONS[int(dist.ReduceOp.AVG)], contribution(rank, 5000, torch.bfloat16)
    lane.allreduce([half], average, False).wait()
    mean = reference(size, 5000, torch.bfloat16, "add") / size
    torch.testing.assert_close(half.double(), mean, rtol=1e-2, atol=1e-2)
    turned = torch.full((60, 50), float(rank)).t()  # not contiguous
    lane.allreduce([turned], OPERATIONS[int(dist.ReduceOp.MAX)], True).wait()
    assert (turned == size - 1).all()
    lane.close()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_messages_pass_through_the_hosts_memory_in_parts(size: int, tmp_path: Path):
    found = run_ranks(_staged, size, str(tmp_path / "store"))
    assert all(results == found[0] for results in found)


def _late(rank: int, size: int, path: str) -> str:
    store, timeout = dist.FileStore(path, size), timedelta(seconds=1)
    group = Group(dist.PrefixStore("wire/", store), rank, size, timeout)
    lane = AcceleratorLane(
        group,
        RollCall(store, rank, size, timeout),
        "auto",
        "gloo",
        torch.device("cpu"),
    )
    total, message = OPERATIONS[int(dist.ReduceOp.SUM)], ""
    lane.allreduce([torch.ones(3)], total, False).wait()
    if rank == 0:
        try:
            lane.allreduce([torch.ones(3)], total, False).wait()
        except RuntimeError as error:
            message = str(error)
        store.set("seen", "1")
    else:
        store.wait(["seen"], timedelta(seconds=20))
    lane.close()
    return message


@pytest.mark.slow
def test_a_late_rank_is_named(tmp_path: Path):
    assert "rank 1" in run_ranks(_late, 2, str(tmp_path / "store"))[0]


@pytest.mark.parametrize(
    ("options", "shared", "lane"),
    [
        (Options(), False, None),  # NCCL's own allreduce
        (Options("native", "nccl"), False, None),
        (Options("ring"), False, ("ring", "nccl", False)),
        (Options(), True, ("auto", "auto", True)),
        (Options("tree"), True, ("tree", "auto", True)),
        (Options("auto", "gloo"), False, ("auto", "gloo", True)),
    ],
)
def test_which_wire_carries_tensors_of_a_device(options, shared, lane, monkeypatch):
    made = _group_of_one(options, shared, monkeypatch)._accelerator_lane()
    assert (made and (made._collective, made._transport, made._staged)) == lane


def test_nccl_is_refused_where_ranks_share_a_device(monkeypatch):
    with pytest.raises(UserError, match="several ranks share a GPU"):
        _group_of_one(Options("ring", "nccl"), True, monkeypatch)._accelerator_lane()


def _group_of_one(
    options: Options, shared: bool, monkeypatch: pytest.MonkeyPatch
) -> group_calls.GroupCalls:
    monkeypatch.setattr(group_calls, "shared", lambda group: shared)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(group_calls, "AcceleratorLane", _on_cpu)
    made = group_calls.GroupCalls(dist.HashStore(), 0, 1, timedelta(seconds=5), options)
    made.nccl = made.nccl or object()
    return made


def _on_cpu(group, roll_call, collective, transport, device) -> AcceleratorLane:
    assert device == torch.device("cuda", 0)
    return AcceleratorLane(group, roll_call, collective, transport, torch.device("cpu"))
