"""launching/supervision: exit statuses and signals. Bug it catches: a failure that becomes success,
because the shell ignores SIGCHLD or a worker handles SIGTERM.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaletrain.launching.job import Program
from tests.cluster.commands import ROOT, clean, command
from tests.launching.test_supervise import carry_out, gone_within, job_of, started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]

LAUNCH = command("launch", "-n", "2", "--run-dir")


IGNORES_SIGCHLD = "signal.signal(signal.SIGCHLD, signal.SIG_IGN)"
IGNORES_MANY = "[signal.signal(n, signal.SIG_IGN) for n in (10, 12, 14, 15, 17)]"
BLOCKS_MANY = "signal.pthread_sigmask(signal.SIG_BLOCK, [10, 12, 14, 15, 17])"


def launched(tmp_path: Path, before: str, *program: str) -> subprocess.CompletedProcess[str]:
    """Launch a program from a process that has done something about its signals."""
    starter = f"import os, signal, sys; {before}; os.execv(sys.argv[1], sys.argv[1:])"
    argv = [*LAUNCH, str(tmp_path / "run"), "--", *program]
    return subprocess.run(
        [sys.executable, "-c", starter, *argv],
        env=clean(), cwd=ROOT, capture_output=True, text=True, timeout=40,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("program", "status"),
    [
        (("sh", "-c", "exit 3"), 3),
        (("sh", "-c", "kill -9 $$"), 137),
        (("/no/such/program",), 2),
        (("true",), 0),
    ],
    ids=["status", "kill -9", "missing", "success"],
)
def test_a_shell_that_ignores_sigchld_sees_the_status(
    tmp_path: Path, program: tuple[str, ...], status: int
):
    done = launched(tmp_path, IGNORES_SIGCHLD, *program)
    assert done.returncode == status, done.stdout + done.stderr


def test_a_caller_that_reaps_all_children_sees_the_status(tmp_path: Path):
    plan, job = job_of(tmp_path, "raise SystemExit(3)", workers=1)
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        status, _ = carry_out(plan, job)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert status == 3


SHOW = (
    "import signal as s; print(sorted(s.Signals(n).name for n in s.valid_signals()"
    " if s.getsignal(n) == s.SIG_IGN and n not in (s.SIGPIPE, s.SIGXFSZ)),"
    " s.pthread_sigmask(s.SIG_BLOCK, []))"
)


@pytest.mark.parametrize("before", [IGNORES_MANY, BLOCKS_MANY], ids=["ignored", "blocked"])
def test_workers_start_with_the_usual_signals(tmp_path: Path, before: str):
    done = launched(tmp_path, before, sys.executable, "-c", SHOW)
    assert done.stdout.count("[] set()") == 2, done.stdout + done.stderr


@pytest.mark.parametrize("ignored", ["INT", "HUP"])
def test_a_background_job_ends_neither_by_ctrl_c_nor_under_nohup(tmp_path: Path, ignored: str):
    argv = [*LAUNCH, str(tmp_path / "run"), "--", "sh", "-c", "sleep 3; echo through"]
    launcher = subprocess.Popen(
        ["sh", "-c", f"trap '' {ignored}; exec \"$@\"", "sh", *argv],
        env=clean(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    for _ in range(20):
        time.sleep(0.1)
        launcher.send_signal(signal.Signals[f"SIG{ignored}"])
    output, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 0 and output.count("through") == 2, output


WAITS_FOR_A_SIGNAL = """
heard = []
for n in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(n, lambda n, frame: heard.append(n))
Path(os.environ["RUN_DIR"], f"ready-{rank}").touch()
while not heard:
    time.sleep(0.01)
"""


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 0)],
    ids=["INT", "TERM", "USR1"],
)
def test_a_stopped_job_is_no_success_even_if_its_workers_say_so(
    tmp_path: Path, number: signal.Signals, status: int
):
    launcher, job = started(tmp_path, WAITS_FOR_A_SIGNAL)
    launcher.send_signal(number)
    output, _ = launcher.communicate(timeout=20)
    assert launcher.returncode == status and f"stopped by {number.name}" in output
    assert gone_within(job, 1)


def test_a_training_run_that_had_finished_when_it_was_stopped_is_a_success(tmp_path: Path):
    body = f"""
    ended = []
    signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
    report(1)
    Path(os.environ["RUN_DIR"], "summary.json").write_text('{{"finished": true}}')
    os.kill({os.getpid()}, signal.SIGTERM)
    while not ended:
        time.sleep(0.01)
    """
    plan, job = job_of(tmp_path, body, workers=1)
    status, output = carry_out(plan, job._replace(program=Program.TRAINING))
    assert status == 0 and "stopped by SIGTERM, when it had finished" in output, output


GOES_ON_AFTER_A_SIGNAL = """
heard = []
signal.signal(signal.SIGUSR2, lambda n, frame: heard.append(n))
Path(os.environ["RUN_DIR"], f"ready-{rank}").touch()
while not heard:
    time.sleep(0.01)
print("went on")
"""


def test_sigusr2_reaches_a_script_and_stops_nothing(tmp_path: Path):
    launcher, job = started(tmp_path, GOES_ON_AFTER_A_SIGNAL)
    launcher.send_signal(signal.SIGUSR2)
    output, _ = launcher.communicate(timeout=20)
    assert launcher.returncode == 0 and output.count("went on") == 3, output
    assert "stopped" not in output and gone_within(job, 1)
