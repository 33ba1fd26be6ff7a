"""launching/supervision: processes that workers leave behind. Bug it catches: a helper that cleared
its environment, or left its group and session, and holds a GPU for days.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from scaletrain.host import descendants
from tests.cluster.commands import ROOT, clean, command
from tests.launching.test_supervise import carry_out, job_of, started

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]

SLEEP = "import time; time.sleep(77)"
# Ways in which a helper hides. Each writes its process id to RUN_DIR/helper-<way>.
HIDES = {
    "cleared environment": "subprocess.Popen([sys.executable, '-c', CODE], env={})",
    "own session": "subprocess.Popen([sys.executable, '-c', CODE], env={}, start_new_session=True)",
    "env -i": "subprocess.Popen(['env', '-i', 'setsid', sys.executable, '-c', CODE])",
    "double fork": "double_fork()",
    "ignores SIGTERM": (
        "subprocess.Popen([sys.executable, '-c',"
        " 'import signal; signal.signal(15, signal.SIG_IGN);' + CODE], env={}, process_group=0)"
    ),
}
LEAVE = """
import subprocess
here = os.environ["RUN_DIR"]
CODE = f"import os; open('{here}/helper-' + str(os.getpid()), 'w');" + "SLEEP"
def double_fork():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execve(sys.executable, ["trainer: idle", "-c", CODE], {})
        os._exit(0)
    os.wait()
HELPERS
while len(list(Path(here).glob("helper-*"))) < COUNT:
    time.sleep(0.02)
END
"""


def leaving(end: str, ways: list[str]) -> str:
    helpers = "\n".join(HIDES[way] for way in ways)
    text = LEAVE.replace("HELPERS", helpers).replace("COUNT", str(len(ways)))
    return text.replace("END", end).replace('"SLEEP"', f'"{SLEEP}"')


def survivors(run_dir: Path) -> list[int]:
    pids = [int(path.name.removeprefix("helper-")) for path in run_dir.glob("helper-*")]
    assert pids, "no helper has started"
    return [pid for pid in pids if psutil.pid_exists(pid)]


@pytest.mark.parametrize(
    ("end", "expected"),
    [("", 0), ("raise ValueError('the cause')", 1), ("os.kill(os.getpid(), 9)", 137)],
    ids=["success", "failure", "kill -9"],
)
def test_no_helper_survives_whatever_it_did(tmp_path: Path, end: str, expected: int):
    plan, job = job_of(tmp_path, leaving(end, list(HIDES)), workers=1, timeout_s=2.0)
    status, output = carry_out(plan, job)
    assert status == expected, output
    assert survivors(job.run_dir) == []
    assert "ended what was left running: " in output and " more" in output, output


def test_no_helper_survives_a_killed_supervisor(tmp_path: Path):
    ready = 'Path(here, f"ready-{rank}").touch(); time.sleep(100)'
    launcher, job = started(tmp_path, leaving(ready, ["own session", "double fork"]), workers=1)
    (supervisor,) = psutil.Process(launcher.pid).children()
    supervisor.kill()
    assert launcher.wait(20) == 137
    assert launcher.stdout
    launcher.stdout.close()
    assert survivors(job.run_dir) == []


def test_an_upload_that_a_finished_rank_left_gets_time(tmp_path: Path):
    body = """
    import subprocess
    code = "import time; time.sleep(2.5); print('uploaded')"
    Path(os.environ["RUN_DIR"], "upload.py").write_text(code)
    subprocess.Popen([sys.executable, os.environ["RUN_DIR"] + "/upload.py", "--token=secret"],
        env={}, start_new_session=True)
    """
    status, output = carry_out(*job_of(tmp_path, body, workers=1))
    assert status == 0 and "uploaded" in output, output
    assert "left running: python" in output and "upload.py (process" in output, output
    assert "ended after 30 s" in output and "secret" not in output, output
    assert "ended what was left" not in output, output


def test_an_upload_has_its_time_after_a_pause_of_the_whole_job(tmp_path: Path):
    body = """
    import subprocess
    here = os.environ["RUN_DIR"]
    code = (
        "import pathlib, time\\nfor i in range(15): time.sleep(0.1)\\n"
        f"pathlib.Path({here + '/uploaded'!r}).touch()"
    )
    subprocess.Popen([sys.executable, "-c", code], env={}, start_new_session=True)
    Path(here, f"ready-{rank}").touch()
    """
    launcher, job = started(tmp_path, body, workers=1, timeout_s=3.0)
    time.sleep(0.5)
    family = psutil.Process(launcher.pid).children(recursive=True)
    for process in family:
        process.suspend()
    time.sleep(5)
    for process in family:
        process.resume()
    output, _ = launcher.communicate(timeout=30)
    assert launcher.returncode == 0 and (job.run_dir / "uploaded").exists(), output


def test_an_interrupt_ends_the_wait_for_an_upload(tmp_path: Path):
    ready = 'Path(here, f"ready-{rank}").touch()'
    launcher, job = started(tmp_path, leaving(ready, ["own session"]), workers=1)
    time.sleep(2)
    began = time.monotonic()
    launcher.send_signal(signal.SIGINT)
    output, _ = launcher.communicate(timeout=20)
    assert launcher.returncode == 0 and time.monotonic() - began < 8, output
    assert survivors(job.run_dir) == []


def test_children_that_the_supervisor_adopts_are_reaped(tmp_path: Path):
    body = """
    import subprocess
    for _ in range(20):
        subprocess.run(["sh", "-c", "true & true & exit 0"])
    time.sleep(1)
    parent = os.getppid()
    fields = [p.read_text().rpartition(")")[2].split() for p in Path("/proc").glob("[0-9]*/stat")]
    print("zombies", len([f for f in fields if f[0] == "Z" and int(f[1]) == parent]))
    """
    status, output = carry_out(*job_of(tmp_path, body, workers=1))
    assert (status, output) == (0, "zombies 0")


PROCESS_1 = """
import os, subprocess, sys, time
from pathlib import Path
from scaletrain.host import init
init.stay_behind()
if os.fork() == 0:
    for _ in range(9):
        if os.fork() == 0:
            os._exit(0)
    os._exit(0)
