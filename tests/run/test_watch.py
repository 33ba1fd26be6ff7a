"""Tests of run/watch.py and `scaletrain top`: the ranks of made-up run directories."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from scaletrain.cli import cli
from scaletrain.errors import TrainingError
from scaletrain.host import processes
from scaletrain.run import progress, watch
from scaletrain.run.atomic import write_json
from scaletrain.run.culprit import Kind
from scaletrain.run.failure import Failure, FailureKind
from scaletrain.run.layout import RunDir
from scaletrain.run.progress import Progress
from scaletrain.run.records import RecordWriter, StepRecord
from scaletrain.world import World
from tests.run.made_up import made_up

NOW = 1_700_000_000.0


def write_rank(
    files: RunDir, rank: int, steps: int, own_s: float = 0.06, step_s: float = 0.1, **report: Any
) -> None:
    """Write the files of a rank that has done so many steps, the last of which ended at NOW."""
    writer = RecordWriter(files.path, rank)
    for step in range(steps):
        writer.write(
            StepRecord(
                step=step,
                rank=rank,
                time=NOW - (steps - step) * step_s,
                loss=float(step),
                samples=32,
                lr=0.1,
                step_s=step_s,
                input_s=own_s / 6,
                forward_s=own_s / 3,
                backward_s=own_s / 2 + step_s - own_s,
                update_s=0.0,
                exchange={"wait_in_backward_s": step_s - own_s},
            )
        )
    writer.close()
    fields = {"time": NOW, "step": steps, "doing": "step"} | report
    sign = Progress(**{"rank": rank, "pid": 100 + rank, "host": f"host{rank}"} | fields)
    files.progress(rank).write_text(json.dumps(sign.to_json()).ljust(895) + "\n")


def top(run_dir: Path, *options: str) -> str:
    result = CliRunner().invoke(cli, ["top", str(run_dir), *options])
    assert result.exit_code == 0, result.output
    return result.output


def test_each_rank_by_its_last_steps(tmp_path: Path):
    files = RunDir(tmp_path)
    write_json(files.header(0), {"num_steps": 500})
    write_rank(files, 0, 300, memory_bytes=512_000_000)
    write_rank(files, 1, 301, own_s=0.09, device_memory_bytes=2_000_000_000)
    first, second = watch.ranks(files, NOW + 4)
    assert first.samples_per_s == pytest.approx(320)
    assert (first.loss, first.record_age_s) == (299.0, pytest.approx(4))
    assert first.wait_s == pytest.approx(0.04) and first.input_s == pytest.approx(0.01)
    # Both are in step; the second computes for longer, so the first one waits for it.
    assert (first.num_behind, second.num_behind) == (1, 0)
    assert (first.holds_up, second.holds_up) == (False, True)
    shown = top(tmp_path, "--once")
    assert "300/500" in shown and "512 MB" in shown and "2,000 MB" in shown
    [line] = [line for line in shown.splitlines() if "the others wait for it" in line]
    assert "host1" in line


def test_only_the_ends_of_files_are_read(tmp_path: Path):
    files = RunDir(tmp_path)
    write_rank(files, 0, 200)
    whole = files.records(0).read_bytes()
    # Neither the middle nor a line that is being written may matter.
    files.records(0).write_bytes(b"\xff not a record\n" * 100_000 + whole + b'{"step": 200, "ra')
    [status] = watch.ranks(files, NOW)
    assert status.loss == 199.0 and status.samples_per_s == pytest.approx(320)


def test_a_rank_that_is_behind_in_steps_is_named_whatever_its_speed(tmp_path: Path):
    files = RunDir(tmp_path)
    write_rank(files, 0, 100, own_s=0.1)
    write_rank(files, 1, 90, own_s=0.05, waiting_for="server 0", time=NOW - 30)
    write_rank(files, 2, 101)
    statuses = watch.ranks(files, NOW)
    assert [status.num_behind for status in statuses] == [1, 11, 0]
    assert [status.holds_up for status in statuses] == [False, True, False]
    assert "11 steps behind, the others wait for it, waits for server 0" in top(tmp_path, "--once")


def test_the_states_of_a_run(tmp_path: Path):
    files = RunDir(tmp_path)

    def state() -> tuple[bool, str]:
        return watch.state(files, watch.ranks(files, NOW))

    assert state() == (False, "starting")
    write_rank(files, 0, 0, step=None, doing="joining")
    write_rank(files, 1, 0, step=None, doing="joining")
    assert state() == (False, "starting")
    write_rank(files, 0, 5)
    write_rank(files, 1, 5)
    assert state() == (False, "running")
    write_rank(files, 0, 5, time=NOW - 90)
    write_rank(files, 1, 5, time=NOW - 80)
    assert state() == (False, "no rank has given a sign of life for 80 s")
    write_rank(files, 1, 5, doing=progress.FAILED)
    assert state() == (False, "failing: rank 1")
    for rank in range(2):
        write_rank(files, rank, 0, step=None, time=NOW - 90, doing=progress.SCRIPT)
    assert state() == (False, "running a script")
    write_rank(files, 1, 5, doing=progress.FAILED)
    failure = Failure(1, "host1", 5, NOW, FailureKind.EXCEPTION, "ValueError: mine")
    write_json(files.first_cause, failure._asdict())
    assert state() == (True, "failed: rank 1: ValueError: mine")
    assert "failed: rank 1: ValueError: mine" in top(tmp_path)  # live: it ends by itself
    files.first_cause.unlink()
    for rank in range(2):
        write_rank(files, rank, 9, doing=progress.FINISHED)
    assert state() == (True, "ended")
    write_json(files.summary, {"finished": True})
    assert state() == (True, "finished")


def test_who_died_and_who_was_ended_because_of_it(tmp_path: Path):
    files = RunDir(tmp_path)
    write_rank(files, 0, 5, doing="failed", status=1)
    write_rank(files, 1, 5)  # killed: it could not say so
    write_rank(files, 2, 5)
    write_rank(files, 3, 5, doing="failed", status=143)
    write_rank(files, 4, 5, doing="failed", status=3)
    write_rank(files, 5, 5, doing="finished", status=0)
    lost = Failure(0, "host0", 5, NOW, FailureKind.PEER, "peer rank 1 is lost")
    write_json(files.failure(0), lost._asdict())
    statuses = watch.ranks(files, NOW)
    assert watch.state(files, statuses) == (False, "failing: rank 3, 4"), "rank 0 blames another"
    assert statuses[0].end == "lost another rank" and statuses[1].end == ""
    message = "was ended by SIGKILL (by another process; memory did not run out)"
    cause = Failure(1, "host1", 5, NOW, FailureKind.SIGNAL, message)
    write_json(files.first_cause, cause._asdict())
    assert [status.end for status in watch.ranks(files, NOW)] == [
        "ended because of rank 1",
        "was ended by SIGKILL",
        "ended because of rank 1",
        "ended because of rank 1",
        "failed",
        "finished",
    ]
    lines = top(tmp_path, "--once").splitlines()
    assert [line.split("-  ")[-1].strip() for line in lines[2:4]] == [
        "ended because of rank 1",
        "was ended by SIGKILL",
    ]
    hung = cause._replace(kind=FailureKind.HANG, message="no progress for 60 s")
    write_json(files.first_cause, hung._asdict())
    assert watch.ranks(files, NOW)[1].end == "hung"
    nobody = cause._replace(rank=None, message="server 0 was ended by SIGKILL")
    write_json(files.first_cause, nobody._asdict())
    assert watch.ranks(files, NOW)[1].end == "ended because of another process"


def test_a_directory_without_a_run(tmp_path: Path):
    result = CliRunner().invoke(cli, ["top", str(tmp_path), "--once"])
    assert "holds no run (allowed: the --run-dir of a run)" in str(result.exception)


def test_a_worker_reports_its_memory(tmp_path: Path):
    with progress.reporting(tmp_path, World()):
        report = progress.read(RunDir(tmp_path), 0)
        assert report is not None and report.memory_bytes is not None
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        assert report.memory_bytes == pytest.approx(pages * os.sysconf("SC_PAGE_SIZE"), rel=0.3)
        assert report.device_memory_bytes is None


# Ranks that do no more steps

LATER = NOW + 5  # when a silent rank is overdue


def write_waiting_ranks(files: RunDir, **culprit: Any) -> None:
    """Write the files of three ranks, two of which have entered a collective without the third."""
    for rank in (0, 2):
        write_rank(files, rank, 30, num_collectives=9, waiting_for="allreduce", machine="here")
    write_rank(files, 1, 30, num_collectives=8, **culprit)


def halted(files: RunDir) -> tuple[Kind, tuple[int, ...], str]:
    [found] = watch.culprits(files, watch.ranks(files, LATER))
    return found.kind, found.ranks, found.sentence()


@pytest.fixture
def process() -> Iterator[subprocess.Popen]:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield child
    child.kill()
    child.wait()


def of(process: subprocess.Popen) -> dict[str, Any]:
    """Return the fields of a report that this process would write on an emulated host."""
    started = processes.start_ticks(process.pid)
    return {"pid": process.pid, "started": started, "machine": processes.machine()}


def test_a_dead_rank_of_an_emulated_host_is_dead_at_once(tmp_path: Path, process: subprocess.Popen):
    files = RunDir(tmp_path)
    write_waiting_ranks(files, **of(process))
    process.kill()
    deadline = time.monotonic() + 10
    while processes.state(process.pid) != "Z" and time.monotonic() < deadline:
        time.sleep(0.01)
    # First as a zombie, whose environment is empty, then without a trace.
    for _ in range(2):
        kind, ranks, sentence = halted(files)
        assert (kind, ranks) == (Kind.DEAD, (1,)) and "rank 1 on host1: dead" in sentence
        process.wait()


def test_a_stopped_rank_of_an_emulated_host_is_stopped(tmp_path: Path, process: subprocess.Popen):
    files = RunDir(tmp_path)
    write_waiting_ranks(files, **of(process))
    assert halted(files)[2].startswith("rank 1 on host1: stopped: no sign of life for 5 s")
    process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED)
    assert halted(files)[2].startswith("rank 1 on host1: stopped: the process is stopped (SIGSTOP)")


def test_another_process_with_the_id_of_a_dead_rank_is_not_taken_for_it(
    tmp_path: Path, process: subprocess.Popen
):
    files = RunDir(tmp_path)
    write_waiting_ranks(files, **of(process) | {"started": 1})
    assert halted(files)[:2] == (Kind.DEAD, (1,))


def test_a_silent_rank_on_another_machine_may_be_dead_or_stopped(tmp_path: Path):
    files = RunDir(tmp_path)
    write_waiting_ranks(files, machine="another one", pid=os.getpid())
    kind, ranks, sentence = halted(files)
    assert (kind, ranks) == (Kind.SILENT, (1,))
    assert "silent: no sign of life for 5 s (it may be dead, stopped or hang" in sentence


def test_the_last_rank_that_reports_is_named_dead_though_all_others_have_failed(
    tmp_path: Path, process: subprocess.Popen
):
    files = RunDir(tmp_path)
    write_waiting_ranks(files, **of(process))
    for rank in (0, 2):
        write_rank(files, rank, 30, doing=progress.FAILED)
    process.kill()
    process.wait()
    assert halted(files)[:2] == (Kind.DEAD, (1,))


@pytest.mark.parametrize("has_output", [False, True])
def test_a_dead_rank_has_last_words_only_if_it_left_some(tmp_path: Path, has_output: bool):
    """Bug it catches: "its log says more" of a rank that SIGKILL ended in silence."""
    files = RunDir(tmp_path)
    write_rank(files, 0, 30)
    write_rank(files, 1, 30)
    killed = Failure(1, "host1", 30, NOW, FailureKind.SIGNAL, "was ended by SIGKILL")
    write_json(files.first_cause, killed._asdict())
    files.rank_log(1).parent.mkdir()
    files.rank_log(1).write_text("step 30\n" if has_output else "")
    last_words = " (its last output is in logs/rank-1.log)" if has_output else ""
    assert halted(files)[2] == f"rank 1 on host1: dead: was ended by SIGKILL{last_words}"


def test_the_traceback_of_a_dead_rank_is_its_last_words(tmp_path: Path):
    files = RunDir(tmp_path)
    write_rank(files, 1, 30)
    raised = Failure(1, "host1", 30, NOW, FailureKind.EXCEPTION, "ValueError: x", "Traceback ...")
    for path in (files.failure(1), files.first_cause):
        write_json(path, raised._asdict())
    assert halted(files)[2].endswith("ValueError: x (its traceback is in failure-1.json)")


@pytest.mark.parametrize(("since", "told"), [(400, True), (1180, False)])
def test_what_cost_a_run_less_than_a_hundredth_is_not_told_at_its_end(
    tmp_path: Path, since: int, told: bool
):
    ranks = made_up(2, 1200, seed=1, slow={1: (Kind.FORWARD, 0.01)}, since=since)
    found = watch.culprits_of(RunDir(tmp_path), [each.records for each in ranks])
    assert [culprit.ranks for culprit in found] == [(1,)] * told


def test_a_record_without_room_says_where(tmp_path: Path):
    files = RunDir(tmp_path)
    files.records(0).symlink_to("/dev/full")
    [rank] = made_up(1, 1, seed=0)
    with pytest.raises(TrainingError, match=r"rank-0\.jsonl: No space left on device"):
        RecordWriter(tmp_path, 0).write(rank.records[0])
