"""launching/supervision/ends.py: a worker that has ended, and whose process runs on. Bug it
catches: a job that waits for ever while its traceback lies in a file.
"""

import subprocess
import time
from pathlib import Path

import pytest

from scaletrain.launching.job import script_job
from tests.cluster.commands import clean
from tests.launching.test_supervise import carry_out, cause, job_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]

# What keeps a Python process when its script has ended.
KEEPERS = {
    "thread": "import threading; threading.Thread(target=time.sleep, args=(100,), name='up').start()",
    "child": (
        "import multiprocessing as mp; c = mp.get_context('fork')\n"
        "c.Process(target=time.sleep, args=(100,), name='loader').start()"
    ),
    "queue": (
        "import multiprocessing as mp; q = mp.get_context('fork').Queue()\nq.put(b'x' * 1_000_000)"
    ),
    "exit handler": "import atexit; atexit.register(time.sleep, 100)",
}
NAMES = {
    "thread": "thread 'up'",
    "child": "child process 'loader'",
    "queue": "a multiprocessing queue that nobody reads",
    "exit handler": "an exit handler, perhaps",
}


def body(keeper: str, end: str) -> str:
    lines = "\n".join(f"    {line}" for line in KEEPERS[keeper].splitlines())
    return f"report(4)\nif rank == 1:\n{lines}\n    {end}\ntime.sleep(WAIT)"


@pytest.mark.parametrize("keeper", list(KEEPERS))
def test_a_reported_failure_ends_the_job_whatever_keeps_the_process(tmp_path: Path, keeper: str):
    raising = body(keeper, "raise ValueError('the cause')").replace("WAIT", "100")
    plan, job = job_of(tmp_path, raising, workers=2)
    began = time.monotonic()
    status, output = carry_out(plan, job)
    assert status == 1 and time.monotonic() - began < 20, output
    assert "ValueError: the cause" in output and "rank 1 on" in output
    assert f"rank 1 has failed but runs on ({NAMES[keeper]})" in output, output
    assert cause(job)["kind"] == "exception" and cause(job)["rank"] == 1


def test_a_status_of_its_own_holds_if_the_process_runs_on(tmp_path: Path):
    exiting = body("thread", "sys.exit(9)").replace("WAIT", "100")
    status, output = carry_out(*job_of(tmp_path, exiting, workers=2))
    assert status == 9 and "rank 1 on" in output and "ended with status 9" in output, output


def test_a_job_without_that_rank_goes_on(tmp_path: Path):
    raising = body("thread", "raise ValueError('the cause')").replace("WAIT", "8")
    plan, job = job_of(tmp_path, raising, workers=2, min_workers=1)
    status, output = carry_out(plan, job)
    assert status == 0 and "goes on with 1 of 2" in output and "the cause" in output, output


def test_success_that_cannot_end_stays_success(tmp_path: Path):
    ending = body("thread", "sys.exit()").replace("WAIT", "0")
    plan, job = job_of(tmp_path, ending, workers=2, timeout_s=2.0)
    began = time.monotonic()
    status, output = carry_out(plan, job)
    assert status == 0 and 2 < time.monotonic() - began < 15, output
    assert "rank 1 has finished but runs on (thread 'up')" in output, output


def test_a_finished_rank_may_serve_those_that_work(tmp_path: Path):
    serving = """
    if rank == 1:
        import threading
        def serve():
            while not Path(os.environ["RUN_DIR"], "done").exists():
                time.sleep(0.05)
            print("served", flush=True)
        threading.Thread(target=serve).start()
        raise SystemExit
    for i in range(16):
        time.sleep(0.5)
        report(i)
    Path(os.environ["RUN_DIR"], "done").touch()
    """
    status, output = carry_out(*job_of(tmp_path, serving, workers=2, timeout_s=3.0))
    assert (status, output) == (0, "[rank 1] served")


def test_a_launcher_that_does_not_end_after_its_workers_is_ended(tmp_path: Path):
    plan, job = job_of(tmp_path, "report(1)", workers=1, timeout_s=2.0)
    worker = plan.commands[0]
    script = f"{worker.argv[0]} {worker.argv[1]}; sleep 100"
    launcher = worker._replace(name="starter", argv=("sh", "-c", script), rank=None)
    status, output = carry_out(plan._replace(commands=(launcher,)), job)
    assert status == 0 and "starter runs on after all its workers have finished" in output, output


def test_a_launcher_that_starts_workers_again_is_left_alone(tmp_path: Path):
    plan, job = job_of(tmp_path, "report(1)", workers=1, timeout_s=1.0)
    worker = plan.commands[0]
    script = f"{worker.argv[0]} {worker.argv[1]}; sleep 4"
    launcher = worker._replace(
        name="starter", argv=("sh", "-c", script), rank=None, restarts_workers=True
    )
    began = time.monotonic()
    assert carry_out(plan._replace(commands=(launcher,)), job) == (0, "")
    assert time.monotonic() - began > 4


@pytest.mark.parametrize("keeper", ["thread", "queue", "exit handler"])
def test_a_failed_rank_of_another_launcher_ends_itself(tmp_path: Path, keeper: str):
    """Such as srun, which would wait for it for ever. Nobody of ours looks after it there."""
    script = tmp_path / "keeps.py"
    script.write_text(f"import sys, time\n{KEEPERS[keeper]}\nsys.exit(9)\n")
    place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    done = subprocess.run(
        script_job([str(script)], 1, tmp_path / "run").argv,
        env=clean(place), capture_output=True, text=True, timeout=40,
    )  # fmt: skip
    assert done.returncode == 9, done.stderr
    assert f"this rank has failed but runs on ({NAMES[keeper]}): it ends itself" in done.stderr
