"""Tests engine/backend.py: the backend ``mpi4py`` under real MPIs.

Allreduces run on MPI, DDP works, and the rest is forwarded.
"""

from pathlib import Path

import pytest

from tests.engine.mpi import KINDS, run_mpi

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.mark.parametrize("kind", KINDS)
def test_a_script_over_mpi4py(kind: str, tmp_path: Path):
    output = run_mpi(kind, 3, "tests.engine.mpi4py_job", str(tmp_path / "store"))
    assert all(f"rank {rank} right" in output for rank in range(3)), output
