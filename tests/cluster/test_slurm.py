"""Real SLURM daemons on this machine: submit, follow, fail, cancel, preempt and go on."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.commands import DIGITS, ROOT, SHORT, command, gone, scaletrain, step_of, summary, train, until
from tests.cluster.slurm import Slurm, missing
from tests.conftest import require

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(150)]
SLOW = str(Path(__file__).with_name("slow_digits.yaml"))  # 40 steps of 0.1 s: time to interrupt


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory):
    lacking = missing()
    require("slurm", not lacking, f"{', '.join(lacking)} (Debian: apt-get install slurm-wlm munge; run as root)")
    with Slurm(tmp_path_factory.mktemp("slurm") / "daemons") as slurm:
        yield slurm


@pytest.fixture(scope="module")
def alone_slow(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return train(tmp_path_factory.mktemp("alone") / "run", "--workers", "2", config=SLOW)


def test_one_task_a_worker(slurm: Slurm, alone: dict, tmp_path: Path):
    found = train(tmp_path / "run", *SHORT, "--workers", "3", "--launcher", "slurm", env=slurm.env)
    assert found["workers"] == 3 and found["launcher"] == "slurm"
    assert found["final_loss"] == pytest.approx(alone["final_loss"], abs=1e-4)


def test_one_torchrun_a_node(slurm: Slurm, alone: dict, tmp_path: Path):
    options = ("--set", "launcher.tasks=nodes", "--set", "launcher.nodes=2")
    found = train(tmp_path / "run", *SHORT, "--workers", "2", "--launcher", "slurm", *options, env=slurm.env)
    assert found["workers"] == 2 and found["launcher"] == "torchrun"
    assert found["final_loss"] == pytest.approx(alone["final_loss"], abs=1e-4)


def test_inside_an_allocation(slurm: Slurm, alone: dict, tmp_path: Path):
    inside = command(
        "train", DIGITS, *SHORT, "--run-dir", str(tmp_path / "run"), "--workers", "2", "--launcher", "slurm"
    )
    done = subprocess.run(
        ["salloc", "-n", "2", *inside], env=slurm.env, cwd=ROOT, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list((tmp_path / "run").glob("slurm-*.out")), "a batch job was submitted"
    assert summary(tmp_path / "run")["final_loss"] == pytest.approx(alone["final_loss"], abs=1e-4)


def test_srun_by_hand(slurm: Slurm, alone: dict, tmp_path: Path):
    """The run directory is made here; ``srun -n 2 scaletrain worker RUN_DIR`` does the rest."""
    from scaletrain import config

    (tmp_path / "config.yaml").write_text(config.load(Path(DIGITS), {"epochs": 1, "workers": 2}).to_yaml())
    slurm.run("srun", "-n", "2", *command("worker", str(tmp_path)), timeout=90)
    assert summary(tmp_path)["final_loss"] == pytest.approx(alone["final_loss"], abs=1e-4)
    assert summary(tmp_path)["workers"] == 2


@pytest.mark.parametrize("end", ["raise ValueError('the cause')", "os.kill(os.getpid(), 9)"])
def test_a_failing_rank_ends_the_job_and_is_named(slurm: Slurm, tmp_path: Path, end: str):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\nimport torch.distributed as dist\ndist.init_process_group('gloo')\n"
        f"if dist.get_rank() == 1:\n    {end}\ndist.barrier()\ntime.sleep(60)\n"
    )
    run_dir = tmp_path / "run"
    done = scaletrain(
        "launch", "-n", "3", "--launcher", "slurm", "--run-dir", str(run_dir), "--", str(script), env=slurm.env
    )
    output = done.stdout + done.stderr
    assert done.returncode == (137 if "kill" in end else 1), output
    assert output.count("scaletrain: rank 1 on") == 1 and "scaletrain: rank 0" not in output, output
    assert ("SIGKILL" if "kill" in end else "ValueError: the cause") in output
    assert "FAILED" in output and gone(run_dir)


def started(slurm: Slurm, run_dir: Path, *arguments: str) -> tuple[subprocess.Popen, str]:
    """A long job whose rank 0 has done ten steps, and its number."""
    launcher = subprocess.Popen(
        command("train", SLOW, "--run-dir", str(run_dir), "--workers", "2", "--launcher", "slurm", *arguments),
        env=slurm.env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until(lambda: step_of(run_dir) >= 10 or launcher.poll() is not None, "ten steps")
    assert launcher.poll() is None, launcher.communicate()[0]
    return launcher, next(run_dir.glob("slurm-*.out")).stem.removeprefix("slurm-")


def test_an_interrupt_cancels_the_job(slurm: Slurm, tmp_path: Path):
    launcher, job = started(slurm, tmp_path / "run")
    launcher.send_signal(signal.SIGINT)
    output, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 130, output
    assert slurm.state(job)["JobState"] == "CANCELLED"
    until(lambda: gone(tmp_path / "run"), "the tasks are gone", 10)


def test_kill_9_of_the_launcher_leaves_no_job(slurm: Slurm, tmp_path: Path):
    launcher, job = started(slurm, tmp_path / "run")
    launcher.kill()
    launcher.communicate(timeout=10)
    until(lambda: slurm.state(job)["JobState"] == "CANCELLED", "the job is cancelled", 15)
    until(lambda: gone(tmp_path / "run"), "the tasks are gone", 15)


def goes_on(slurm: Slurm, launcher: subprocess.Popen, job: str, run_dir: Path, alone_slow: dict) -> None:
    """The requeued job ends well, went on from its checkpoint, and trained as if nothing had been."""
    until(lambda: slurm.state(job).get("Restarts") == "1", "the job is requeued")
    output, _ = launcher.communicate(timeout=100)
    assert launcher.returncode == 0, output
    assert "resumed at step" in output and "requeued" in output, output
    assert int(output.split("resumed at step ")[1].split()[0]) >= 10
    assert summary(run_dir)["final_loss"] == pytest.approx(alone_slow["final_loss"], abs=1e-4)


def test_preempted_and_requeued_from_the_checkpoint(slurm: Slurm, alone_slow: dict, tmp_path: Path):
    launcher, job = started(slurm, tmp_path / "run", "--set", "launcher.partition=low")
    other = slurm.run(
        "sbatch", "--parsable", "-p", "high", "-N", "4", "-n", "4", "-o", "/dev/null", "--wrap", "sleep 2"
    )
    until(lambda: slurm.state(other.strip())["JobState"] in ("RUNNING", "COMPLETED"), "the other job has the nodes")
    goes_on(slurm, launcher, job, tmp_path / "run", alone_slow)


def test_out_of_time_and_requeued_from_the_checkpoint(slurm: Slurm, alone_slow: dict, tmp_path: Path):
    """SLURM sends SIGUSR1 ``warn_s`` before the time is up; here a person sends it: time limits are whole minutes."""
    launcher, job = started(slurm, tmp_path / "run")
    slurm.run("scancel", "--signal=USR1", job)
    goes_on(slurm, launcher, job, tmp_path / "run", alone_slow)


def test_a_mistake_is_one_line(slurm: Slurm, tmp_path: Path):
    options = ("--set", "launcher.partition=nowhere")
    done = scaletrain(
        "train", DIGITS, "--run-dir", str(tmp_path / "run"), "--launcher", "slurm", *options, env=slurm.env
    )
    assert done.returncode == 2
    assert "invalid partition" in done.stdout + done.stderr and "Traceback" not in done.stdout + done.stderr


def test_the_controller_may_be_away_for_a_while(slurm: Slurm, alone_slow: dict, tmp_path: Path):
    """``kill -9`` of slurmctld in mid-job: the job trains on, the follower waits, and knows the end when it is back."""
    launcher, _ = started(slurm, tmp_path / "run")
    slurm.kill("slurmctld")
    until(lambda: step_of(tmp_path / "run") >= 30, "the job trains on")
    slurm.start_controller()
    output, _ = launcher.communicate(timeout=100)
    assert launcher.returncode == 0, output
    assert summary(tmp_path / "run")["final_loss"] == pytest.approx(alone_slow["final_loss"], abs=1e-4)


def test_kill_9_of_a_node_daemon_is_no_hang(slurm: Slurm, alone_slow: dict, tmp_path: Path):
    """The node is down for SLURM after its time-out; the job is requeued to others and goes on, or has ended by then."""
    launcher, job = started(slurm, tmp_path / "run")
    node = slurm.state(job)["BatchHost"]
    slurm.kill(node)
    try:
        output, _ = launcher.communicate(timeout=100)
        assert launcher.returncode == 0, output
        assert summary(tmp_path / "run")["final_loss"] == pytest.approx(alone_slow["final_loss"], abs=1e-4)
    finally:
        slurm.start_node(int(node.removeprefix("n")))


@pytest.mark.parametrize("mpi", ["none", "pmi2", "pmix"])
def test_each_kind_of_srun_says_who_a_task_is(slurm: Slurm, mpi: str):
    if mpi not in slurm.run("srun", "--mpi=list"):
        pytest.skip(f"this SLURM has no --mpi={mpi}")
    code = "from scaletrain.world import World; w = World.from_env(); print(w.rank, w.size, w.local_rank, w.local_size, w.launcher)"
    # On one node: two PMIx servers of one step cannot live on the same real host.
    output = slurm.run("srun", f"--mpi={mpi}", "-N", "1", "-n", "2", "--overcommit", sys.executable, "-c", code)
    places = sorted(line.split()[:4] for line in output.splitlines() if line.count(" ") == 4)
    assert places == [["0", "2", "0", "2"], ["1", "2", "1", "2"]], output
