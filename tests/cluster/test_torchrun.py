"""Tests of launchers/torchrun.py on one host, and on several that are network namespaces."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from scaletrain.errors import UserError
from scaletrain.rehearsal import Cluster, machine
from tests.cluster.commands import (
    DIGITS,
    SHORT,
    clean,
    command,
    gone,
    step_of,
    summary,
    train,
    until,
)
from tests.conftest import require

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(150)]
SLOW = str(Path(__file__).with_name("slow_digits.yaml"))


def hosts(count: int) -> Cluster:
    try:
        machine.check()
    except UserError as missing:
        require("namespaces", False, str(missing))
    return Cluster(count, bandwidth=None)


def start(
    network: Cluster,
    host: int,
    run_dir: Path,
    config: str,
    workers: int,
    *arguments: str,
    nodes: str = "",
) -> subprocess.Popen:
    options = (
        "--set",
        f"launcher.nodes={nodes or len(network.names)}",
        "--set",
        "launcher.endpoint=h0:29400",
    )
    argv = command(
        "train",
        config,
        "--run-dir",
        str(run_dir),
        "--workers",
        str(workers),
        "--launcher",
        "torchrun",
    )
    # No interface is named: each host has to find out which one leads to the others.
    return subprocess.Popen(
        network.command(host, [*argv, *options, *arguments], {"GLOO_SOCKET_IFNAME": "", "PYTHONFAULTHANDLER": "1"}), env=clean(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def ended(network: Cluster, agents: list[subprocess.Popen], timeout: float) -> list[str]:
    """What each agent printed until its end; one that does not end fails the test with the stacks
    of torchrun and its workers.
    """
    try:
        return [agent.communicate(timeout=timeout)[0] for agent in agents]
    except subprocess.TimeoutExpired:
        for pid in {pid for host in range(len(network.names)) for pid in network.processes(host)}:
            if b"torch.distributed.run" in _cmdline(pid) or b"programs.worker" in _cmdline(pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGABRT)
        outputs = [agent.communicate()[0] or "" for agent in agents]
        pytest.fail(f"no end within {timeout} s\n" + "\n".join(outputs))


def test_one_host(alone: dict, tmp_path: Path):
    trained = train(tmp_path / "run", *SHORT, "--workers", "3", "--launcher", "torchrun")
    assert trained["launcher"] == "torchrun" and trained["workers"] == 3
    assert trained["final_loss"] == pytest.approx(alone["final_loss"], abs=1e-4)


@pytest.mark.parametrize("count", [2, 4])
def test_several_hosts(alone: dict, tmp_path: Path, count: int):
    """The same command on every host, two workers or one on each; all hosts share the run
    directory.
    """
    run_dir = tmp_path / "run"
    with hosts(count) as network:
        before = network.counters()
        agents = [start(network, host, run_dir, DIGITS, 4, *SHORT) for host in range(count)]
        outputs = ended(network, agents, 100)
        assert [agent.returncode for agent in agents] == [0] * count, "\n".join(outputs)
        moved = [
            now.sent_bytes - then.sent_bytes
            for now, then in zip(network.counters(), before, strict=True)
        ]
    assert summary(run_dir)["final_loss"] == pytest.approx(alone["final_loss"], abs=1e-4)
    assert min(moved) > 1_000_000, "the gradients did not cross the links"


def test_kill_9_of_a_worker_on_another_host(tmp_path: Path):
    run_dir = tmp_path / "run"
    with hosts(2) as network:
        agents = [start(network, host, run_dir, SLOW, 2) for host in range(2)]
        until(lambda: step_of(run_dir) >= 5, "five steps")
        victim = next(
            pid
            for pid in network.processes(1)
            if b"programs.worker" in _cmdline(pid) and b"--nnodes" not in _cmdline(pid)
        )
        os.kill(victim, signal.SIGKILL)
        outputs = ended(network, agents, 60)
        assert all(agent.returncode != 0 for agent in agents)
        # The host of the victim saw it end; to the other host, a peer was lost.
        assert outputs[1].count("scaletrain: rank ") == 1, outputs[1]
        killed = 1 if "rank 1 on h1" in outputs[1] else 0
        assert f"scaletrain: rank {killed} on h1" in outputs[1], outputs[1]
    assert gone(run_dir)


def test_an_elastic_job_goes_on_without_a_lost_host(tmp_path: Path):
    """``--nnodes 1:2``: a host loses power; the other starts its worker again, which goes on alone
    from the checkpoint.
    """
    run_dir, whole = (
        tmp_path / "run",
        train(tmp_path / "whole", "--set", "data=digits", config=SLOW),
    )
    options = (
        "--set",
        "checkpoint.every_steps=10",
        "--set",
        "launcher.last_call_s=5",
        "--set",
        "timeout_s=8",
    )
    with hosts(2) as network:
        agents = [
            start(network, host, run_dir, SLOW, 2, *options, nodes="1:2") for host in range(2)
        ]
        until(lambda: step_of(run_dir) >= 15, "fifteen steps of both")
        assert step_of(run_dir, 1) >= 10
        network.kill(1)
        agents[1].communicate()
        output, _ = agents[0].communicate(timeout=90)
        assert agents[0].returncode == 0, output
    assert "workers: 2 (torchrun)" in output and "workers: 1 (torchrun)" in output, output
    assert "resumed at step 1" in output or "resumed at step 2" in output, output
    reached = summary(run_dir)
    assert reached["workers"] == 1 and reached["finished"]
    assert reached["final_loss"] == pytest.approx(whole["final_loss"], abs=1e-4)
    assert gone(run_dir)


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
