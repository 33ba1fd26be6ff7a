"""Tests of training/exchange/horovod.py and launchers/horovodrun.py.

Horovod: its exchange against a single process, its three traps, and horovodrun.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from scaletrain.scaling.show import trace
from scaletrain.training.batches import GlobalBatches
from tests.cluster.commands import SHORT, clean, gone, scaletrain, train
from tests.conftest import require
from tests.training import jobs

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
    run_dir = tmp_path / "run"
    script = (TRAPS, str(run_dir))
    done = scaletrain("launch", "-n", "2", "--run-dir", str(run_dir), "--", *script, python=python)
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


def test_clipping_and_skipping_see_the_mean_gradient(python: str, tmp_path: Path):
    """Gradients are still under way when backward ends; one rank's sample overflows."""
    bad = GlobalBatches(64, 8, 0).indices(4)[5].item()
    job = {
        "model": "tests.training.jobs:exponential",
        "data": {"name": "tests.training.jobs:vectors", "bad": bad},
        "batch_size": 8,
        "steps": 8,
        "optimizer": {"name": "sgd", "lr": 0.05, "momentum": 0.9},
        "callbacks": [{"name": "clip", "norm": 0.2}],
        "nonfinite": "skip",
    }
    file, run_dir = tmp_path / "job.json", tmp_path / "run"
    file.write_text(json.dumps(job))  # JSON is YAML
    arguments = ("--workers", "2", "--exchange", "horovod")
    found = train(run_dir, *arguments, config=str(file), python=python)
    assert found["skipped_steps"] == 1

    def clip(model: nn.Module) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), 0.2)

    expected = jobs.train_alone(job, before_update=clip, left_out=[4])
    saved = load_file(run_dir / "step-8.safetensors")
    for name, weights in expected.items():
        torch.testing.assert_close(saved[f"model.{name}"], weights, rtol=1e-4, atol=1e-6)


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
        "import time\nimport torch.distributed as dist\ndist.init_process_group('gloo')\n"
        "print('I am', dist.get_rank(), flush=True)\ndist.barrier()\n"
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
    for rank in range(3):
        assert f"I am {rank}\n" in (run_dir / "logs" / f"rank-{rank}.log").read_text()
    assert gone(run_dir)
