"""Tests of launchers/kubernetes.py and of its follower, with a stand-in for kubectl."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from scaletrain import config
from scaletrain.cli import cli
from scaletrain.errors import UserError
from scaletrain.launching.job import Companion, Job, Program, script_job
from scaletrain.launching.launchers import kubernetes
from scaletrain.programs.follow_kubernetes import JobState, Pod
from scaletrain.world import World
from tests.conftest import require

DIGITS = Path(__file__).parents[2] / "examples" / "digits.yaml"
TRAINING = {"container": "registry.example/scaletrain:1", "run_claim": "runs"}


def training_job(workers: int = 4, **fields) -> Job:
    fields = {"config": "name: digits\nworkers: 4\n", **fields}
    return Job((), workers, Path("/home/me/runs/Digits_1"), Program.TRAINING, **fields)


def objects_of(job: Job, **options) -> dict[str, dict[str, Any]]:
    """The objects of a plan's manifest, by their kinds."""
    (_, text), *_ = kubernetes.plan(job, **options).files
    return {value["kind"]: value for value in yaml.safe_load_all(text)}


def container_of(job: Job, **options) -> dict[str, Any]:
    spec = objects_of(job, **options)["Job"]["spec"]["template"]["spec"]
    return spec["containers"][0]


EVERYTHING: dict[str, Any] = {
    **TRAINING,
    "container_workdir": "/work",
    "namespace": "lab",
    "workers_per_pod": 2,
    "cpus_per_worker": 3,
    "gpus_per_worker": 1,
    "mem": "64Gi",
    "volumes": {"datasets": "/data"},
    "env": {"DEBUG": 1},
    "secrets": {"HF_TOKEN": "tokens/hub"},
    "service_account": "trainer",
    "node_selector": {"pool": "gpu"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "labels": {"kueue.x-k8s.io/queue-name": "team"},
    "time_limit_min": 90,
}
SCRIPT = script_job(["train.py", "--name", "it's $HOME"], 2, Path("/home/me/runs/launch-1"))


@pytest.mark.parametrize(
    ("job", "options"),
    [
        (training_job(), TRAINING),
        (training_job(resume=True), EVERYTHING),
        (SCRIPT, {"container": "image", "shm": ""}),
    ],
)
def test_the_cluster_knows_every_field(job: Job, options: dict):
    """By the published schemas, of the newest release and of the oldest that has the fields."""
    is_there = importlib.util.find_spec("kubernetes_validate") is not None
    require("kubernetes_validate", is_there, "pip install kubernetes-validate")
    import kubernetes_validate

    for value in objects_of(job, **options).values():
        for version in ("1.29", "1.34"):
            kubernetes_validate.validate(value, version, strict=True)


def test_each_worker_finds_its_place():
    container = container_of(training_job(), **TRAINING)
    # As the pod's annotations have them. The cluster sets the third by itself.
    env = {"RANK": "3", "GROUP_RANK": "3", "JOB_COMPLETION_INDEX": "3"}
    for variable in container["env"]:
        env.setdefault(variable["name"], variable.get("value", ""))
    world = World.from_env(env)
    assert (world.rank, world.size, world.local_size, world.num_nodes) == (3, 4, 1, 4)
    assert env["MASTER_ADDR"] == "scaletrain-digits-1-0.scaletrain-digits-1"
    spec = objects_of(training_job(), **TRAINING)["Job"]["spec"]
    assert spec["completions"] == spec["parallelism"] == 4
    assert spec["template"]["spec"]["subdomain"] == "scaletrain-digits-1"


def test_several_workers_of_a_pod_are_started_by_torchrun():
    container = container_of(training_job(), **EVERYTHING)
    assert "--nnodes=2 --nproc-per-node=2 --node-rank " in container["command"][2]
    assert container["resources"]["limits"] == {"memory": "64Gi", "nvidia.com/gpu": "2"}
    assert container["resources"]["requests"]["cpu"] == "6"
    names = [variable["name"] for variable in container["env"]]
    assert "RANK" not in names, "torchrun sets it"
    token = container["env"][names.index("HF_TOKEN")]
    assert token["valueFrom"] == {"secretKeyRef": {"name": "tokens", "key": "hub"}}


def in_folder(script: str, folder: Path) -> str:
    """Return a pod's script with the pod's directories in a folder."""
    return script.replace("/runs/", f"{folder}/runs/").replace("/scaletrain/", f"{folder}/")


def run_shell(script: str, folder: Path, **env: str) -> list[str]:
    """Run a pod's script with a Python that prints its arguments, and /runs in a folder."""
    python = folder / "python3"
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    script = in_folder(script, folder)
    done = subprocess.run(
        ["sh", "-c", script],
        env={
            **os.environ,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "HOSTNAME": "pod-0",
            "JOB_UID": "job",
            "JOB_COMPLETION_INDEX": "0",
            **env,
        },
        capture_output=True,
        text=True,
        timeout=20,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_pod_has_the_configuration_and_resumes_when_it_is_started_again(tmp_path: Path):
    script = container_of(training_job(), **TRAINING)["command"][2]
    (tmp_path / "config.yaml").write_text("name: digits\n")
    pods = tmp_path / "runs" / "Digits_1" / ".pods"
    pods.mkdir(parents=True)
    for other in ("job-1", "job-2", "job-3"):
        (pods / other).touch()
    first = run_shell(script, tmp_path, JOB_FAILURES="0", JOB_DISRUPTIONS="")
    assert first == ["-P", "-m", Program.TRAINING.value, f"{tmp_path}/runs/Digits_1"]
    assert sorted(path.name for path in pods.parent.iterdir()) == [".pods", "config.yaml"]
    after_failure = run_shell(script, tmp_path, JOB_FAILURES="1", JOB_DISRUPTIONS="")
    after_disruption = run_shell(script, tmp_path, JOB_FAILURES="0", JOB_DISRUPTIONS="1")
    assert after_failure == after_disruption == [*first, "--resume"]
    given = objects_of(training_job(), **TRAINING)["ConfigMap"]["data"]
    assert given == {"config.yaml": "name: digits\nworkers: 4\n"}


def test_a_pod_waits_until_all_others_have_started(tmp_path: Path):
    script = container_of(training_job(2), **TRAINING)["command"][2]
    (tmp_path / "config.yaml").touch()
    pods = tmp_path / "runs" / "Digits_1" / ".pods"
    pods.mkdir(parents=True)
    (pods / "earlier-1").touch()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(run_shell, script, tmp_path)
        until = time.monotonic() + 20
        while not (pods / "job-0").exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        time.sleep(0.2)
        assert not running.done()
        (pods / "job-1").touch()
        assert Program.TRAINING.value in running.result()


def test_a_scripts_arguments_arrive_as_they_are(tmp_path: Path):
    script = container_of(SCRIPT, container="image")["command"][2]
    assert run_shell(script, tmp_path)[-3:] == ["train.py", "--name", "it's $HOME"]


@pytest.mark.slow
@pytest.mark.parametrize("workers_per_pod", [1, 2])
def test_the_pods_of_a_job_train_together(workers_per_pod: int, tmp_path: Path):
    """Their scripts run here, with what the cluster would give them, but for the host's name."""
    changes = {"workers": 2, "epochs": None, "steps": 4, "threads": 1, "evaluate_every": None}
    run = config.load(DIGITS, changes)
    container = container_of(
        training_job(2, config=run.to_yaml()), **TRAINING, workers_per_pod=workers_per_pod
    )
    (tmp_path / "config.yaml").write_text(run.to_yaml())
    (tmp_path / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / "python3").chmod(0o755)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    script = in_folder(container["command"][2], tmp_path)
    script = script.replace("scaletrain-digits-1-0.scaletrain-digits-1", "127.0.0.1")
    script = script.replace("--master-port=29500", f"--master-port={port}")
    given = {name: value for name, value in os.environ.items() if not name.startswith("SCALETRAIN")}
    given |= {"PATH": f"{tmp_path}:{given['PATH']}", "JOB_UID": "job"}
    for variable in container["env"]:
        if variable.get("value"):
            given[variable["name"]] = variable["value"]
    if workers_per_pod == 1:
        given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pods = []
    for index in map(str, range(2 // workers_per_pod)):
        env = given | {"JOB_COMPLETION_INDEX": index, "HOSTNAME": f"pod-{index}"}
        if workers_per_pod == 1:
            env |= {"RANK": index, "GROUP_RANK": index}
        argv = ["sh", "-c", script]
        pods.append(subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True))
    try:
        for pod in pods:
            _, err = pod.communicate(timeout=90)
            assert pod.returncode == 0, err
    finally:
        for pod in pods:
            pod.kill()
    summary = json.loads((tmp_path / "runs" / "Digits_1" / "summary.json").read_text())
    assert summary["finished"] and summary["steps"] == 4, summary


def test_long_names_stay_different():
    names = [kubernetes.job_name(Path("x" * 80 + end)) for end in ("a", "b")]
    assert names[0] != names[1] and max(map(len, names)) <= 50


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({}, "launcher.container: is missing"),
        ({"container": "image"}, "launcher.run_claim: is missing"),
        ({**TRAINING, "workers_per_pod": 3}, "4 workers do not fill pods of 3"),
        ({**TRAINING, "secrets": {"A": "b"}}, "launcher.secrets.A: 'b' is not allowed"),
        ({**TRAINING, "volumes": {"a": "b"}}, "launcher.volumes.a: 'b' is not allowed"),
    ],
)
def test_mistakes(options: dict, problem: str):
    with pytest.raises(UserError, match=problem):
        kubernetes.plan(training_job(), **options)


def test_dedicated_servers_are_refused():
    with pytest.raises(UserError, match="beside"):
        kubernetes.plan(training_job(companions=(Companion("server 0", ("x",)),)), **TRAINING)


def test_without_kubectl_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    from click.testing import CliRunner

    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["launch", "--launcher", "kubernetes", "--set", "container=image", "train.py"]
    done = CliRunner().invoke(cli, arguments)
    assert "kubectl was not found" in str(done.exception or done.output)
    done = CliRunner().invoke(cli, [*arguments[:3], "--dry-run", *arguments[3:]])
    assert done.exit_code == 0 and "completionMode: Indexed" in done.output


# What the cluster says.


def pod_json(
    index: int, phase: str, exit_code: int | None = None, at: str = "", **more
) -> dict[str, Any]:
    state: dict[str, Any] = {"running": {}}
    if exit_code is not None:
        reason = more.pop("reason", "Error")
        state = {"terminated": {"exitCode": exit_code, "finishedAt": at, "reason": reason}}
    annotations = {"batch.kubernetes.io/job-completion-index": str(index)}
    annotations |= more.pop("annotations", {})
    status = {"phase": phase, "containerStatuses": [{"state": state}], **more}
    return {"metadata": {"name": f"job-{index}-x", "annotations": annotations}, "status": status}


def job_json(end: str = "", reason: str = "") -> dict[str, Any]:
    conditions = [{"type": end, "status": "True", "reason": reason}] if end else []
    return {"metadata": {"uid": "u-1"}, "status": {"conditions": conditions}}


@pytest.mark.parametrize(
    ("end", "reason", "pod", "status"),
    [
        ("Complete", "", None, 0),
        ("Failed", "FailedIndexes", pod_json(0, "Failed", 3), 3),
        ("Failed", "FailedIndexes", pod_json(0, "Failed", 137, reason="OOMKilled"), 137),
        ("Failed", "DeadlineExceeded", None, 124),
        ("Failed", "FailedIndexes", {**pod_json(0, "Failed"), "status": {"phase": "Failed"}}, 1),
    ],
)
def test_the_status_of_an_end(end: str, reason: str, pod: dict | None, status: int):
    first_failed = Pod.from_json(pod) if pod else None
    assert JobState.from_json(job_json(end, reason)).status(first_failed) == status


def test_why_a_pod_waits():
    message = "0/3 nodes are available"
    condition = {"type": "PodScheduled", "status": "False", "message": message}
    waiting = {**pod_json(0, "Pending"), "status": {"phase": "Pending", "conditions": [condition]}}
    assert Pod.from_json(waiting).reason == message
    state = {"waiting": {"reason": "ImagePullBackOff"}}
    waiting["status"] = {"phase": "Pending", "containerStatuses": [{"state": state}]}
    assert Pod.from_json(waiting).reason == "ImagePullBackOff"


# A stand-in for kubectl. `job-N` and `pods-N` are the answers to look N; the last ones stay.
KUBECTL = """#!/bin/sh
cd {folder}
echo "$*" >> calls
case "$*" in
*"get job"*)
    [ -e created ] || {{ echo 'Error (NotFound): jobs "x" not found' >&2; exit 1; }}
    look=$(cat look 2>/dev/null || echo 0)
    [ -e job-$look ] || {{ echo 'Error (NotFound): jobs "x" not found' >&2; exit 1; }}
    cat job-$look ;;
*"get pods"*)
    look=$(cat look 2>/dev/null || echo 0)
    cat pods-$look
    next=$((look + 1))
    if [ -e job-$next ]; then echo $next > look; fi ;;
*"apply "*) touch created ;;
*"delete "*) echo gone > look; [ ! -e ended-before ] || rm created look ended-before ;;
*"logs "*) echo "trained on ${{*##* }}"; echo "well" ;;
esac
"""


class Stage:
    """A folder with the stand-in, and the answers that it gives."""

    def __init__(self, folder: Path, looks: list[tuple[dict, list[dict]]]):
        self.folder = folder
        self.run_dir = folder / "run"
        self.run_dir.mkdir()
        for number, (job, pods) in enumerate(looks):
            (folder / f"job-{number}").write_text(json.dumps(job))
            (folder / f"pods-{number}").write_text(json.dumps({"items": pods}))
        (folder / "kubectl").write_text(KUBECTL.format(folder=folder))
        (folder / "kubectl").chmod(0o755)
        (_, text), *_ = kubernetes.plan(training_job(2), **TRAINING, namespace="lab").files
        self.manifest = self.run_dir / "kubernetes.yaml"
        self.manifest.write_text(text)

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            Program.FOLLOW_KUBERNETES.command(self.manifest, 0.02, *arguments),
            env={**os.environ, "PATH": f"{self.folder}:{os.environ['PATH']}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str) -> tuple[int, str, str]:
        process = self.start(*arguments)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().splitlines()


RUNNING = (job_json(), [pod_json(0, "Running"), pod_json(1, "Running")])


def test_a_job_is_followed_to_its_end(tmp_path: Path):
    ended = [
        pod_json(0, "Failed", 1, "2026-01-01T00:00:09Z"),
        pod_json(1, "Failed", 3, "2026-01-01T00:00:08Z"),
    ]
    stage = Stage(
        tmp_path,
        [
            (job_json(), []),
            (job_json(), [pod_json(0, "Running")]),
            RUNNING,
            (job_json("Failed", "FailedIndexes"), ended),
        ],
    )
    status, out, err = stage.run()
    assert status == 3, out + err
    assert "[pod 0] trained on job-0-x" in out and "[pod 1] well" in out
    assert "no pods yet" in out and "2 pods running" in out and "failed (FailedIndexes)" in out
    assert "pod job-1-x failed first: status 3" in err
    assert (stage.run_dir / "pod-job-1-x.log").read_text() == "trained on job-1-x\nwell\n"
    # The cluster removes Service and configuration together with the job.
    patches = [call for call in stage.calls() if " patch " in call]
    assert len(patches) == 2 and all('"uid": "u-1"' in call for call in patches)
    assert all(call.startswith("--namespace=lab ") for call in stage.calls())


@pytest.mark.parametrize(
    ("reason", "pods", "status"),
    [
        ("DeadlineExceeded", [pod_json(0, "Running"), pod_json(1, "Running")], 124),
        ("FailedIndexes", [pod_json(0, "Failed", 137, reason="OOMKilled")], 137),
        ("PodFailurePolicy", [pod_json(0, "Failed", 2)], 2),
    ],
)
def test_the_command_ends_with_the_documented_status(
    tmp_path: Path, reason: str, pods: list[dict], status: int
):
    stage = Stage(tmp_path, [RUNNING, (job_json("Failed", reason), pods)])
    assert stage.run()[0] == status
    page = DIGITS.parents[1] / "docs" / "launchers" / "kubernetes.md"
    assert str(status) in page.read_text(encoding="utf-8")


def test_an_earlier_attempts_failure_is_not_the_cause(tmp_path: Path):
    again = {"batch.kubernetes.io/job-index-failure-count": "1"}
    pods = [
        pod_json(0, "Failed", 5, "2026-01-01T00:00:01Z"),
        pod_json(1, "Failed", 3, "2026-01-01T00:00:08Z", annotations=again),
    ]
    stage = Stage(tmp_path, [(job_json("Failed", "FailedIndexes"), pods)])
    assert stage.run()[0] == 3


def test_a_signal_deletes_the_job(tmp_path: Path):
    stage = Stage(tmp_path, [RUNNING])
    process = stage.start()
    assert process.stdout
    for line in process.stdout:
        if "2 pods running" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130, out + err
    assert "being deleted" in out and "deleted\n" in out and "Traceback" not in err
    deletions = [call for call in stage.calls() if " delete " in call]
    assert deletions == [
        "--namespace=lab delete job scaletrain-digits-1 --cascade=foreground --wait=false"
    ]


def test_a_job_that_runs_is_refused_and_one_that_has_ended_makes_room(tmp_path: Path):
    stage = Stage(tmp_path, [RUNNING])
    (tmp_path / "created").touch()
    status, _, err = stage.run()
    assert status == 2 and "job scaletrain-digits-1 runs already" in err and "Traceback" not in err
    (tmp_path / "job-0").write_text(json.dumps(job_json("Complete")))
    (tmp_path / "ended-before").touch()
    status, out, err = stage.run("--leave")
    assert status == 0 and "kubectl --namespace=lab delete job" in out, err
    assert [call.split()[1] for call in stage.calls()[-6:]] == [
        *("get", "delete", "apply", "get", "patch", "patch")
    ]


def test_a_cluster_that_refuses_is_one_line(tmp_path: Path):
    stage = Stage(tmp_path, [RUNNING])
    (tmp_path / "kubectl").write_text("#!/bin/sh\necho 'The connection was refused' >&2; exit 1\n")
    status, _, err = stage.run()
    assert status == 2 and "error: launcher: The connection was refused" in err
    assert "Traceback" not in err
