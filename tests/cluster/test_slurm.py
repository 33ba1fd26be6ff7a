"""Tests of launchers/slurm.py and programs/follow_slurm.py under real SLURM daemons."""

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from scaletrain.launching.hosts import expand
from tests.cluster.commands import (
    DIGITS,
    ROOT,
    SHORT,
    command,
    gone,
    scaletrain,
    step_of,
    summary,
    train,
    until,
)
from tests.cluster.slurm import Slurm, missing
from tests.conftest import require
from tests.launching.test_hosts import LISTS

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(150)]
SLOW = str(Path(__file__).with_name("slow_digits.yaml"))  # 40 steps of 0.1 s: time to interrupt


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory):
    lacking = missing()
    require(
        "slurm",
        not lacking,
        f"{', '.join(lacking)} (Debian: apt-get install slurm-wlm munge; run as root)",
    )
    with Slurm(tmp_path_factory.mktemp("slurm") / "daemons") as slurm:
        yield slurm


@pytest.fixture(scope="module")
def alone_slow(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return train(
        tmp_path_factory.mktemp("alone") / "run",
        "--workers",
        "2",
        "--set",
        "data=digits",
        config=SLOW,
    )


def in_background(slurm: Slurm, run_dir: Path, *arguments: str) -> subprocess.Popen:
    """A long job of two workers on nodes of its own, that waits more than it computes: it runs
    while the other tests do.
    """
    options = ("--run-dir", str(run_dir), "--workers", "2", "--launcher", "slurm", *arguments)
    with open(run_dir.with_name("output"), "w") as output:
        argv = command("train", SLOW, *options)
        return subprocess.Popen(
            argv, env=slurm.env, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )


@pytest.fixture(scope="module", autouse=True)
def out_of_time(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory):
    """A job of half a minute with a time limit of a minute, of which it is warned: SLURM looks at
    the clock each 30 s only.
    """
    run_dir = tmp_path_factory.mktemp("out-of-time") / "run"
    options = (
        "launcher.time_limit_min=1",
        "launcher.warn_s=30",
        "launcher.partition=timed",
        "steps=300",
    )
    launcher = in_background(
        slurm, run_dir, *(word for option in options for word in ("--set", option))
    )
    yield launcher, run_dir
    launcher.terminate()
    launcher.wait(30)


@pytest.fixture(scope="module", autouse=True)
def without_its_daemon(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory):
    """A job whose first node's slurmd gets ``kill -9``: it is half a minute before SLURM takes the
    node for down.
    """
    run_dir = tmp_path_factory.mktemp("without-its-daemon") / "run"
    launcher = in_background(slurm, run_dir, "--set", "launcher.partition=killed")
    until(lambda: step_of(run_dir) >= 10 or launcher.poll() is not None, "ten steps")
    job = next(run_dir.glob("slurm-*.out")).stem.removeprefix("slurm-")
    slurm.kill(slurm.state(job)["BatchHost"])
    yield launcher, run_dir
    launcher.terminate()
    launcher.wait(30)


def test_one_task_a_worker(slurm: Slurm, alone: dict, tmp_path: Path):
    trained = train(
        tmp_path / "run", *SHORT, "--workers", "3", "--launcher", "slurm", env=slurm.env
    )
    assert trained["workers"] == 3 and trained["launcher"] == "slurm"
    assert trained["final_loss"] == pytest.approx(alone["final_loss"], abs=1e-4)


def test_one_torchrun_a_node(slurm: Slurm, alone: dict, tmp_path: Path):
    options = ("--set", "launcher.tasks=nodes", "--set", "launcher.nodes=2")
    trained = train(
        tmp_path / "run", *SHORT, "--workers", "2", "--launcher", "slurm", *options, env=slurm.env
    )
    assert trained["workers"] == 2 and trained["launcher"] == "torchrun"
    assert trained["final_loss"] == pytest.approx(alone["final_loss"], abs=1e-4)


def test_inside_an_allocation(slurm: Slurm, alone: dict, tmp_path: Path):
    inside = command(
        "train",
        DIGITS,
        *SHORT,
        "--run-dir",
        str(tmp_path / "run"),
        "--workers",
        "2",
        "--launcher",
        "slurm",
    )
    done = subprocess.run(
        ["salloc", "-n", "2", *inside],
        env=slurm.env,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list((tmp_path / "run").glob("slurm-*.out")), "a batch job was submitted"
    assert summary(tmp_path / "run")["final_loss"] == pytest.approx(alone["final_loss"], abs=1e-4)


def test_doctor_compares_the_hosts_of_an_allocation(slurm: Slurm, tmp_path: Path):
    """Bug it catches: hosts that are asked by ssh, or one alone, where srun reaches all of them."""
    doctor = command("doctor", "--json", "--run-dir", str(tmp_path))
    text = slurm.run("salloc", "-n", "2", "-N", "2", *doctor, timeout=90)
    report = json.loads(text[text.index("{") :])
    assert report["ok"], report
    found = {check["name"]: check for check in report["checks"]}
    assert found["torch"]["detail"].endswith("on all hosts")  # the hosts' checks come last
    assert found["network"]["status"] == "ok"
    assert found["shared directory"]["status"] == "ok"
    assert not list(tmp_path.iterdir())


def test_host_lists_are_read_as_scontrol_reads_them(slurm: Slurm):
    for text, hosts in LISTS.items():
        assert slurm.run("scontrol", "show", "hostnames", text).split() == hosts
    inside = (
        "salloc",
        "-n",
        "2",
        "-N",
        "2",
        "sh",
        "-c",
        "echo list $SLURM_JOB_NODELIST; scontrol show hostnames",
    )
    (_, text), *hosts = map(str.split, slurm.run(*inside).splitlines())
    assert "[" in text and expand(text) == [name for (name,) in hosts]


def test_srun_by_hand(slurm: Slurm, alone: dict, tmp_path: Path):
    """The run directory is made here; ``srun -n 2 scaletrain worker RUN_DIR`` does the rest."""
    from scaletrain import config

    (tmp_path / "config.yaml").write_text(
        config.load(Path(DIGITS), {"epochs": 1, "workers": 2}).to_yaml()
    )
    slurm.run("srun", "-n", "2", *command("worker", str(tmp_path)), timeout=90)
    assert summary(tmp_path)["final_loss"] == pytest.approx(alone["final_loss"], abs=1e-4)
    assert summary(tmp_path)["workers"] == 2


@pytest.mark.parametrize("end", ["raise ValueError('the cause')", "os.kill(os.getpid(), 9)"])
def test_a_failing_rank_ends_the_job_and_is_named(slurm: Slurm, tmp_path: Path, end: str):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\nimport torch.distributed as dist\ndist.init_process_group('gloo')\n"
        "print('I am', dist.get_rank(), flush=True)\ndist.barrier()\n"
        f"if dist.get_rank() == 1:\n    {end}\ndist.barrier()\ntime.sleep(60)\n"
    )
    run_dir = tmp_path / "run"
    done = scaletrain(
        "launch",
        "-n",
        "3",
        "--launcher",
        "slurm",
        "--run-dir",
        str(run_dir),
        "--",
        str(script),
        env=slurm.env,
    )
    output = done.stdout + done.stderr
    assert done.returncode == (137 if "kill" in end else 1), output
    assert output.count("scaletrain: rank 1 on") == 1 and "scaletrain: rank 0" not in output, output
    assert ("SIGKILL" if "kill" in end else "ValueError: the cause") in output
    assert "FAILED" in output and gone(run_dir)
    for rank in range(3):
        kept = (run_dir / "logs" / f"rank-{rank}.log").read_text()
        assert kept.startswith(f"I am {rank}\n") and f"[rank {rank}] I am {rank}" in output


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


def goes_on(
    slurm: Slurm, launcher: subprocess.Popen, job: str, run_dir: Path, alone_slow: dict
) -> None:
    """The requeued job ends well, went on from its checkpoint, and trained as if nothing had
    been.
    """
    until(lambda: slurm.state(job).get("Restarts") == "1", "the job is requeued")
    output, _ = launcher.communicate(timeout=100)
    assert launcher.returncode == 0, output
    assert "resumed at step" in output and "requeued" in output, output
    assert int(output.split("resumed at step ")[1].split()[0]) >= 10
    assert summary(run_dir)["final_loss"] == pytest.approx(alone_slow["final_loss"], abs=1e-4)


def test_preempted_and_requeued_from_the_checkpoint(slurm: Slurm, alone_slow: dict, tmp_path: Path):
    launcher, job = started(slurm, tmp_path / "run", "--set", "launcher.partition=low")
    other = slurm.run(
        "sbatch",
        "--parsable",
        "-p",
        "high",
        "-N",
        "4",
        "-n",
        "4",
        "-o",
        "/dev/null",
        "--wrap",
        "sleep 2",
    )
    until(
        lambda: slurm.state(other.strip())["JobState"] in ("RUNNING", "COMPLETED"),
        "the other job has the nodes",
    )
    goes_on(slurm, launcher, job, tmp_path / "run", alone_slow)


def test_a_mistake_is_one_line(slurm: Slurm, tmp_path: Path):
    options = ("--set", "launcher.partition=nowhere")
    done = scaletrain(
        "train",
        DIGITS,
        "--run-dir",
        str(tmp_path / "run"),
        "--launcher",
        "slurm",
        *options,
        env=slurm.env,
    )
    assert done.returncode == 2
    assert (
        "invalid partition" in done.stdout + done.stderr
        and "Traceback" not in done.stdout + done.stderr
    )


def test_chosen_variables_arrive_where_a_site_exports_none(slurm: Slurm, tmp_path: Path):
    value = 'it\'s, "quoted";\nin two lines'
    code = "import os; print([os.environ[n] for n in ('CHOSEN', 'PYTHONPATH', 'SCALETRAIN_SUPERVISED')])"
    done = scaletrain(
        "launch", "-n", "2", "--launcher", "slurm", "--run-dir", str(tmp_path / "run"),
        "--set", "environment=[CHOSEN]", "--set", "mpi=auto", "--", "/usr/bin/env", sys.executable, "-c", code,
        env=slurm.env | {"SBATCH_EXPORT": "NONE", "CHOSEN": value, "PYTHONPATH": "/a b"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(str([value, "/a b", "1"])) == 2, done.stdout
    assert "quoted" not in (tmp_path / "run" / "job.sbatch").read_text()


def test_the_controller_may_be_away_for_a_while(slurm: Slurm, alone_slow: dict, tmp_path: Path):
    """``kill -9`` of slurmctld in mid-job: the job trains on, the follower waits, and knows the end
    when it is back.
    """
    launcher, _ = started(slurm, tmp_path / "run")
    slurm.save_state()
    slurm.kill("slurmctld")
    until(lambda: step_of(tmp_path / "run") >= 30, "the job trains on")
    slurm.start_controller()
    output, _ = launcher.communicate(timeout=100)
    assert launcher.returncode == 0, output
    assert summary(tmp_path / "run")["final_loss"] == pytest.approx(
        alone_slow["final_loss"], abs=1e-4
    )


def test_a_job_array_trains_a_seed_a_task(slurm: Slurm, alone: dict, tmp_path: Path):
    """Each task has a run directory of its own: with its number as seed, or the configuration that
    lies there.
    """
    from scaletrain import config

    run_dir = tmp_path / "run"
    own = run_dir / "task-2" / "config.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(
        config.load(Path(DIGITS), {"epochs": 1, "workers": 2, "batch_size": 48}).to_yaml()
    )
    options = ("--launcher", "slurm", "--workers", "2", "--set", "launcher.array=0-2%2")
    done = scaletrain(
        "train", DIGITS, "--run-dir", str(run_dir), *SHORT, *options, env=slurm.env, timeout=140
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "3 of 3 tasks ended well" in output and "[1] workers: 2 (slurm)" in output, output
    losses = [summary(run_dir / f"task-{k}")["final_loss"] for k in range(3)]
    assert losses[0] == pytest.approx(alone["final_loss"], abs=1e-4)  # seed 0, the job's own
    seed_0, seed_1 = (
        json.loads((run_dir / f"task-{k}" / "rank-0.jsonl").read_text().splitlines()[0])
        for k in (0, 1)
    )
    assert (
        abs(seed_1["loss"] - seed_0["loss"]) > 1e-3
    )  # of the first step: other weights, other samples
    assert [config.load(run_dir / f"task-{k}" / "config.yaml").seed for k in range(3)] == [0, 1, 0]
    assert summary(run_dir / "task-2")["steps"] > summary(run_dir / "task-0")["steps"]


def test_an_array_is_followed_and_cancelled_as_one(slurm: Slurm, tmp_path: Path):
    """A script's array: the seed is $SLURM_ARRAY_TASK_ID. One task fails; Ctrl-C ends those that
    run and those that wait.
    """
    script = tmp_path / "script.py"
    script.write_text(
        "import os, time\nseed = int(os.environ['SLURM_ARRAY_TASK_ID'])\nprint('seed', seed, flush=True)\n"
        "if seed == 0:\n    raise ValueError('the cause')\ntime.sleep(60)\n"
    )
    run_dir = tmp_path / "run"
    argv = command(
        "launch",
        "--launcher",
        "slurm",
        "--run-dir",
        str(run_dir),
        "--set",
        "array=0-9%2",
        "--",
        str(script),
    )
    with open(tmp_path / "output", "w+") as output:
        launcher = subprocess.Popen(
            argv, env=slurm.env, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT
        )
        shown = (tmp_path / "output").read_text
        until(
            lambda: "[2] seed 2" in shown() or launcher.poll() is not None,
            "task 2 runs, as task 0 has ended",
        )
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(30) == 130, shown()
    assert shown().count("scaletrain: rank 0 on") == 1 and "ValueError: the cause" in shown(), (
        shown()
    )
    assert all(f"_{tasks}: CANCELLED" in shown() for tasks in ("1", "2", "3-9%2")), shown()
    job = shown().split("submitted job ")[1].split(";")[0]
    assert "RUNNING" not in slurm.run("scontrol", "show", "job", "-o", job)
    until(lambda: gone(run_dir), "the tasks are gone", 10)


GPU_TASK = """
import os, torch
from pathlib import Path
from scaletrain import config
from scaletrain.programs import worker
from scaletrain.world import World
seen = os.environ["CUDA_VISIBLE_DEVICES"]
torch.cuda.is_available = lambda: True  # the GPUs are SLURM's alone: how many torch would count is what it left visible
torch.cuda.device_count = lambda: len(seen.split(","))
torch.cuda.set_device = lambda device: None
world = World.from_env()
print("place", world.local_rank, seen, worker.choose_device(config.load(Path("DIGITS"), {}), world), flush=True)
"""


@pytest.mark.parametrize(
    ("option", "places"),
    [
        ("gpus_per_task=1", ["0 0 cuda:0", "1 1 cuda:0"]),  # narrowed to one each
        ("gres=gpu:2", ["0 0,1 cuda:0", "1 0,1 cuda:1"]),  # both see both
    ],
)
def test_each_task_takes_a_gpu_of_its_own(
    slurm: Slurm, tmp_path: Path, option: str, places: list[str]
):
    script = tmp_path / "script.py"
    script.write_text(GPU_TASK.replace("DIGITS", DIGITS))
    options = (
        "-n",
        "2",
        "--launcher",
        "slurm",
        "--run-dir",
        str(tmp_path / "run"),
        "--set",
        "partition=gpu",
    )
    done = scaletrain("launch", *options, "--set", option, "--", str(script), env=slurm.env)
    assert done.returncode == 0, done.stdout + done.stderr
    shown = sorted(line.split("place ")[1] for line in done.stdout.splitlines() if "place " in line)
    assert shown == places, done.stdout + done.stderr


def test_pmix_over_hosts(slurm: Slurm, alone: dict, tmp_path: Path):
    """``srun --mpi=pmix`` over two nodes that are hosts of their own (network namespaces)."""
    from scaletrain import config
    from scaletrain.errors import UserError
    from scaletrain.rehearsal import Cluster, machine

    if "pmix" not in slurm.run("srun", "--mpi=list"):
        pytest.skip("this SLURM has no --mpi=pmix")
    try:
        machine.check()
    except UserError as missing:
        require("namespaces", False, str(missing))
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(
        config.load(Path(DIGITS), {"epochs": 1, "workers": 2}).to_yaml()
    )
    short = tempfile.TemporaryDirectory(prefix="slurm-")  # the names of PMIx's sockets are long
    with (
        short as folder,
        Cluster(2, bandwidth=None) as network,
        Slurm(Path(folder), 2, network) as two,
    ):
        before = network.counters()
        two.run(
            "srun", "--mpi=pmix", "-N", "2", "-n", "2", *command("worker", str(run_dir)), timeout=90
        )
        moved = [
            now.sent_bytes - then.sent_bytes
            for now, then in zip(network.counters(), before, strict=True)
        ]
    reached = summary(run_dir)
    assert reached["workers"] == 2 and reached["final_loss"] == pytest.approx(
        alone["final_loss"], abs=1e-4
    )
    assert min(moved) > 1_000_000, "the gradients did not cross the links"


@pytest.mark.parametrize("mpi", ["none", "pmi2", "pmix"])
def test_each_kind_of_srun_says_who_a_task_is(slurm: Slurm, mpi: str):
    if mpi not in slurm.run("srun", "--mpi=list"):
        pytest.skip(f"this SLURM has no --mpi={mpi}")
    code = "from scaletrain.world import World; w = World.from_env(); print(w.rank, w.size, w.local_rank, w.local_size, w.launcher)"
    # On one node: two PMIx servers of one step cannot live on the same real host; across hosts, see
    # below.
    output = slurm.run(
        "srun", f"--mpi={mpi}", "-N", "1", "-n", "2", "--overcommit", sys.executable, "-c", code
    )
    places = sorted(line.split()[:4] for line in output.splitlines() if line.count(" ") == 4)
    assert places == [["0", "2", "0", "2"], ["1", "2", "1", "2"]], output


@pytest.mark.timeout(240)
def test_out_of_time_and_requeued_from_the_checkpoint(
    out_of_time: tuple[subprocess.Popen, Path], tmp_path: Path
):
    launcher, run_dir = out_of_time
    status, output = launcher.wait(200), run_dir.with_name("output").read_text()
    assert status == 0, output
    assert (
        "stopped early" in output and "requeued; it goes on from its last checkpoint" in output
    ), output
    assert int(output.split("resumed at step ")[1].split()[0]) >= 10, output
    assert summary(run_dir)["finished"] and summary(run_dir)["steps"] == 300
    whole = train(
        tmp_path / "whole",
        "--workers",
        "2",
        "--set",
        "steps=300",
        "--set",
        "data=digits",
        config=SLOW,
    )
    assert summary(run_dir)["final_loss"] == pytest.approx(whole["final_loss"], abs=1e-4)


def test_kill_9_of_a_node_daemon_is_no_hang(
    without_its_daemon: tuple[subprocess.Popen, Path], alone_slow: dict
):
    """The node is down for SLURM after its time-out; the job is requeued to others and goes on, or
    has ended by then.
    """
    launcher, run_dir = without_its_daemon
    status, output = launcher.wait(100), run_dir.with_name("output").read_text()
    assert status == 0, output
    assert summary(run_dir)["final_loss"] == pytest.approx(alone_slow["final_loss"], abs=1e-4)
