"""programs/worker.py under launching/supervision: a worker killed or stopped, Ctrl-C, and going on
from there.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from scaletrain.parameter_server.protocol.settings import SILENCE_S
from scaletrain.timeouts import Timeouts
from tests.cluster.commands import (
    DIGITS,
    ROOT,
    clean,
    command,
    gone,
    scaletrain,
    step_of,
    summary,
    train,
    until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]
SLOW = str(ROOT / "tests" / "cluster" / "slow_digits.yaml")


def started(run_dir: Path, *arguments: str) -> subprocess.Popen:
    """A job of three workers that has done three steps."""
    launcher = subprocess.Popen(
        command("train", SLOW, "--workers", "3", "--run-dir", str(run_dir), *arguments),
        env=clean(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until(lambda: step_of(run_dir, 2) >= 3 or launcher.poll() is not None, "three steps")
    assert launcher.poll() is None, launcher.communicate()[0]
    return launcher


def pid_of(run_dir: Path, rank: int) -> int:
    return json.loads((run_dir / f"progress-{rank}.json").read_text())["pid"]


@pytest.mark.parametrize(
    "options",
    [("--launcher", "local"), ("--launcher", "torchrun"), ("--exchange", "parameter_server")],
    ids=["local", "torchrun", "parameter_server"],
)
def test_kill_9_of_one_worker_of_three(options: tuple[str, ...], tmp_path: Path):
    run_dir = tmp_path / "run"
    process = started(run_dir, *options)
    began = time.monotonic()
    os.kill(pid_of(run_dir, 2), signal.SIGKILL)
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < 15
    assert process.returncode == 137, output
    named = [line for line in output.splitlines() if line.startswith("scaletrain: rank")]
    assert len(named) == 1 and "rank 2 on" in named[0] and "steps" in named[0], output
    assert gone(run_dir)


def test_a_worker_that_is_stopped_under_gloo_is_a_hang_although_gloo_waits_on(tmp_path: Path):
    run_dir = tmp_path / "run"
    process = started(run_dir, "--set", "timeout_s=3", "--exchange", "native")
    began = time.monotonic()
    os.kill(pid_of(run_dir, 1), signal.SIGSTOP)
    output, _ = process.communicate(timeout=30)
    assert time.monotonic() - began < Timeouts(3.0).collective_s + 5
    assert process.returncode == 124, output
    assert "rank 1 on" in output and "hangs" in output and "SIGSTOP" in output, output
    assert gone(run_dir)


def test_a_stopped_worker_is_a_hang(tmp_path: Path):
    run_dir = tmp_path / "run"
    process = started(run_dir, "--set", "timeout_s=5", "--exchange", "ring")
    began = time.monotonic()
    os.kill(pid_of(run_dir, 1), signal.SIGSTOP)
    output, _ = process.communicate(timeout=40)
    assert time.monotonic() - began < 20
    assert process.returncode == 124, output
    assert "rank 1 on" in output and "hangs" in output and "SIGSTOP" in output, output
    assert gone(run_dir)
    # torch's own analyser reads the ranks' collectives, and finds the same rank.
    told = output.split("the last collectives of each rank: ")[1].splitlines()[0]
    assert told == f"torchfrtrace {run_dir / 'flight'} -p rank_"
    module = "torch.distributed.flight_recorder.fr_trace"
    argv = [sys.executable, "-m", module, *told.split()[1:]]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    # A slow machine may stop it at its end, where it has entered all that the others have.
    assert "missing ranks: {1}" in said or (run_dir / "summary.json").exists(), said


@pytest.mark.parametrize("exchange", ["ring", "native", "ring@gloo"])
def test_a_job_that_is_stopped_as_a_whole_for_longer_than_all_its_limits_goes_on(
    exchange: str, tmp_path: Path
):
    """Bug it catches: ranks that waited for others blame the pause on them."""
    run_dir = tmp_path / "run"
    process = started(run_dir, "--set", "timeout_s=2", "--exchange", exchange)
    late = psutil.Process(pid_of(run_dir, 2))
    family = psutil.Process(process.pid).children(recursive=True)
    waiting = [each for each in family if each not in (late, *late.children(recursive=True))]
    late.suspend()
    time.sleep(0.5)  # the others have come to where they need it, and wait
    for each in waiting:
        each.suspend()
    time.sleep(Timeouts(2.0).collective_s + 2)
    for each in waiting:  # they look first
        each.resume()
    time.sleep(0.3)
    late.resume()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and summary(run_dir)["finished"], output


def test_servers_and_workers_that_are_stopped_together_go_on(tmp_path: Path):
    """Bug it catches: each takes the pause for the other's silence."""
    run_dir = tmp_path / "run"
    process = started(run_dir, "--set", "timeout_s=2", "--exchange", "parameter_server")
    family = psutil.Process(process.pid).children(recursive=True)
    for each in family:
        each.suspend()
    time.sleep(SILENCE_S + 2)
    for each in family:
        each.resume()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and summary(run_dir)["finished"], output


