"""Tests of launchers/mpirun.py under the real Open MPI 4 and 5 and MPICH, also over hosts."""

import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from scaletrain import config
from scaletrain.launching.launchers.mpirun import ALLOW_ROOT
from scaletrain.rehearsal import Cluster
from tests.cluster.commands import (
    DIGITS,
    ROOT,
    SHORT,
    clean,
    command,
    gone,
    scaletrain,
    step_of,
    summary,
    train,
    until,
)
from tests.engine.mpi import KINDS, mpirun

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(150)]
SLOW = str(Path(__file__).with_name("slow_digits.yaml"))


def by(kind: str) -> tuple[str, ...]:
    return ("--launcher", "mpirun", "--set", f"launcher.command={mpirun(kind)}")


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_loss(kind: str, alone: dict, tmp_path: Path):
    trained = train(tmp_path / "run", *SHORT, "--workers", "3", *by(kind))
    assert trained["workers"] == 3 and trained["launcher"] == kind.rstrip("45")
    assert trained["final_loss"] == pytest.approx(alone["final_loss"], abs=1e-4)


# Called like ssh: it drops the options and the host, and runs the rest without our variables.
AGENT = """\
#!/bin/sh
while [ "${1#-}" != "$1" ]; do shift; done
shift
exec env -i PATH="$PATH" HOME="$HOME" sh -c "$*"
"""


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("openmpi4", "[--mca, plm_rsh_agent, AGENT]"),
        ("mpich", "[-launcher, ssh, -launcher-exec, AGENT]"),
    ],
)
def test_chosen_variables_arrive_on_another_host(kind: str, arguments: str, tmp_path: Path):
    agent = tmp_path / "agent"
    agent.write_text(AGENT)
    agent.chmod(0o755)
    value = 'it\'s, "quoted";\nin two lines'
    names = ("CHOSEN", "PYTHONPATH", "SCALETRAIN_COLLECTIVE", "OTHER")
    code = f"import os; print([os.environ.get(n) for n in {names}])"
    done = scaletrain(
        "launch", "-n", "1", *by(kind)[:2], "--set", f"command={mpirun(kind)}",
        "--set", "hosts=127.0.0.2:1", "--set", f"arguments={arguments.replace('AGENT', str(agent))}",
        "--set", "environment=[CHOSEN]", "--run-dir", str(tmp_path / "run"),
        "--", "/usr/bin/env", sys.executable, "-c", code,
        env=clean(ALLOW_ROOT)
        | {"CHOSEN": value, "PYTHONPATH": "/a b", "SCALETRAIN_COLLECTIVE": "ring", "OTHER": "x"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    other = "x" if kind == "mpich" else None  # MPICH passes all variables on
    assert str([value, "/a b", "ring", other]) in done.stdout, done.stdout


@pytest.mark.parametrize("kind", ["openmpi4", "mpich"])
def test_by_hand(kind: str, alone: dict, tmp_path: Path):
    """``mpirun -n 2 scaletrain worker RUN_DIR``, also where an earlier run has left its meeting
    point in RUN_DIR.
    """
    (tmp_path / "config.yaml").write_text(
        config.load(Path(DIGITS), {"epochs": 1, "workers": 2}).to_yaml()
    )
    (tmp_path / "rendezvous.json").write_text(
        '{"job": "", "addresses": ["127.0.0.1"], "port": 9, "nonce": "old"}'
    )
    argv = [str(mpirun(kind)), "-n", "2", *command("worker", str(tmp_path))]
    done = subprocess.run(
        argv, env=clean(ALLOW_ROOT), cwd=ROOT, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert summary(tmp_path)["workers"] == 2
    assert summary(tmp_path)["final_loss"] == pytest.approx(alone["final_loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "end"),
    [
        ("openmpi5", "raise ValueError('the cause')"),
        *((kind, "os.kill(os.getpid(), 9)") for kind in KINDS),
    ],
)
def test_a_failing_rank_is_named(kind: str, end: str, tmp_path: Path):
    script, run_dir = tmp_path / "script.py", tmp_path / "run"
    script.write_text(
        "import os, time\nimport torch, torch.distributed as dist\ndist.init_process_group()\ndist.barrier()\n"
        f"if dist.get_rank() == 1:\n    {end}\ndist.barrier()\ntime.sleep(60)\n"
    )
    options = ("--set", f"command={mpirun(kind)}", "--run-dir", str(run_dir))
    done = scaletrain("launch", "-n", "3", "--launcher", "mpirun", *options, "--", str(script))
    output = done.stdout + done.stderr
    assert done.returncode == (137 if "kill" in end else 1), output
    assert output.count("scaletrain: rank ") == 1 and "scaletrain: rank 1 on" in output, output
    assert gone(run_dir)


@pytest.mark.parametrize("kind", KINDS)
def test_the_output_of_each_rank_is_kept(kind: str, tmp_path: Path):
    rank = "$OMPI_COMM_WORLD_RANK$PMI_RANK"
    script = (
        f'printf \'I am \'; echo "{rank} of:" 10%\\\\r20%; echo "  warning {rank}" >&2; printf end'
    )
    options = ("--set", f"command={mpirun(kind)}", "--run-dir", str(tmp_path), "--show", "0")
    done = scaletrain(
        "launch", "-n", "3", "--launcher", "mpirun", *options, "--", "sh", "-c", script
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for number in range(3):
        kept = (tmp_path / "logs" / f"rank-{number}.log").read_bytes()
        assert b"I am %d of: 10%%\r20%%\n" % number in kept.replace(b"end", b"")
        assert b"  warning %d\n" % number in kept
    assert "I am 0" in done.stdout and "I am 1" not in done.stdout


@pytest.mark.parametrize("kind", ["openmpi5", "mpich"])
def test_kill_9_of_the_launcher_leaves_nothing(kind: str, tmp_path: Path):
    run_dir = tmp_path / "run"
    launcher = subprocess.Popen(
        command("train", SLOW, "--run-dir", str(run_dir), "--workers", "2", *by(kind)),
        env=clean(), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until(lambda: step_of(run_dir) >= 3, "three steps")
    launcher.send_signal(signal.SIGKILL)
    launcher.wait(10)
    until(lambda: gone(run_dir), "everything is gone", 15)


@pytest.mark.parametrize("kind", KINDS)
def test_ctrl_c_leaves_a_checkpoint(kind: str, tmp_path: Path):
    """mpirun kills its workers on SIGINT; they get SIGUSR1 from it instead."""
    run_dir = tmp_path / "run"
    launcher = subprocess.Popen(
        command("train", SLOW, "--run-dir", str(run_dir), "--workers", "2", *by(kind)),
        env=clean(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until(lambda: step_of(run_dir) >= 3, "three steps")
    launcher.send_signal(signal.SIGINT)
    output, _ = launcher.communicate(timeout=40)
    assert launcher.returncode == 130, output
    assert not summary(run_dir)["finished"] and list(run_dir.glob("step-*.safetensors")), output
    assert gone(run_dir)


# What each MPI must be told to reach hosts without ssh, and to use their links.
OVER_HOSTS = {
    "openmpi4": ["--mca", "plm_rsh_agent", "AGENT", "--mca", "oob_tcp_if_include", "eth0", "--mca", "mpi_yield_when_idle", "1"],
    "openmpi5": ["--prtemca", "plm_ssh_agent", "AGENT", "--prtemca", "prte_if_include", "eth0"],
    "mpich": ["-launcher", "ssh", "-launcher-exec", "AGENT", "-iface", "eth0"],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("namespaces")
def test_four_hosts_and_a_launch_agent(kind: str, alone: dict, tmp_path: Path):
    """One process a host. The agent takes ssh's place: it drops ssh's options and runs the rest on
    the host that is named.
    """
    command_of = mpirun(kind)
    with Cluster(4, bandwidth=None) as network:
        cases = "\n".join(
            f'  {name}) exec {shlex.join(network.command(host, ["sh", "-c"]))} "$*" ;;'
            for host, name in enumerate(network.names)
        )
        agent = tmp_path / "agent"
        agent.write_text(
            '#!/bin/sh\nwhile [ "${1#-}" != "$1" ]; do shift; done\n'
            f'host=$1; shift\ncase $host in\n{cases}\n  *) echo "no host $host" >&2; exit 1 ;;\nesac\n'
        )
        agent.chmod(0o755)
        arguments = [word.replace("AGENT", str(agent)) for word in OVER_HOSTS[kind]]
        options = [
            "--set",
            "launcher.hosts=h0,h1,h2,h3",
            "--set",
            "launcher.per_host=1",
            "--set",
            f"launcher.arguments={arguments}",
        ]
        argv = command(
            "train",
            DIGITS,
            *SHORT,
            "--run-dir",
            str(tmp_path / "run"),
            "--workers",
            "4",
            "--launcher",
            "mpirun",
        )
        before = network.counters()
        argv += ["--set", f"launcher.command={command_of}", *options]
        argv = [*network.command(0, argv, {**ALLOW_ROOT, "GLOO_SOCKET_IFNAME": ""})]
        done = subprocess.run(argv, env=clean(), capture_output=True, text=True, timeout=100)
        assert done.returncode == 0, done.stdout + done.stderr
        moved = [
            now.sent_bytes - then.sent_bytes
            for now, then in zip(network.counters(), before, strict=True)
        ]
    assert summary(tmp_path / "run")["final_loss"] == pytest.approx(alone["final_loss"], abs=1e-4)
    assert min(moved) > 1_000_000, "the gradients did not cross the links"
