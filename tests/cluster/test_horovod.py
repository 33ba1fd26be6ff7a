"""Tests of training/exchange/horovod.py and launchers/horovodrun.py.

Horovod: its exchange against a single process, its three traps, and horovodrun.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from scaletrain.scaling.show import trace
from tests.cluster.commands import SHORT, clean, gone, scaletrain, train
from tests.conftest import require

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(120)]
TRAPS = str(Path(__file__).with_name("horovod_traps.py"))


@pytest.fixture(scope="module")
def python() -> str:
    """A Python whose Horovod works: tried, not looked up."""
    python = os.environ.get("SCALETRAIN_TEST_HOROVOD_PYTHON", sys.executable)
    tried = subprocess.run(
        [python, "-c", "import horovod.torch as hvd; hvd.init(); assert hvd.size() == 1"],
        env=clean(), capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    how = "make horovod (Debian: apt-get install g++ cmake openmpi-bin libopenmpi-dev)"
    require("horovod", tried.returncode == 0, how)
    return python


def path_of(python: str) -> dict[str, str]:
    """So that this Python's horovodrun is found."""
    return {"PATH": f"{Path(python).parent}:{os.environ['PATH']}"}


def test_the_three_traps(python: str, tmp_path: Path):
    """No hidden optimizer step, no dropped state, no hang after one operation more on one rank; odd
    gradients, accumulation.
    """
    done = scaletrain(
        "launch", "-n", "2", "--run-dir", str(tmp_path / "run"), "--", TRAPS, python=python
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    passed = [line.split()[-1] for line in output.splitlines() if "passed" in line]
    assert {"no_hidden_step", "no_dropped_state", "no_hang_after_an_extra_operation"} <= set(
        passed
    ) and len(passed) == 6, output


def test_the_exchange_under_our_own_launcher(python: str, alone: dict, tmp_path: Path):
    found = train(
        tmp_path / "run", *SHORT, "--workers", "3", "--exchange", "horovod", python=python
    )
    assert found["exchange"] == "horovod" and found["launcher"] == "local"
    assert found["final_loss"] == pytest.approx(alone["final_loss"], abs=1e-4)


def test_a_trace_has_every_gradient_and_the_wait_for_them(python: str, tmp_path: Path):
    run_dir = tmp_path / "run"
    train(
        run_dir,
        *SHORT,
        "--workers",
        "2",
        "--exchange",
        "horovod",
        "--set",
        "trace=true",
        python=python,
    )
    events = [
        event for event in trace.of_run(run_dir).to_json()["traceEvents"] if event["ph"] == "X"
    ]
    steps = sorted(
        (e for e in events if e["pid"] == 1 and e["name"].startswith("step ")),
        key=lambda e: e["ts"],
    )
    waits = sorted(
        (e for e in events if e["pid"] == 1 and e["name"] == "wait for gradients"),
        key=lambda e: e["ts"],
    )
    gradients = [e for e in events if e["pid"] == 1 and "bytes" in e["args"]]
    assert (
        len(steps) == len(waits) == 14
        and len(gradients) % 14 == 0
        and len({e["name"] for e in gradients}) > 1
    )
    for step, wait in zip(steps, waits, strict=True):
        assert (
            step["ts"] <= wait["ts"] and wait["ts"] + wait["dur"] <= step["ts"] + step["dur"] + 1000
        )


def test_horovodrun(python: str, alone: dict, tmp_path: Path):
    arguments = ("--workers", "3", "--exchange", "horovod", "--launcher", "horovodrun")
    found = train(tmp_path / "run", *SHORT, *arguments, python=python, env=path_of(python))
    assert found["launcher"] == "horovodrun" and found["workers"] == 3
    assert found["final_loss"] == pytest.approx(alone["final_loss"], abs=1e-4)


def test_mpi_carries_it_under_mpirun(python: str, alone: dict, tmp_path: Path):
    mpirun = shutil.which("mpirun", path="/usr/bin:/usr/local/bin")
    require(
        "mpi",
        mpirun is not None,
        "the MPI that Horovod was built with (Debian: apt-get install openmpi-bin)",
    )
    options = (
        "--set",
        "exchange.controller=mpi",
        "--launcher",
        "mpirun",
        "--set",
        f"launcher.command={mpirun}",
    )
    found = train(
        tmp_path / "run", *SHORT, "--workers", "2", "--exchange", "horovod", *options, python=python
    )
    assert found["final_loss"] == pytest.approx(alone["final_loss"], abs=1e-4)


def test_a_failing_rank_under_horovodrun_is_named(python: str, tmp_path: Path):
    script, run_dir = tmp_path / "script.py", tmp_path / "run"
    script.write_text(
        "import time\nimport torch.distributed as dist\ndist.init_process_group('gloo')\ndist.barrier()\n"
        "if dist.get_rank() == 1:\n    raise ValueError('the cause')\ndist.barrier()\ntime.sleep(60)\n"
    )
    options = ("--launcher", "horovodrun", "--run-dir", str(run_dir))
    done = scaletrain(
        "launch", "-n", "3", *options, "--", str(script), python=python, env=path_of(python)
    )
    output = done.stdout + done.stderr
    assert (
        done.returncode == 1
        and output.count("scaletrain: rank 1 on") == 1
        and "ValueError: the cause" in output
    ), output
    assert gone(run_dir)
