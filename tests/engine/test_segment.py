"""Tests engine/segment.py: how ranks share memory, and how they wait in it."""

import errno
import os
import re
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from scaletrain.engine.segment import Segment
from scaletrain.engine.transport import Group
from scaletrain.errors import UserError
from tests.ranks import run_ranks


def _a_core_each(rank: int, size: int, path: str, bound: list[int]) -> bool:
    os.sched_setaffinity(0, {bound[rank]})
    segment = Segment(Group(dist.FileStore(path, size), rank, size, timedelta(seconds=20)), 1, 64)
    found = segment.a_core_each
    segment.close()
    return found


def test_bound_to_a_core_each_they_wait_awake(tmp_path: Path):
    """A rank that is bound sees one core only: what counts is the cores of all ranks."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs 2 cores")
    assert all(run_ranks(_a_core_each, 2, str(tmp_path / "apart"), cores[:2]))
    assert run_ranks(_a_core_each, 2, str(tmp_path / "same"), [cores[0]] * 2) == [False, False]


def _no_room(rank: int, size: int, path: str) -> str:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    os.posix_fallocate = full  # this process is the rank's own
    try:
        Segment(
            Group(dist.FileStore(path, size), rank, size, timedelta(seconds=20)), 1, 123_456_789
        )
    except UserError as error:
        return str(error)
    return ""


def test_no_room_is_said_by_every_rank_with_the_size(tmp_path: Path):
    for message in run_ranks(_no_room, 2, str(tmp_path / "store")):
        found = re.fullmatch(
            r"transport 'shared_memory': no room for ([\d,]+) bytes of shared memory; use gloo, .*",
            message,
        )
        assert found and 0 <= int(found[1].replace(",", "")) - 123_456_789 < 10_000, message


def _join_alone(rank: int, size: int, path: str) -> str:
    store = dist.FileStore(path, 3)
    try:
        Segment(Group(store, rank, 3, timedelta(seconds=1)), 1, 64)
    except TimeoutError as error:
        return str(error)
    return ""


def test_who_did_not_join_is_named(tmp_path: Path):
    """Two of three ranks come."""
    for message in run_ranks(_join_alone, 2, str(tmp_path / "store")):
        assert message == "rank 2 did not join the group: timed out after 1 s"


def test_who_ends_after_its_last_value_is_not_missed(monkeypatch: pytest.MonkeyPatch):
    """It may write and end between two looks of who waits for it."""
    segment = Segment(Group(dist.HashStore(), 0, 1, timedelta(seconds=20)), 1, 64)

    def check_alive(rank: int) -> None:
        segment.write(0, value)
        raise ConnectionError(f"peer rank {rank} is lost")

    monkeypatch.setattr(segment, "check_alive", check_alive)
    value = 1
    segment.wait(0, 0, 1)
    value = 2
    with pytest.raises(ConnectionError):
        segment.wait(0, 0, 3)
    segment.close()
