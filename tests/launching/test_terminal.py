"""scaletrain launch at a terminal: its options, directory and keys. Bug it catches: Ctrl-Z that
stops the prompt and leaves the workers running.
"""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.cluster.commands import ROOT, clean, command
from tests.launching.test_supervise import left, started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]


def launch(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    defaults = {"env": clean(), "cwd": ROOT, "capture_output": True, "text": True, "timeout": 40}
    return subprocess.run(command("launch", *arguments), **(defaults | options))


@pytest.mark.parametrize("separator", [[], ["--"]])
def test_options_behind_the_script_are_its_own(tmp_path: Path, separator: list[str]):
    program = ["echo", "--workers", "3", "-n", "4", "--dry-run", "--help", "--set", "a=b"]
    done = launch("--run-dir", str(tmp_path / "run"), *separator, *program)
    assert (done.returncode, done.stdout) == (0, " ".join(program[1:]) + "\n"), done.stderr


def test_an_unknown_option_before_the_script_is_a_mistake(tmp_path: Path):
    done = launch("--worker", "2", "train.py")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "--worker" in done.stderr and "--workers" in done.stderr


@pytest.mark.parametrize("arguments", [["launch", "train.py"], ["train", "job.yaml"]])
def test_a_removed_working_directory_is_one_line(tmp_path: Path, arguments: list[str]):
    argv = [str(Path(sys.executable).with_name("scaletrain")), *arguments]
    script = 'mkdir gone && cd gone && rmdir ../gone && exec "$@"'
    done = subprocess.run(
        ["sh", "-c", script, "sh", *argv],
        cwd=tmp_path, env=clean(), capture_output=True, text=True, timeout=40,
    )  # fmt: skip
    line = "the working directory has been removed (cd to one that is there)\n"
    assert done.returncode == 2 and done.stderr.endswith(line), done.stderr
    assert done.stderr.startswith("scaletrain: error: ") and done.stderr.count("\n") == 1


REDUCE = """
import os, torch, torch.distributed as dist
dist.init_process_group("gloo")
sum = torch.tensor(dist.get_rank() + 1)
dist.all_reduce(sum)
print(os.environ["MASTER_ADDR"], sum.item())
"""


def test_a_host_that_knows_ipv6_alone(tmp_path: Path):
    alone = "ip link set lo up && ip addr del 127.0.0.1/8 dev lo"
    if subprocess.run(["unshare", "-n", "sh", "-c", alone], capture_output=True).returncode:
        pytest.skip("needs the right to make network namespaces (root) and ip (iproute2)")
    (tmp_path / "reduce.py").write_text(REDUCE)
    argv = command("launch", "-n", "2", "--run-dir", str(tmp_path), str(tmp_path / "reduce.py"))
    done = subprocess.run(
        ["unshare", "-n", "sh", "-c", f'{alone} && exec "$@"', "sh", *argv],
        env=clean(), cwd=ROOT, capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert done.returncode == 0 and done.stdout.count("::1 3") == 2, done.stdout + done.stderr


COUNTS = """
import subprocess
here = os.environ["RUN_DIR"]
code = f"import time\\nfor i in range(60): open('{here}/helper', 'a').write('.'); time.sleep(0.1)"
helper = subprocess.Popen([sys.executable, "-c", code], env={}, start_new_session=True)
Path(here, f"ready-{rank}").touch()
helper.wait()
print("through")
"""


def is_stopped(pid: int) -> bool:
    return psutil.Process(pid).status() == psutil.STATUS_STOPPED


def test_ctrl_z_stops_workers_and_their_helpers_and_fg_continues_them(tmp_path: Path):
    # As a shell starts its jobs: the kernel stops no group whose members all have a foreign parent.
    launcher, job = started(tmp_path, COUNTS, workers=2, process_group=0)
    launcher.send_signal(signal.SIGTSTP)
    until = time.monotonic() + 5
    while not is_stopped(launcher.pid):
        assert time.monotonic() < until, "it did not stop"
        time.sleep(0.02)
    assert all(is_stopped(pid) for pid in left(str(job.run_dir)))
    counted = (job.run_dir / "helper").stat().st_size
    time.sleep(1)
    assert (job.run_dir / "helper").stat().st_size == counted
    launcher.send_signal(signal.SIGCONT)
    output, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 0 and output.count("through") == 2, output


@pytest.mark.parametrize("after_s", [0.06, 0.1, 0.15, 0.2, 0.3, 0.45, 0.6])
def test_ctrl_c_in_the_first_second_is_one_line(tmp_path: Path, after_s: float):
    # From the first line of ours on: what Python itself does before is beyond us.
    program = f"import sys; print('here', flush=True); sys.argv = {command('launch')[2:]!r} + "
    program += f"['--run-dir', {str(tmp_path / 'run')!r}, '--', 'sleep', '50']; "
    program += "from scaletrain.cli import main; main()"
    launcher = subprocess.Popen(
        [sys.executable, "-c", program],
        env=clean(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert launcher.stdout
    launcher.stdout.readline()
    time.sleep(after_s)
    launcher.send_signal(signal.SIGINT)
    _, errors = launcher.communicate(timeout=20)
    lines = [line for line in errors.splitlines() if line.startswith("scaletrain:")]
    assert launcher.returncode == 130, errors
    assert lines == ["scaletrain: stopped by SIGINT"], errors
    assert "Traceback" not in errors