time.sleep(0.5)
zombies = [p for p in Path("/proc").glob("[0-9]*/stat") if ") Z 1 " in p.read_text()]
print(os.getpid() != 1, len(zombies), flush=True)
os.kill(os.getpid(), int(sys.argv[1])) if sys.argv[1] != "0" else sys.exit(3)
"""


def in_a_container(*argv: str) -> subprocess.CompletedProcess[str]:
    unshare = ["unshare", "--pid", "--fork", "--mount-proc"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("needs the right to make process namespaces (root)")
    return subprocess.run(
        [*unshare, *argv], env=clean(), cwd=ROOT, capture_output=True, text=True, timeout=40
    )


@pytest.mark.parametrize(("number", "status"), [("0", 3), ("15", 143)])
def test_process_1_reaps_orphans_and_keeps_the_status(number: str, status: int):
    done = in_a_container(sys.executable, "-c", PROCESS_1, number)
    assert (done.stdout, done.returncode) == ("True 0\n", status), done.stderr


WAITS_AS_PROCESS_1 = """
import signal, sys
from scaletrain.host import init
init.stay_behind()
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
print("up", flush=True)
signal.pause()
"""


def test_process_1_passes_signals_on():
    assert in_a_container("true").returncode == 0
    argv = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", WAITS_AS_PROCESS_1]
    container = subprocess.Popen(argv, env=clean(), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert container.stdout and container.stdout.readline() == "up\n"
    (first,) = psutil.Process(container.pid).children()
    first.send_signal(signal.SIGTERM)
    assert container.wait(20) == 5
    container.stdout.close()


def test_launching_works_as_process_1(tmp_path: Path):
    launch = command("launch", "--run-dir", str(tmp_path / "run"), "--", "sh", "-c", "exit 4")
    assert in_a_container(*launch).returncode == 4


def test_a_description_shows_no_secret():
    with subprocess.Popen(["sleep", "--", "9"], env={}) as process:
        time.sleep(0.1)
        assert descendants.describe(process.pid) == f"sleep (process {process.pid})"
        process.kill()
    assert descendants.describe(os.getpid()).startswith("python")
