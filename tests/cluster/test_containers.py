"""Tests of docker/.

The container files are sound; the CPU image is built and run for real, as an ordinary user; two
containers train together.

No registry is needed: where mmdebstrap is, the base image is made from Debian's packages under its
usual name. Set SCALETRAIN_CONTAINERS_DIR to a folder to keep storage and base image between test
runs.
"""

import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from scaletrain.world import World
from tests.conftest import require

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
BASE = "docker.io/library/debian:bookworm-slim"
IMAGE = "localhost/scaletrain:cpu"


# --- the files
# ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_images_run_as_an_ordinary_user_with_a_health_check_and_pinned_versions(name: str):
    text = (DOCKER / name).read_text(encoding="utf-8")
    final = text[text.rindex("\nFROM ") :]
    assert re.search(r"^USER scaletrain$", final, re.MULTILINE) and "--uid 1000 scaletrain" in final
    assert "HEALTHCHECK " in final and "ENTRYPOINT" in final
    assert "--constraint constraints.txt" in text
    arguments = arguments_of(text)
    for base in re.findall(r"^FROM (\S+)", text, re.MULTILINE):
        tag = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], base).rpartition(":")[2]
        assert tag not in ("", "latest")


@pytest.mark.parametrize("name", ["Dockerfile.cpu", "Dockerfile.cuda"])
def test_images_are_given_what_they_copy_and_nothing_else(name: str):
    text = (DOCKER / name).read_text(encoding="utf-8")
    copied = {
        source
        for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE)
        for source in line.split()[:-1]
    }
    assert all((ROOT / source).exists() for source in copied), copied
    ignored = (DOCKER / f"{name}.dockerignore").read_text(encoding="utf-8").split()
    assert ignored[0] == "*"
    assert copied <= {line[1:] for line in ignored if line.startswith("!")}


def arguments_of(text: str) -> dict[str, str]:
    return dict(re.findall(r"^ARG (\w+)=(.+)$", text, re.MULTILINE))


def steps_of(text: str) -> list[tuple[str, str]]:
    """A Dockerfile as (instruction, its text); lines that end in a backslash go on."""
    lines = [
        line
        for line in text.replace("\\\n", " ").splitlines()
        if line.strip() and not line.startswith("#")
    ]
    return [(line.split()[0], line.split(None, 1)[1]) for line in lines]


def test_the_cuda_image_follows_the_cpu_image():
    """It cannot be built here (no registry): what can be checked is that it says the same, and that
    its shell commands parse.
    """
    texts = {
        name: (DOCKER / f"Dockerfile.{name}").read_text(encoding="utf-8")
        for name in ("cpu", "cuda")
    }
    cpu, cuda = (steps_of(texts[name]) for name in ("cpu", "cuda"))
    for instruction in ("ENV", "WORKDIR", "USER", "VOLUME", "HEALTHCHECK", "ENTRYPOINT", "CMD"):
        assert [step for step in cpu if step[0] == instruction] == [
            step for step in cuda if step[0] == instruction
        ]
    copied = [text for kind, text in cuda if kind == "COPY" and "horovod" not in text]
    assert copied == [text for kind, text in cpu if kind == "COPY"]
    for kind, text in [*cpu, *cuda]:
        if kind == "RUN":
            shell = re.sub(r"^--mount=\S+ ", "", text)
            assert subprocess.run(["sh", "-n", "-c", shell], capture_output=True).returncode == 0, (
                shell
            )
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if re.match(r"[\w.-]+==", line)
    )
    assert {"torch", "mpi4py", "hatchling"} <= {
        name.lower() for name in pinned
    }  # and pyproject.toml's own
    version = re.search(
        r"^version=(\S+)$", (ROOT / "launch" / "build_horovod.sh").read_text(), re.MULTILINE
    )
    assert version and version[1] == "0.28.1"


def compose() -> dict:
    return yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))


