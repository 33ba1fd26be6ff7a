"""launching/supervision/hangs.py: is there a hang, and which rank is named? Bug it catches: a
victim that is blamed.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaletrain.launching.supervision import hangs
from scaletrain.run import progress
from scaletrain.run.layout import RunDir
from scaletrain.world import World

ELSEWHERE = "another-host"  # its processes cannot be asked for their stacks

# A worker that has done a step, then does BODY and stays there.
WORKER = """
import os, signal, sys, time
from pathlib import Path
from scaletrain.run import progress
from scaletrain.world import World

def ready():
    Path(sys.argv[1], "ready-" + os.environ["RANK"]).touch()

def stay():
    ready()
    time.sleep(60)

with progress.reporting(Path(sys.argv[1]), World.from_env()) as report:
    report(1)
    {body}
"""
WORKS = "stay()"
WAITS = 'with progress.waiting("the parameter servers"): stay()'
ENTERS = 'progress.entering("allreduce"); stay()'
ENTERS_AND_WAITS_IN_TORCH = (
    'import torch; progress.entering("allreduce"); ready(); torch.futures.Future().wait()'
)
IS_STOPPED = 'progress.entering("allreduce"); ready(); os.kill(os.getpid(), signal.SIGSTOP)'


def write(run_dir: RunDir, rank: int, **fields) -> None:
    """The progress file of a worker on another host."""
    value = {"pid": 1, "host": ELSEWHERE, "time": time.time(), "step": 1, "doing": "step"}
    run_dir.path.mkdir(exist_ok=True)
    run_dir.progress(rank).write_text(json.dumps({**value, **fields}))


def culprit(run_dir: RunDir, workers: int, **silent_s: float):
    """The rank that is named; ``r0=99`` says that rank 0 has been silent for 99 s."""
    silent = {rank: silent_s.get(f"r{rank}", 0.0) for rank in range(workers)}
    hang = hangs.find_culprit(run_dir, workers, lost=(), silent_s=silent)
    assert hang is not None
    return hang.failure


def test_the_rank_with_the_fewest_steps_is_named(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    write(run_dir, 0, step=5)
    write(run_dir, 1, step=4, time=time.time() + 9)
    failure = culprit(run_dir, 2)
    assert failure.rank == 1 and "rank 0 waited for it" in failure.message


def test_the_rank_that_missed_a_collective_is_named(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    for rank in (0, 2):
        write(run_dir, rank, collective="allreduce #7", num_collectives=7, waiting_for="allreduce")
    write(run_dir, 1, collective="allreduce #6", num_collectives=6, waiting_for="allreduce")
    failure = culprit(run_dir, 3)
    assert failure.rank == 1
    assert "it never entered allreduce #7, where ranks 0, 2 wait" in failure.message


def test_a_rank_that_reports_what_it_waits_for_is_a_victim(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    write(run_dir, 0, waiting_for="the parameter servers")
    write(run_dir, 1)
    failure = culprit(run_dir, 2, r0=99)
    assert failure.rank == 1 and "rank 0 waited for it" in failure.message


def test_ranks_that_are_equally_far_are_not_told_apart(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    write(run_dir, 0, waiting_for="allreduce")
    write(run_dir, 1, waiting_for="allreduce")
    write(run_dir, 2, doing="finished")
    failure = culprit(run_dir, 3, r1=99)
    assert failure.rank == 1 and "no progress for 99 s" in failure.message
    assert "rank 0 is no further: the cause may be any of them" in failure.message
    assert "rank 2 had finished already" in failure.message


def test_nobody_hangs_where_all_have_ended(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    write(run_dir, 0, doing="finished")
    write(run_dir, 1, doing="failed")
    assert hangs.find_culprit(run_dir, 2, (), {}) is None
    write(run_dir, 1)
    assert hangs.find_culprit(run_dir, 2, {1}, {}) is None


def test_the_slowest_rank_alone_can_hang(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    watch = hangs.HangWatch(run_dir, 2, limit_s=0.0, starting_s=1000.0)
    write(run_dir, 0, step=3, time=0.0)
    write(run_dir, 1, step=None, time=time.time() - 900)
    assert not watch.is_hanging(), "rank 1 may take longer until its first step"
    watch = hangs.HangWatch(run_dir, 2, limit_s=0.2, starting_s=1000.0)
    write(run_dir, 1, step=2, time=0.0)
    assert not watch.is_hanging(), "its silence counts from when it became the slowest"
    time.sleep(0.6)  # the next look
    assert watch.is_hanging()
    time.sleep(0.6)
    assert not watch.is_hanging(lost={0, 1})


class Clock:
    """A clock of the test's own, in place of the monotonic one."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def watched(run_dir: RunDir, workers: int) -> tuple[hangs.HangWatch, Clock]:
    clock = Clock()
    return hangs.HangWatch(run_dir, workers, 10.0, 10.0, clock), clock


