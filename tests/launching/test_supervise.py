"""launching/supervision: is the first cause named, and is everything really gone? The workers need
no torch.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from scaletrain.host.processes import oom_kills
from scaletrain.launching.job import Companion, Job, Program
from scaletrain.launching.plan import Command, LaunchPlan
from scaletrain.launching.supervision import hangs, supervise

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]

WORKER = """
import os, signal, sys, time
from pathlib import Path
from scaletrain.errors import UserError
from scaletrain.run import progress
from scaletrain.world import World

world = World.from_env()
rank = world.rank
with progress.reporting(Path(os.environ["RUN_DIR"]), world) as report:
    {body}
"""


def job_of(tmp_path: Path, body: str, workers: int = 3, **fields) -> tuple[LaunchPlan, Job]:
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(body=textwrap.indent(textwrap.dedent(body), "    ").strip()))
    run_dir = tmp_path / "run"
    argv = (sys.executable, str(script))
    commands = tuple(
        Command(
            f"rank {r}",
            argv,
            (("RANK", str(r)), ("WORLD_SIZE", str(workers)), ("RUN_DIR", str(run_dir))),
            r,
        )
        for r in range(workers)
    )
    return LaunchPlan(commands), Job(argv, workers, run_dir, **{"timeout_s": 30.0, **fields})


def carry_out(plan: LaunchPlan, job: Job) -> tuple[int, str]:
    lines: list[str] = []
    status = supervise.run(plan, job, lambda line, error: lines.append(line))
    assert left(str(job.run_dir)) == [], "a process survived"
    return status, "\n".join(lines)


def left(text: str) -> list[int]:
    """The processes whose environment says that they belong to this run directory."""
    found = []
    for process in psutil.process_iter():
        try:
            if (
                text in process.environ().get("RUN_DIR", "")
                and process.status() != psutil.STATUS_ZOMBIE
            ):
                found.append(process.pid)
        except (psutil.Error, OSError):
            continue
    return found


def cause(job: Job) -> dict:
    return json.loads((job.run_dir / "failure.json").read_text())


def test_all_well(tmp_path: Path):
    plan, job = job_of(tmp_path, "print('hello from', rank); report(1)")
    status, output = carry_out(plan, job)
    assert status == 0
    assert sorted(output.splitlines()) == [f"[rank {r}] hello from {r}" for r in range(3)]
    assert not (job.run_dir / "failure.json").exists()


def test_an_exception_is_shown_once_and_consequences_are_not(tmp_path: Path):
    plan, job = job_of(
        tmp_path,
        """
        report(7)
        if rank == 1:
            time.sleep(0.5)  # the others fail first: they only lost their peer
            progress.entering("allreduce 4 MB")
            raise ValueError("the cause")
        if rank == 0:
            raise RuntimeError("[gloo/transport/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:1")
        time.sleep(60)
        """,
    )
    began = time.monotonic()
    status, output = carry_out(plan, job)
    assert status == 1 and time.monotonic() - began < 10
    assert (
        output.count("ValueError: the cause") == 2
    )  # the headline, and the last line of the traceback
    assert "rank 1 on" in output and "after 7 steps" in output and 'worker.py", line' in output
    assert "Connection closed" not in output
    assert "last collective: allreduce 4 MB #1" in output
    assert cause(job)["rank"] == 1 and cause(job)["step"] == 7
    assert left(str(job.run_dir)) == []


def test_a_killed_worker_is_named(tmp_path: Path):
    body = """
    report(3)
    if rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)
    raise ConnectionResetError("lost rank 2")
    """
    plan, job = job_of(tmp_path, body)
    status, output = carry_out(plan, job)
    assert status == 128 + signal.SIGKILL
    assert "rank 2" in output and "SIGKILL" in output and "lost rank 2" not in output
    evidence = "see dmesg" if oom_kills() is None else "memory did not run out"
    assert evidence in output, output
    assert cause(job)["rank"] == 2 and cause(job)["step"] == 3 and cause(job)["kind"] == "signal"


def test_a_persons_mistake_is_one_line(tmp_path: Path):
    plan, job = job_of(tmp_path, "raise UserError('device: cuda is not there')")
    status, output = carry_out(plan, job)
    assert status == 2
    lines = [line for line in output.splitlines() if "stopped because" not in line]
    assert len(lines) == 1 and "device: cuda is not there" in lines[0], output


@pytest.mark.parametrize("how", ["sleep", "stop"])
def test_a_hang_is_named_with_its_stack(tmp_path: Path, how: str):
    body = """
    report(1)
    progress.entering("allreduce")
    if rank == 1:
        def stuck_in_here():
            HOW
        stuck_in_here()
    progress.entering("allreduce")
    time.sleep(100)
    """.replace(
        "HOW", "time.sleep(100)" if how == "sleep" else "os.kill(os.getpid(), signal.SIGSTOP)"
    )
    plan, job = job_of(tmp_path, body, timeout_s=2.0)
    began = time.monotonic()
    status, output = carry_out(plan, job)
    assert status == hangs.HUNG_STATUS and time.monotonic() - began < 12
    assert cause(job)["rank"] == 1 and cause(job)["kind"] == "hang"
    assert "never entered allreduce #2" in output and "ranks 0, 2" in output
    assert ("stuck_in_here" in output) if how == "sleep" else ("SIGSTOP" in output)


def test_a_job_that_is_stopped_as_a_whole_and_goes_on_is_no_hang(tmp_path: Path):
    body = """
    for i in range(40):
        report(i)
        if i == 5:
            Path(os.environ["RUN_DIR"], f"ready-{rank}").touch()
        time.sleep(0.2)
    """
    launcher, job = started(tmp_path, body, timeout_s=3.0)
    pids = left(str(job.run_dir))
    (supervisor,) = psutil.Process(launcher.pid).children()
    for pid in [supervisor.pid, *pids]:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(6)
    for pid in [supervisor.pid, *pids]:  # the supervisor looks first
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.3)
    output, _ = launcher.communicate(timeout=40)
    assert launcher.returncode == 0, output


def test_the_traceback_of_a_host_whose_clock_is_behind_is_shown(tmp_path: Path):
    body = """
    now = time.time
    time.time = lambda: now() - 100
    report(1)
    raise ValueError("the cause")
    """
    status, output = carry_out(*job_of(tmp_path, body, workers=2))
    assert status == 1 and "ValueError: the cause" in output, output


def test_a_killed_rank_is_named_though_the_clock_of_another_host_is_behind(tmp_path: Path):
    """Bug it catches: all failures of that host seem to come first, also the consequences."""
    body = """
    report(1)
    if rank == 1:
        time.sleep(1.5)
        os.kill(os.getpid(), signal.SIGKILL)
    now = time.time
    time.time = lambda: now() - 100
    report(2)
    time.sleep(2.5)
    raise ConnectionResetError("lost rank 1")
    """
    plan, job = job_of(tmp_path, body, workers=2)
    worker = shlex.join(plan.commands[0].argv)
    script = f"SCALETRAIN_HOST=other RANK=0 {worker} & RANK=1 {worker}; wait $!; exit 1"
    launcher = plan.commands[0]._replace(name="starter", argv=("sh", "-c", script), rank=None)
    status, output = carry_out(plan._replace(commands=(launcher,)), job)
    assert status == 137 and cause(job)["rank"] == 1, output
    assert "lost rank 1" not in output


def test_reports_that_are_read_late_keep_their_order(tmp_path: Path):
    """Bug it catches: all seem to come when somebody looks at last, and the lowest rank first."""
    body = """
    report(1)
    time.sleep(0 if rank == 1 else 1)
    raise ValueError(f"of rank {rank}")
    """
    plan, job = job_of(tmp_path, body, workers=2)
    worker = shlex.join(plan.commands[0].argv)
    script = f"RANK=0 {worker} & RANK=1 {worker}; wait; sleep 7; exit 1"
    launcher = plan.commands[0]._replace(
        name="starter", argv=("sh", "-c", script), rank=None, restarts_workers=True
    )
    status, output = carry_out(plan._replace(commands=(launcher,)), job)
    assert status == 1 and cause(job)["rank"] == 1, output


def test_a_slow_worker_that_reports_is_no_hang(tmp_path: Path):
    body = """
    for i in range(8):
        time.sleep(0.5)
        report(i)
    """
    plan, job = job_of(tmp_path, body, workers=1, timeout_s=2.0)
    assert carry_out(plan, job)[0] == 0


def test_workers_that_are_done_early_may_wait_for_a_slow_one(tmp_path: Path):
    body = """
    for i in range(8):
        time.sleep(0.5 if rank == 0 else 0)
        report(i)
    while not Path(os.environ["RUN_DIR"], "slow-is-done").exists():
        Path(os.environ["RUN_DIR"], "slow-is-done").touch() if rank == 0 else time.sleep(0.05)
    """
    plan, job = job_of(tmp_path, body, workers=2, timeout_s=2.0)
    assert carry_out(plan, job)[0] == 0


def test_the_job_goes_on_while_enough_workers_live(tmp_path: Path):
    body = """
    if rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)
    print("done", rank)
    """
    plan, job = job_of(tmp_path, body, min_workers=2)
    status, output = carry_out(plan, job)
    assert status == 0, output
    assert (
        "goes on with 2 of 3" in output
        and "[rank 1] done 1" in output
        and "[rank 2] done 2" in output
    )
    plan, job = job_of(tmp_path, body, min_workers=3)
    assert carry_out(plan, job)[0] == 137


@pytest.mark.parametrize("how", ["while they train", "after they have finished"])
def test_the_job_goes_on_without_a_worker_that_is_stopped(tmp_path: Path, how: str):
    steps = 60 if how == "while they train" else 1
    body = f"""
    report(0)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    for step in range({steps}):
        time.sleep(0.1)
        report(step + 1)
    """
    plan, job = job_of(tmp_path, body, timeout_s=2.0, min_workers=2)
    status, output = carry_out(plan, job)
    assert status == 0, output
    assert "rank 1" in output and "stopped (SIGSTOP)" in output and "it is ended" in output
    assert "goes on with 2 of 3" in output


def test_a_companion_is_started_again_as_often_as_allowed(tmp_path: Path):
    plan, job = job_of(tmp_path, "time.sleep(60)", workers=1)
    server = Companion("server 0", (sys.executable, "-c", "import sys; sys.exit(3)"), restarts=2)
    status, output = carry_out(plan._replace(companions=(server,)), job)
    assert status == 3
    assert "started again (2 of 2)" in output and "(3 of" not in output
    assert "server 0 ended with status 3" in output


def test_companions_end_after_the_workers(tmp_path: Path):
    serve = "import signal, sys, time; signal.signal(15, lambda *a: (print('served', flush=True), sys.exit())); time.sleep(60)"
    plan, job = job_of(tmp_path, "time.sleep(1); print('worked')", workers=1)
    status, output = carry_out(
        plan._replace(companions=(Companion("server 0", (sys.executable, "-c", serve)),)), job
    )
    assert status == 0
    assert output.splitlines() == ["[rank 0] worked", "[server 0] served"]


def test_a_companions_mistake_is_told_once_and_alone(tmp_path: Path):
    plan, job = job_of(tmp_path, "time.sleep(60)")
    serve = "import sys; print('scaletrain: error: launcher.latency: no netem', file=sys.stderr); sys.exit(2)"
    status, output = carry_out(
        plan._replace(companions=(Companion("rehearsal", (sys.executable, "-c", serve)),)), job
    )
    assert (status, output) == (2, "[rehearsal] scaletrain: error: launcher.latency: no netem")
    assert cause(job)["message"] == "launcher.latency: no netem"


def test_a_slow_start_is_told_in_a_few_lines(tmp_path: Path):
    body = """
    if rank == 0:
        progress.alive("joining")
    time.sleep(6)
    report(1)
    time.sleep(5)
    """
    plan, job = job_of(tmp_path, body, workers=2)
    status, output = carry_out(plan, job._replace(program=Program.TRAINING))
    assert status == 0 and output == "scaletrain: starting: 1 of 2 workers have joined (3 s)", (
        output
    )


def test_a_command_that_is_not_there(tmp_path: Path):
    plan = LaunchPlan((Command("rank 0", ("/no/such/program",), rank=0),))
    status, output = carry_out(plan, Job(("/no/such/program",), 1, tmp_path / "run"))
    assert status == 2 and "/no/such/program" in output


# Kills: the launcher itself runs in a process of its own

LAUNCH = """
import sys
from pathlib import PosixPath
from scaletrain.launching.job import Companion, Job, Program
from scaletrain.launching.plan import Command, LaunchPlan
from scaletrain.launching.supervision.supervise import run
sys.exit(run(*eval(sys.argv[1])))
"""
# Each worker also starts a process of its own, in a session of its own: such as a data loader that
# was not waited for.
STUBBORN = """
import subprocess
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"], start_new_session=True)
Path(os.environ["RUN_DIR"], f"ready-{rank}").touch()
time.sleep(100)
"""


def started(
    tmp_path: Path, body: str, process_group: int = -1, **fields
) -> tuple[subprocess.Popen, Job]:
    plan, job = job_of(tmp_path, body, **fields)
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, repr((plan, job))],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=process_group,
    )
    until = time.monotonic() + 20
    while len(list(job.run_dir.glob("ready-*"))) < job.workers:
        assert time.monotonic() < until and launcher.poll() is None, "the workers did not start"
        time.sleep(0.05)
    return launcher, job


def gone_within(job: Job, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not left(str(job.run_dir)):
            return True
        time.sleep(0.1)
    return False


@pytest.mark.parametrize("victim", ["launcher", "supervisor", "both"])
def test_nothing_survives_kill_9(tmp_path: Path, victim: str):
    body = (
        STUBBORN
        if victim != "both"
        else STUBBORN.replace("start_new_session=True", "preexec_fn=None").replace("child =", "#")
    )
    launcher, job = started(tmp_path, body)
    watcher = next(
        p for p in psutil.Process(launcher.pid).children() if "supervisor" in " ".join(p.cmdline())
    )
    assert len(left(str(job.run_dir))) >= 3
    if victim in ("launcher", "both"):
        launcher.kill()
    if victim in ("supervisor", "both"):
        watcher.kill()
    assert gone_within(job, 10), psutil.Process(left(str(job.run_dir))[0]).cmdline()
    assert launcher.wait(10) != 0
    launcher.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_lets_workers_end_in_good_order(tmp_path: Path, number: signal.Signals):
    body = """
    heard = []
    for n in (signal.SIGINT, signal.SIGTERM):
        signal.signal(n, lambda n, frame: heard.append(n))
    Path(os.environ["RUN_DIR"], f"ready-{rank}").touch()
    while not heard:
        time.sleep(0.01)
    time.sleep(1)
    Path(os.environ["RUN_DIR"], f"checkpoint-{rank}").touch()
    raise SystemExit(128 + heard[0])
    """
    launcher, job = started(tmp_path, body)
    launcher.send_signal(number)
    output, _ = launcher.communicate(timeout=20)
    assert launcher.returncode == 128 + number
    assert "Traceback" not in output and f"stopped by {number.name}" in output
    assert len(list(job.run_dir.glob("checkpoint-*"))) == 3
    assert gone_within(job, 1)


@pytest.mark.parametrize("after_s", [0.05, 0.15, 0.3])
def test_an_interrupt_while_the_supervisor_starts_is_no_traceback(tmp_path: Path, after_s: float):
    plan, job = job_of(tmp_path, "time.sleep(100)")
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, repr((plan, job))],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert launcher.stdout
    until = time.monotonic() + 20
    while not (watchers := psutil.Process(launcher.pid).children()):
        assert time.monotonic() < until, "the supervisor did not start"
    time.sleep(after_s)
    launcher.send_signal(signal.SIGINT)
    output, _ = launcher.communicate(timeout=20)
    # The workers are programs of the test: what an interrupt meets in their own start is theirs to
    # show.
    own = "\n".join(line for line in output.splitlines() if not line.startswith("[rank "))
    assert launcher.returncode == 128 + signal.SIGINT and "Traceback" not in own, output
    assert gone_within(job, 1) and not watchers[0].is_running()


def test_a_second_interrupt_ends_at_once(tmp_path: Path):
    launcher, job = started(tmp_path, STUBBORN.replace("SIGTERM", "SIGINT"))
    launcher.send_signal(signal.SIGINT)
    time.sleep(0.5)
    began = time.monotonic()
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(20) == 128 + signal.SIGINT
    assert time.monotonic() - began < 8
    assert gone_within(job, 1)
    launcher.stdout.close()
