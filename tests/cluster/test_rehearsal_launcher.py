"""Tests of launchers/rehearsal.py and programs/rehearsal_*.py: jobs on emulated hosts."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaletrain import plugins
from scaletrain.errors import UserError
from scaletrain.launching.job import Companion, Job, Program
from scaletrain.launching.launchers import rehearsal

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits.yaml"
EMULATED = """
model: {name: mlp, sizes: [1, 256, 10]}
data: {name: synthetic, shape: [1], classes: 10, samples: 256, test_samples: 16}
batch_size: 16
steps: 30
compute: {step_s: 0.03}
threads: 1
workers: 4
launcher: {name: rehearsal}
timeout_s: 5
"""


def job(run_dir: Path, workers: int = 4, **more) -> Job:
    return Job((), workers, run_dir, Program.TRAINING, **more)


def test_plan_is_pure_and_places_workers_and_servers_on_hosts(tmp_path):
    companions = (Companion("server 0", ("serve", "0"), restarts=2),)
    plan = rehearsal.plan(
        job(tmp_path, companions=companions),
        hosts=2,
        straggler={1: 2.0},
        faults=[{"at_step": 3, "cut": 2}],
    )
    assert plan == rehearsal.plan(
        job(tmp_path, companions=companions),
        hosts=2,
        straggler={1: 2.0},
        faults=[{"at_step": 3, "cut": 2}],
    )
    enter = [command.argv[: command.argv.index("-m", 4)] for command in plan.commands]
    assert [argv[5] for argv in enter] == ["0", "0", "1", "1"]
    keys = ("RANK", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR")
    places = [tuple(dict(command.env)[key] for key in keys) for command in plan.commands]
    on_h0 = "10.77.0.1"
    assert places == [
        ("0", "0", "0", on_h0),
        ("1", "1", "0", on_h0),
        ("2", "0", "1", on_h0),
        ("3", "1", "1", on_h0),
    ]
    assert [companion.name for companion in plan.companions] == ["rehearsal", "server 0"]
    assert plan.companions[1].argv[-3:] == ("2", "serve", "0") and plan.companions[1].restarts == 2
    settings = json.loads(dict(plan.files)[tmp_path / "rehearsal" / "settings.json"])
    assert settings["cluster"]["hosts"] == 3 and settings["faults"][0]["action"] == "cut"
    assert all(line.startswith("EMULATED") for line in plan.explain)
    outlives = rehearsal.plan(job(tmp_path, companions=companions, min_workers=2), hosts=2)
    assert (
        dict(outlives.commands[0].env)["MASTER_ADDR"] == "10.77.0.3"
    )  # the server's host, as h0 may be lost
    assert [companion.name for companion in outlives.companions] == [
        "rehearsal",
        "store",
        "server 0",
    ]
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hosts": 3}, "4 workers do not spread evenly over 3 hosts"),
        ({"bandwidth": "1 Gigabyte"}, "bandwidth: '1 Gigabyte' is not a rate"),
        ({"straggler": {4: 2.0}}, "straggler"),
        ({"faults": [{"at_step": 1, "cuts": 2}]}, "did you mean 'cut'"),
        ({"faults": [{"at_step": 1}]}, "exactly one of cut, heal, kill, slow"),
        ({"faults": [{"at_step": 1, "cut": 4}]}, "4 is not a host"),
        ({"faults": [{"at_step": -1, "cut": 1}]}, "at_step: -1"),
        ({"faults": [{"at_step": 1, "slow": 1}]}, "slow needs one of factor"),
        ({"faults": [{"at_step": 1, "kill": 1, "factor": 2}]}, "belong to slow"),
        ({"faults": ["cut"]}, "'cut' is not allowed"),
        (
            {"faults": [{"after_s": 1, "heal": 1}]},
            "after_s: 1 must be seconds after the fault before it",
        ),
    ],
)
def test_mistakes_are_named(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        rehearsal.plan(job(tmp_path), **options)


def test_options_are_read_from_the_signature():
    schema = plugins.options("launcher", "rehearsal")
    assert schema is not None
    options = schema.model_validate(
        {"straggler": {3: 2.0}, "faults": [{"at_step": 20, "cut": 3}], "bandwidth": None}
    )
    assert options.model_dump()["straggler"] == {3: 2.0} and options.model_dump()["hosts"] is None


def train(config: Path, run_dir: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "-m",
        "scaletrain.cli",
        "train",
        str(config),
        "--run-dir",
        str(run_dir),
        *arguments,
    ]
    # 16 workers that import torch on two busy cores start for more than a minute.
    return subprocess.run(command, capture_output=True, text=True, timeout=220)


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def emulated(tmp_path) -> Path:
    path = tmp_path / "emulated.yaml"
    path.write_text(EMULATED, encoding="utf-8")
    return path


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_same_training_as_on_one_host_and_every_gradient_crosses_the_links(
    tmp_path, namespaces, alone
):
    common = ("--workers", "4", "--set", "epochs=1", "--exchange", "ring")
    done = train(EXAMPLE, tmp_path / "rehearsal", *common, "--launcher", "rehearsal")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = read(tmp_path / "rehearsal" / "summary.json")
    assert summary["final_loss"] == pytest.approx(alone["final_loss"], abs=1e-4)
    assert not alone["emulated"] and summary["emulated"]
    assert summary["emulation"]["network"]["bandwidth"] == "1Gbit"
    # A ring sends 2 (p - 1) / p of the gradients, each step, from each host. Shared memory would
    # leave the links empty.
    parameters = sum(
        width
        for width in (
            32 * 9 + 32,
            64 * 32 * 9 + 64,
            128 * 64 * 9 + 128,
            512 * 256 + 256,
            256 * 10 + 10,
        )
    )
    least = 14 * 2 * 3 / 4 * 4 * parameters
    emulation = read(tmp_path / "rehearsal" / "emulation.json")
    for host in ("h0", "h1", "h2", "h3"):
        assert least < emulation["traffic"][host]["sent_bytes"] < 2 * least
    assert not (tmp_path / "rehearsal" / "rehearsal" / "cluster.json").exists()


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize(("host", "named"), [(3, "rank 3 on h3"), (0, "rank 0 on h0")])
def test_a_host_that_is_cut_off_in_mid_step_ends_the_job_in_time_and_is_named(
    tmp_path, namespaces, emulated, host, named
):
    done = train(
        emulated, tmp_path / "run", "--set", f"launcher.faults=[{{at_step: 10, cut: {host}}}]"
    )
    ended = time.time()
    assert done.returncode == 1, done.stdout + done.stderr
    assert named in done.stderr and "network" in done.stderr
    failure = read(tmp_path / "run" / "failure.json")
    assert (failure["rank"], failure["host"], failure["kind"], failure["step"]) == (
        host,
        f"h{host}",
        "cut",
        10,
    )
    (fault,) = read(tmp_path / "run" / "emulation.json")["faults"]
    assert ended - fault["time"] < 5 + 15  # the stated time-out, and room for a busy machine
    assert no_leftovers(tmp_path / "run")


@pytest.mark.cluster
@pytest.mark.slow
def test_a_cable_that_is_put_back_in_time_costs_only_time(tmp_path, namespaces, emulated):
    faults = "[{at_step: 10, cut: 3}, {after_s: 1, heal: 3}]"
    done = train(
        emulated, tmp_path / "run", "--set", f"launcher.faults={faults}", "--set", "timeout_s=20"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cut, heal = read(tmp_path / "run" / "emulation.json")["faults"]
    assert (cut["action"], heal["action"]) == ("cut", "heal") and 1 <= heal["time"] - cut[
        "time"
    ] < 5
    steps = [
        json.loads(line)["step_s"]
        for line in (tmp_path / "run" / "rank-0.jsonl").read_text().splitlines()
    ]
    assert len(steps) == 30 and max(steps[9:13]) > 0.9 > sorted(steps)[15]


@pytest.mark.cluster
@pytest.mark.slow
def test_a_host_that_loses_power_is_named(tmp_path, namespaces, emulated):
    done = train(emulated, tmp_path / "run", "--set", "launcher.faults=[{at_step: 10, kill: 2}]")
    assert done.returncode == 128 + signal.SIGKILL, done.stdout + done.stderr
    failure = read(tmp_path / "run" / "failure.json")
    assert (failure["rank"], failure["host"], failure["kind"]) == (2, "h2", "signal")
    assert "rank 2 on h2 was ended by SIGKILL" in done.stderr, done.stderr


@pytest.mark.cluster
@pytest.mark.slow
def test_a_lost_host_of_rank_0_does_not_end_a_job_that_may_go_on_without_it(
    tmp_path, namespaces, emulated
):
    """Asynchronous workers of a parameter server: the store lies on the server's host, so h0 may
    lose power.
    """
    options = [
        "--exchange",
        "parameter_server:async",
        "--set",
        "exchange.min_workers=2",
        "--set",
        "steps=40",
    ]
    done = train(
        emulated, tmp_path / "run", *options, "--set", "launcher.faults=[{at_step: 10, kill: 0}]"
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert (
        "rank 0 on h0 was ended by SIGKILL" in output
        and "the job goes on with 3 of 4 workers" in output
    ), output
    assert read(tmp_path / "run" / "progress-1.json")["step"] == 40
    assert no_leftovers(tmp_path / "run")


@pytest.mark.cluster
@pytest.mark.slow
def test_a_lossy_network_costs_time_and_no_gradient(tmp_path, namespaces, iptables, emulated):
    losses, summaries = ("0.0", "0.02"), []
    for loss in losses:
        options = (
            "--set",
            f"launcher.loss={loss}",
            "--set",
            "steps=15",
            "--set",
            "timeout_s=30",
            "--workers",
            "2",
        )
        done = train(emulated, tmp_path / loss, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        summaries.append(read(tmp_path / loss / "summary.json"))
    dropped = [
        sum(
            link["dropped_packets"]
            for link in read(tmp_path / loss / "emulation.json")["traffic"].values()
        )
        for loss in losses
    ]
    assert dropped[0] == 0 < dropped[1]
    assert summaries[1]["emulation"]["network"]["loss"] == 0.02
    assert summaries[1]["final_loss"] == pytest.approx(summaries[0]["final_loss"], abs=1e-4)


@pytest.mark.cluster
@pytest.mark.slow
def test_stragglers_and_slow_faults_slow_the_job_by_their_factor(tmp_path, namespaces, emulated):
    options = [
        "--set",
        "launcher.straggler={1: 2.0}",
        "--set",
        "launcher.faults=[{at_step: 12, slow: 2, factor: 4.0}]",
    ]
    done = train(
        emulated, tmp_path / "run", "--set", "compute.step_s=0.1", "--set", "steps=24", *options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    records = [
        json.loads(line) for line in (tmp_path / "run" / "rank-0.jsonl").read_text().splitlines()
    ]
    before = sorted(record["step_s"] for record in records[3:11])
    after = sorted(record["step_s"] for record in records[15:])
    assert before[len(before) // 2] == pytest.approx(0.2, rel=0.35)
    assert after[len(after) // 2] == pytest.approx(0.4, rel=0.35)


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_16_emulated_workers_are_more_than_8_times_as_fast_as_one(tmp_path, namespaces, emulated):
    options = (
        "--set",
        "compute.step_s=0.2",
        "--set",
        "steps=12",
        "--set",
        "batch_mode=weak",
        "--set",
        "timeout_s=60",
    )
    options += ("--set", "launcher.bandwidth=1Gbit", "--exchange", "ring")
    rates = {}
    for workers in (1, 16):
        done = train(emulated, tmp_path / str(workers), *options, "--workers", str(workers))
        assert done.returncode == 0, done.stdout + done.stderr
        summary = read(tmp_path / str(workers) / "summary.json")
        assert summary["emulated"] and summary["workers"] == workers
        rates[workers] = summary["samples_per_s"]
    assert 8 < rates[16] / rates[1] < 16.5


@pytest.mark.cluster
@pytest.mark.slow
def test_shared_memory_between_hosts_is_refused(tmp_path, namespaces, emulated):
    done = train(emulated, tmp_path / "run", "--workers", "2", "--exchange", "ring@shared_memory")
    assert done.returncode != 0 and "joins ranks of one host, these lie on 2" in done.stderr, (
        done.stderr
    )


@pytest.mark.cluster
@pytest.mark.slow
def test_slowness_that_nothing_would_notice_is_refused(tmp_path, namespaces):
    done = train(
        EXAMPLE,
        tmp_path / "run",
        "--workers",
        "2",
        "--set",
        "launcher={name: rehearsal, straggler: {1: 2.0}}",
    )
    assert done.returncode != 0 and "give compute" in done.stdout + done.stderr


@pytest.mark.cluster
@pytest.mark.slow
def test_kill_9_of_the_launcher_leaves_nothing(tmp_path, namespaces, emulated):
    run_dir = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "scaletrain.cli",
        "train",
        str(emulated),
        "--run-dir",
        str(run_dir),
        "--set",
        "steps=5000",
    ]
    launcher = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 80
    while not (run_dir / "rank-3.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert processes_of(run_dir)
    os.kill(launcher.pid, signal.SIGKILL)
    launcher.wait()
    assert no_leftovers(run_dir)


def processes_of(run_dir: Path) -> list[str]:
    processes = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(run_dir).encode() in (entry / "cmdline").read_bytes():
                processes.append(entry.name)
        except OSError:
            continue
    return processes


def no_leftovers(run_dir: Path) -> bool:
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        if not processes_of(run_dir):
            return True
        time.sleep(0.1)
    return False
