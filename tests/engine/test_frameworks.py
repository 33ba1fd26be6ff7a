"""Tests engine/process_group.py under DDP, FSDP, Accelerate and Lightning Fabric, unchanged.

The weights are those of one process on the same samples.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import require

PACKAGES = {
    "ddp": "torch",
    "fsdp": "torch",
    "accelerate": "accelerate",
    "fabric": "lightning_fabric",
}


@pytest.mark.slow
@pytest.mark.parametrize("framework", PACKAGES)
def test_the_weights_of_one_process(framework: str):
    package = PACKAGES[framework]
    require(
        framework,
        importlib.util.find_spec(package) is not None,
        f"pip install {package.replace('_', '-')}",
    )
    script = Path(__file__).with_name("frameworks_job.py")
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    _check(torchrun, str(script), framework, "scaletrain")


@pytest.mark.slow
@pytest.mark.parametrize("framework", ["accelerate", "fabric"])
def test_scripts_that_insist_on_gloo(framework: str, tmp_path: Path):
    package = PACKAGES[framework]
    require(
        framework,
        importlib.util.find_spec(package) is not None,
        f"pip install {package.replace('_', '-')}",
    )
    script = Path(__file__).with_name("frameworks_job.py")
    launch = ["scaletrain.cli", "launch", "-n", "2", "--as", "gloo"]
    _check([*launch, "--run-dir", str(tmp_path / "run")], str(script), framework, "gloo")


def _check(start: list[str], *script: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *start, *script],
        capture_output=True,
        text=True,
        timeout=100,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert all(f"rank {rank} right" in done.stdout for rank in range(2)), done.stdout