def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path: Path):
    run_dir = tmp_path / "run"
    process = started(run_dir)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=40)
    assert process.returncode == 130, output
    assert output.index("stopping in good order") < output.index("stopped by SIGINT")
    assert "Traceback" not in output and gone(run_dir)
    assert not summary(run_dir)["finished"]
    again = shlex.split(output.split("To go on: scaletrain ")[1].splitlines()[0])
    assert again[-3:] == ["--run-dir", str(run_dir), "--resume"]
    done = scaletrain(*again)
    assert done.returncode == 0 and "resumed at step" in done.stdout, done.stdout + done.stderr
    whole = train(tmp_path / "whole", "--workers", "3", "--set", "data=digits", config=SLOW)
    assert summary(run_dir)["final_loss"] == pytest.approx(whole["final_loss"], abs=1e-4)


def test_an_early_ctrl_c_says_that_nothing_was_done(tmp_path: Path):
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        command("train", SLOW, "--workers", "2", "--run-dir", str(run_dir)),
        env=clean(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout and process.stdout.readline().startswith("run directory")
    time.sleep(0.7)  # the workers import torch
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=40)
    assert process.returncode == 130, output
    assert (
        "stopped by SIGINT before the first step was done" in output and "Traceback" not in output
    ), output
    assert gone(run_dir)


def test_resuming_a_finished_run_changes_nothing_unless_there_is_more_to_do(tmp_path: Path):
    run_dir = tmp_path / "run"
    job = ("train", DIGITS, "--workers", "2", "--run-dir", str(run_dir), "--set")
    first = train(run_dir, "--workers", "2", "--set", "epochs=1")
    assert first["finished"] and first["steps"] == 14
    written = (run_dir / "summary.json").read_bytes()

    again = scaletrain(*job, "epochs=1", "--resume")
    assert again.returncode == 0 and "nothing to do: all 14 steps are done" in again.stdout, (
        again.stdout + again.stderr
    )
    assert (run_dir / "summary.json").read_bytes() == written

    by_hand = scaletrain("worker", str(run_dir))
    assert by_hand.returncode == 2 and "holds a run already" in by_hand.stderr, by_hand.stderr
    assert (run_dir / "summary.json").read_bytes() == written

    (run_dir / "summary.json").unlink()  # as if it had been killed after its last checkpoint
    closed = scaletrain(*job, "epochs=1", "--resume")
    assert closed.returncode == 0, closed.stdout + closed.stderr
    found = summary(run_dir)
    assert found["finished"] and found["final_loss"] == pytest.approx(first["final_loss"], rel=1e-6)
    assert (
        found["test_accuracy"] == first["test_accuracy"]
        and found["step_s_p50"] == first["step_s_p50"]
    )

    more = scaletrain(*job, "epochs=2", "--resume")
    assert "resumed at step 14" in more.stdout and summary(run_dir)["steps"] == 28, (
        more.stdout + more.stderr
    )


def test_a_warning_in_a_workers_last_moments_does_not_end_it(tmp_path: Path):
    """A batch system's SIGUSR1 may come when Python has given its own handlers back already."""
    program = (
        "import os, signal, sys, torch.distributed as dist\n"
        "from scaletrain.training.stopping import StopTogether\n"
        "class Last:\n"
        "    def __del__(self, kill=os.kill, pid=os.getpid(), number=signal.SIGUSR1): kill(pid, number)\n"
        "last = Last()\n"
        "stop = StopTogether(dist.HashStore(), 1)\n"
        "if sys.argv[1:]: stop.over()\n"
    )
    for arguments, status in (((), -signal.SIGUSR1), (("over",), 0)):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], env=clean(), cwd=ROOT, timeout=60
        )
        assert done.returncode == status


def test_another_rank_saves_once_rank_0_is_lost(tmp_path: Path):
    run_dir = tmp_path / "run"
    process = started(run_dir, "--exchange", "parameter_server:async")
    os.kill(pid_of(run_dir, 0), signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "the job goes on with 2 of 3" in output
    assert summary(run_dir)["finished"] and summary(run_dir)["steps"] == 40
    assert (run_dir / "step-40.safetensors").exists()


def test_a_server_that_is_killed_is_started_again(tmp_path: Path):
    """By the launcher, from its snapshot, and over encrypted links."""
    run_dir = tmp_path / "run"
    options = {"link": "tcp", "security": "curve", "snapshot_updates": 1, "restart_servers": 1}
    settings = [text for name in options for text in ("--set", f"exchange.{name}={options[name]}")]
    process = started(run_dir, "--exchange", "parameter_server", *settings)
    address = json.loads((run_dir / "server-0.address.json").read_text())
    os.kill(address["pid"], signal.SIGKILL)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "server 0" in output and "started again (1 of 1)" in output, output
    assert summary(run_dir)["finished"] and summary(run_dir)["steps"] == 40
    statistics = json.loads((run_dir / "server-0.json").read_text())
    assert statistics["restored_at_update"] >= 1 and statistics["lost"] == []
    assert gone(run_dir)


def test_a_job_with_servers_goes_on_without_a_worker_that_is_stopped(tmp_path: Path):
    run_dir = tmp_path / "run"
    process = started(run_dir, "--exchange", "parameter_server:async", "--set", "timeout_s=5")
    os.kill(pid_of(run_dir, 1), signal.SIGSTOP)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "rank 1" in output and "it is ended" in output, output
    assert "the job goes on with 2 of 3" in output, output
    assert summary(run_dir)["finished"] and summary(run_dir)["steps"] == 40
    assert (run_dir / "step-40.safetensors").exists()