def test_compose_describes_a_world_of_four():
    services = {
        name: service
        for name, service in compose()["services"].items()
        if name.startswith("worker")
    }
    worlds = [World.from_env(service["environment"]) for service in services.values()]
    assert [(w.rank, w.size, w.local_rank, w.node, w.num_nodes) for w in worlds] == [
        (i, 4, 0, i, 4) for i in range(4)
    ]
    assert {service["environment"]["MASTER_ADDR"] for service in services.values()} == {"worker-0"}
    assert all(
        service["hostname"] == name and service["networks"] == ["workers"]
        for name, service in services.items()
    )


# --- the image
# ------------------------------------------------------------------------------


class Podman(NamedTuple):
    """podman with a storage of its own, so that nothing of the machine's is used or changed."""

    folder: Path
    kept: bool

    @property
    def env(self) -> dict[str, str]:
        conf = {
            "CONTAINERS_CONF": str(self.folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.folder / "storage.conf"),
        }
        return os.environ | conf

    def __call__(
        self, *arguments: str, timeout_s: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess:
        done = subprocess.run(
            ["podman", *arguments], env=self.env, capture_output=True, text=True, timeout=timeout_s
        )
        if check and done.returncode:
            raise AssertionError(
                f"podman {' '.join(arguments)}: status {done.returncode}\n{done.stdout}{done.stderr}"
            )
        return done


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    have = all(shutil.which(tool) for tool in ("podman", "buildah", "runc", "mmdebstrap"))
    packages = "podman buildah runc netavark aardvark-dns mmdebstrap uidmap iptables"
    require(
        "containers",
        have and os.geteuid() == 0,
        f"as root, apt-get install --no-install-recommends {packages}",
    )
    kept = os.environ.get("SCALETRAIN_CONTAINERS_DIR")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("containers")
    folder.mkdir(parents=True, exist_ok=True)
    # What machines without systemd and with hybrid control groups need.
    (folder / "containers.conf").write_text(
        '[engine]\nruntime = "runc"\ncgroup_manager = "cgroupfs"\nevents_logger = "file"\n'
        '[network]\nnetwork_backend = "netavark"\n[containers]\ndefault_ulimits = []\n'
    )
    (folder / "storage.conf").write_text(
        f'[storage]\ndriver = "overlay"\ngraphroot = "{folder}/storage"\nrunroot = "{folder}/run"\n'
    )
    made = Podman(folder, kept=bool(kept))
    yield made
    made("rm", "--all", "--force", "--time", "0", check=False)
    if not kept:
        made("system", "reset", "--force", check=False)
    for place in reversed(_mounts_below(folder)):  # buildah and podman leave some
        subprocess.run(["umount", "--lazy", place], check=False, capture_output=True)
    assert _mounts_below(folder) == []
    if not kept:
        shutil.rmtree(folder)


def _mounts_below(folder: Path) -> list[str]:
    """What is mounted in a folder, in the order in which it was."""
    places = [
        line.split()[1]
        for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    ]
    return [place for place in places if place.startswith(f"{folder.resolve()}/")]


@pytest.fixture(scope="module")
def image(podman: Podman) -> str:
    """The CPU image, built from this checkout."""
    if podman("image", "exists", BASE, check=False).returncode:
        base = podman.folder / "base.tar"
        made = ["mmdebstrap", "--quiet", "--variant=minbase", "bookworm", str(base)]
        subprocess.run(made, check=True, capture_output=True, timeout=300)
        podman("import", "--quiet", str(base), BASE, timeout_s=120)
        base.unlink()
    command = ["buildah", "bud", "--format", "docker", "--isolation", "chroot", "--pull-never"]
    command += (
        ["--layers"] if podman.kept else []
    )  # to go on from the next time; they take half a minute
    command += [
        "--file",
        str(DOCKER / "Dockerfile.cpu"),
        "--tag",
        IMAGE,
        *_this_machines_pip(podman.folder),
        str(ROOT),
    ]
    done = subprocess.run(command, env=podman.env, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return IMAGE


def _this_machines_pip(folder: Path) -> list[str]:
    """Mounts for the time of the build that make pip inside find its packages where pip here does.
    Nothing of it is baked in.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    )
    settings = dict(line.split("=", 1) for line in listed.stdout.splitlines() if "=" in line)
    config = configparser.ConfigParser(interpolation=None)
    config["global"] = {
        key.partition(".")[2].lstrip("."): value.strip("'\"") for key, value in settings.items()
    }
    mounts = []
    places = set()
    for word in " ".join(value for key, value in config["global"].items() if key != "cert").split():
        # The files of an index lie beside its pages.
        places.add(
            str(Path(word.removeprefix("file://")).parent) if word.startswith("file://") else word
        )
    for place in sorted(
        place for place in places if place.startswith("/") and Path(place).exists()
    ):
        mounts += ["--volume", f"{place}:{place}:ro"]
    if certificates := config["global"].get("cert"):
        mounts += ["--volume", f"{certificates}:/run/build-certificates.crt:ro"]
        config["global"]["cert"] = "/run/build-certificates.crt"
    with open(folder / "pip.conf", "w", encoding="utf-8") as file:
        config.write(file)
    own_index = "index-url" in config["global"] or "find-links" in config["global"]
    return [
        *mounts,
        "--volume",
        f"{folder}/pip.conf:/etc/pip.conf:ro",
        *(["--build-arg", "TORCH_INDEX="] if own_index else []),
    ]


def needs_image(test):
    """Marks of the tests that build and run the image."""
    return pytest.mark.cluster(pytest.mark.slow(pytest.mark.timeout(900)(test)))


@needs_image
def test_the_image_works_as_an_ordinary_user(podman: Podman, image: str):
    assert podman("run", "--rm", "--entrypoint", "id", image, "-u").stdout == "1000\n"
    assert "parameter_server" in podman("run", "--rm", image, "list").stdout
    training = podman(
        "run",
        "--rm",
        image,
        "train",
        "examples/digits.yaml",
        "--set",
        "epochs=1",
        "--run-dir",
        "/runs/one",
        timeout_s=100,
    )
    assert "done: 15 steps" in training.stdout or "done: 14 steps" in training.stdout
    baked = podman(
        "run",
        "--rm",
        "--entrypoint",
        "sh",
        image,
        "-c",
        "cat /etc/pip.conf /run/build-certificates.crt; env",
        check=False,
    )
    assert (
        "find-links" not in baked.stdout
        and "BEGIN CERTIFICATE" not in baked.stdout
        and "PIP_" not in baked.stdout
    )


@needs_image
def test_the_health_check_tells_a_silent_worker(podman: Podman, image: str):
    name = podman("run", "--detach", "--entrypoint", "sleep", image, "300").stdout.strip()
    try:
        assert podman("healthcheck", "run", name, check=False).returncode == 0
        for age, status in ((10, 0), (600, 1)):
            progress = json.dumps(
                {"host": name[:12], "pid": 1, "time": time.time() - age, "doing": "step"}
            )
            script = f"mkdir -p /runs/x && echo '{progress}' > /runs/x/progress-0.json"
            podman("exec", name, "sh", "-c", script)
            assert podman("healthcheck", "run", name, check=False).returncode == status
    finally:
        podman("rm", "--force", "--time", "0", name)


@needs_image
def test_two_containers_train_together_over_their_network(
    podman: Podman, image: str, tmp_path: Path
):
    alone = tmp_path / "alone"
    command = [
        sys.executable,
        "-m",
        "scaletrain.cli",
        "train",
        str(ROOT / "examples" / "digits.yaml"),
        "--run-dir",
        str(alone),
    ]
    subprocess.run(
        [*command, "--set", "epochs=2", "--set", "threads=1"],
        check=True,
        capture_output=True,
        timeout=200,
    )
    services = compose()["services"]
    name = f"scaletrain-{os.getpid()}"
    podman("network", "create", name)
    podman("volume", "create", name)
    volume = ["--volume", f"{name}:/runs"]
    try:
        prepare = (
            services["prepare"]["command"][0]
            + " && sed -i 's/^epochs:.*/epochs: 2/' /runs/digits/config.yaml"
        )
        podman("run", "--rm", *volume, "--entrypoint", "sh", image, "-c", prepare)
        workers = []
        for host in ("worker-0", "worker-1"):
            variables = services[host]["environment"] | {"WORLD_SIZE": "2", "GROUP_WORLD_SIZE": "2"}
            env = [part for key, value in variables.items() for part in ("--env", f"{key}={value}")]
            place = [
                "--network",
                name,
                "--name",
                f"{name}-{host}",
                "--hostname",
                host,
                "--network-alias",
                host,
            ]
            started = podman(
                "run", "--detach", *place, *volume, *env, image, *services[host]["command"]
            )
            workers.append(started.stdout.strip())
        statuses = [podman("wait", worker, timeout_s=300).stdout.strip() for worker in workers]
        logs = "\n".join(
            podman("logs", worker).stdout + podman("logs", worker).stderr for worker in workers
        )
        assert statuses == ["0", "0"], logs
        files = podman(
            "run",
            "--rm",
            *volume,
            "--entrypoint",
            "cat",
            image,
            "/runs/digits/summary.json",
            "/runs/digits/rank-1.json",
        )
        summary, second = files.stdout.split("}\n{")[0] + "}", "{" + files.stdout.split("}\n{")[1]
    finally:
        for host in ("worker-0", "worker-1"):
            podman("rm", "--force", "--ignore", "--time", "0", f"{name}-{host}")
        podman("volume", "rm", "--force", name, check=False)
        podman("network", "rm", "--force", name, check=False)
    together, reference = (
        json.loads(summary),
        json.loads((alone / "summary.json").read_text(encoding="utf-8")),
    )
    assert together["workers"] == 2 and json.loads(second)["environment"]["host"] == "worker-1"
    assert together["final_loss"] == pytest.approx(reference["final_loss"], abs=1e-4)


@needs_image
def test_compose_starts_four_workers_that_train_together(
    podman: Podman, image: str, tmp_path: Path
):
    """``compose.yaml`` for real, with podman-compose. It does not wait for ``prepare`` as docker
    compose does: that runs first here.
    """
    require(
        "compose",
        shutil.which("podman-compose") is not None,
        "Debian: apt-get install podman-compose",
    )
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    prepare = compose()["services"]["prepare"]["command"][0]
    assert prepare in text
    short = tmp_path / "compose.yaml"  # one epoch of the job, all else as it is
    short.write_text(
        text.replace(
            prepare, f"{prepare} && sed -i 's/^epochs:.*/epochs: 1/' /runs/digits/config.yaml"
        )
    )
    project = f"scaletrain-{os.getpid()}"

    def call(*arguments: str) -> str:
        argv = ["podman-compose", "-p", project, "-f", str(short), *arguments]
        done = subprocess.run(
            argv, env=podman.env, cwd=tmp_path, capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        call("up", "--detach", "prepare")
        assert podman("wait", f"{project}_prepare_1").stdout.strip() == "0"
        workers = [f"worker-{i}" for i in range(4)]
        call("up", "--detach", *workers)
        containers = [f"{project}_{worker}_1" for worker in workers]
        statuses = [
            podman("wait", container, timeout_s=200).stdout.strip() for container in containers
        ]
        logs = "\n".join(
            podman("logs", name).stdout + podman("logs", name).stderr for name in containers
        )
        assert statuses == ["0"] * 4, logs
        volume = f"{project}_runs:/runs"
        show = "cat /runs/digits/summary.json && cat /runs/digits/rank-*.json"
        files = podman(
            "run", "--rm", "--volume", volume, "--entrypoint", "sh", image, "-c", show
        ).stdout
    finally:
        call("down", "--volumes")
    summary, *ranks = [json.loads(part) for part in re.split(r"(?<=\})\n(?=\{)", files.strip())]
    assert summary["workers"] == 4 and summary["finished"]
    assert {rank["environment"]["host"] for rank in ranks} == set(workers)