def hangs_within(watch: hangs.HangWatch, clock: Clock, seconds: int) -> bool:
    """Return True if the watch, which looks every second, sees a hang."""
    for _ in range(seconds):
        clock.now += 1
        if watch.is_hanging():
            return True
    return False


@pytest.mark.parametrize("ahead_s", [-100.0, 100.0], ids=["behind", "ahead"])
def test_a_host_whose_clock_differs_is_watched_like_any_other(tmp_path: Path, ahead_s: float):
    run_dir = RunDir(tmp_path)
    watch, clock = watched(run_dir, 2)
    for step in range(30):
        write(run_dir, 0, step=step, time=step)
        write(run_dir, 1, step=step, time=step + ahead_s)
        assert not hangs_within(watch, clock, 1)
    assert not hangs_within(watch, clock, 9)
    assert hangs_within(watch, clock, 3), "both are silent"


@pytest.mark.parametrize("put_by_s", [-100.0, 100.0], ids=["back", "forward"])
def test_a_clock_that_is_put_makes_no_hang_and_hides_none(tmp_path: Path, put_by_s: float):
    run_dir = RunDir(tmp_path)
    watch, clock = watched(run_dir, 1)
    for step in range(30):
        write(run_dir, 0, step=step, time=step + put_by_s * (step > 9))
        assert not hangs_within(watch, clock, 1)
    assert hangs_within(watch, clock, 12)


def test_a_job_that_was_stopped_as_a_whole_gets_its_time_anew(tmp_path: Path):
    run_dir = RunDir(tmp_path)
    watch, clock = watched(run_dir, 2)
    write(run_dir, 0, step=5)
    write(run_dir, 1, step=4)
    assert not hangs_within(watch, clock, 8)
    clock.now += 3600  # the supervisor did not run either
    assert not watch.is_hanging() and not hangs_within(watch, clock, 9)
    assert hangs_within(watch, clock, 3), "it has not moved since"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("victim", "cause", "words"),
    [
        (WAITS, WORKS, "rank 0 waited for it"),
        (ENTERS, WORKS, "it never entered allreduce #1, where rank 0 waits"),
        (ENTERS, IS_STOPPED, "rank 0 waited for it"),
        # Both reported the same collective, and one of them has left it.
        (ENTERS_AND_WAITS_IN_TORCH, ENTERS, "rank 0 waited for it"),
    ],
    ids=["waits", "entered", "stopped", "left"],
)
def test_the_culprit_is_told_from_its_victim(tmp_path: Path, victim: str, cause: str, words: str):
    started = []
    try:
        for rank, body in enumerate([victim, cause]):
            argv = [sys.executable, "-c", WORKER.format(body=body), str(tmp_path)]
            environ = {**os.environ, "RANK": str(rank), "WORLD_SIZE": "2"}
            started.append(subprocess.Popen(argv, env=environ))
        until = time.monotonic() + 30
        while len(list(tmp_path.glob("ready-*"))) < 2:
            assert time.monotonic() < until, "the workers did not start"
            time.sleep(0.05)
        time.sleep(0.2)
        failure = culprit(RunDir(tmp_path), 2)
        assert failure.rank == 1 and words in failure.message, failure
        stopped = cause == IS_STOPPED
        assert ("SIGSTOP" in failure.message) == stopped
        assert ("in stay" in failure.traceback) == (not stopped)
    finally:
        for process in started:
            process.kill()
            process.wait()


def test_a_stack_says_if_its_thread_waits_in_torch():
    text = (
        "Thread 0x01 (most recent call first):\n"
        '  File "/site-packages/torch/nn/parallel/distributed.py", line 9 in FUNCTION\n'
        '  File "<frozen runpy>", line 291 in run_path\n'
        '  File "/home/me/train.py", line 3 in <module>'
    )
    assert hangs.Stack(text.replace("FUNCTION", "_sync_module_buffers")).waits_in_torch()
    stack = hangs.Stack(text.replace("FUNCTION", "forward"))
    assert not stack.waits_in_torch()
    assert "runpy" not in stack.text and "train.py" in stack.text


def test_a_report_says_what_is_waited_for(tmp_path: Path):
    run_dir = RunDir(tmp_path)

    def waiting_for() -> str:
        report = progress.read(run_dir, 0)
        assert report
        return report.waiting_for

    @progress.waiting("the other workers")
    def meet() -> str:
        progress.alive("joining")
        return waiting_for()

    assert meet.__name__ == "meet"
    with progress.reporting(tmp_path, World(0, 1, 0, 1, 0, 1, "test")) as report:
        assert meet() == "the other workers" and waiting_for() == ""
        progress.entering("allreduce", 4)
        assert waiting_for() == "allreduce"
        with progress.waiting("a barrier"):
            assert waiting_for() == "a barrier"
        report(1)
        assert waiting_for() == ""
        progress.alive("x" * 200)
        progress.alive("evaluating")
        assert waiting_for() == "" and progress.read(run_dir, 0).doing == "evaluating"
