"""Tests engine/transport/mpi.py under three real MPIs.

Every algorithm, MPI's own allreduce, and a rank that does not come.
"""

import pickle
from pathlib import Path

import pytest

from tests.engine.mpi import KINDS, run_mpi

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def results(kind: str, size: int, part: str, tmp_path: Path) -> list:
    run_mpi(kind, size, "tests.engine.mpi_job", part, str(tmp_path / "store"), str(tmp_path))
    return [pickle.loads((tmp_path / str(rank)).read_bytes()) for rank in range(size)]


# Larger sizes under one MPI only: on few cores the others poll for minutes.
@pytest.mark.parametrize(
    ("kind", "size"),
    [*((kind, size) for kind in KINDS for size in (1, 2, 3)), ("openmpi5", 5), ("openmpi5", 8)],
)
def test_every_algorithm(kind: str, size: int, tmp_path: Path):
    found = results(kind, size, "conform", tmp_path)
    assert all(results == found[0] for results in found), "replicas differ"


@pytest.mark.parametrize("kind", KINDS)
def test_a_late_rank_is_named(kind: str, tmp_path: Path):
    messages = results(kind, 3, "late", tmp_path)
    assert all("rank 2" in message for message in messages[:2]), messages
