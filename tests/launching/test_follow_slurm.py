"""Tests of programs/follow_slurm.py; tests/cluster/test_slurm.py follows jobs of a real SLURM."""

import os
import subprocess
from pathlib import Path

import pytest

from scaletrain.launching.job import Program
from scaletrain.programs.follow_slurm import JobRecord
from tests.cluster.commands import ROOT

LINE = (
    "JobId=7 JobName=x JobState={state} Reason={reason} Restarts=0 ExitCode={code} NodeList=n[0-1]"
)


def record(state: str, code: str = "0:0", reason: str = "None") -> JobRecord:
    parsed = JobRecord.parse(LINE.format(state=state, reason=reason, code=code))
    assert parsed
    return parsed


@pytest.mark.parametrize(
    ("state", "code", "status"),
    [
        ("COMPLETED", "0:0", 0),
        ("COMPLETED", "3:0", 3),
        ("FAILED", "1:0", 1),
        ("FAILED", "0:9", 137),
        ("NODE_FAIL", "0:0", 1),
        ("CANCELLED", "0:15", 130),
        ("TIMEOUT", "0:15", 124),
        ("OUT_OF_MEMORY", "0:125", 137),
        ("RUNNING", "0:0", 0),
    ],
)
def test_the_status_of_a_state(state: str, code: str, status: int):
    assert record(state, code).status == status


def test_a_record_is_read():
    pending = record("PENDING", reason="Resources")
    assert (pending.nodes, pending.reason) == ("n[0-1]", "Resources")
    assert record("RUNNING").reason == ""
    assert JobRecord.parse("slurm_load_jobs error: Invalid job id specified") is None
    waiting = JobRecord.parse("JobId=7 ArrayTaskId=3-9%2 JobState=PENDING NodeList=(null)")
    assert waiting and waiting.stands_for_many and waiting.nodes == ""


def follow(
    tmp_path: Path, records: list[str], sbatch: str = "echo '7;cluster'", sacct: str = ""
) -> subprocess.CompletedProcess[str]:
    """Follow a job whose records, one a look, are those given; the last one stays."""
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for number, text in enumerate(records):
        (tmp_path / f"record-{number}").write_text(text + "\n")
    looks = f"""
echo "$0 $@" >> {tmp_path}/calls
number=$(cat {tmp_path}/looks 2>/dev/null || echo 0)
[ $number -ge {len(records) - 1} ] || echo $((number + 1)) > {tmp_path}/looks
grep -v error {tmp_path}/record-$number; ! grep error {tmp_path}/record-$number >&2
"""
    commands = {"sbatch": sbatch, "scontrol": looks, "sacct": f"printf '{sacct}'"}
    for name, script in commands.items():
        (stubs / name).write_text(f"#!/bin/sh\n{script}\n")
        (stubs / name).chmod(0o755)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "progress-0.json").touch()
    (run_dir / "slurm-7.out").write_text("trained\nwell")
    return subprocess.run(
        Program.FOLLOW_SLURM.command(run_dir / "job.sbatch", 0.01),
        env=os.environ | {"PATH": f"{stubs}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=20,
    )


RUNNING = LINE.format(state="RUNNING", reason="None", code="0:0")
FORGOTTEN = "slurm_load_jobs error: Invalid job id specified"


@pytest.mark.parametrize(
    ("sacct", "status", "line"),
    [
        ("", 1, "job 7: SLURM does not know it any more, and keeps no account of it"),
        ("7|FAILED|5:0|n[0-1]\\n", 5, "job 7: FAILED on n[0-1]"),
        ("7|CANCELLED by 0|0:15|n0\\n", 130, "job 7: CANCELLED on n0"),
        ("7|RUNNING|0:0|n0\\n", 1, "keeps no account of it"),
        ("slurmdbd is away", 1, "keeps no account of it"),
    ],
)
def test_a_forgotten_job_ends_with_its_account_or_a_line(
    tmp_path: Path, sacct: str, status: int, line: str
):
    """Bug it catches: the follower waits for ever, or for minutes, and blames the controller."""
    done = follow(tmp_path, [RUNNING, FORGOTTEN], sacct=sacct)
    assert done.returncode == status, done.stdout + done.stderr
    assert line in done.stdout + done.stderr and "trained\nwell" in done.stdout


def test_a_job_that_was_forgotten_after_its_end_has_ended_so(tmp_path: Path):
    failed = LINE.format(state="FAILED", reason="None", code="6:0")
    assert follow(tmp_path, [RUNNING, failed, FORGOTTEN]).returncode == 6


def test_a_forgotten_task_of_an_array_does_not_keep_the_others_waiting(tmp_path: Path):
    ended = "JobId=7 ArrayTaskId={task} JobState={state} NodeList=n0 ExitCode={code}"
    first = ended.format(task=0, state="FAILED", code="4:0")
    second = ended.format(task=1, state="COMPLETED", code="0:0")
    done = follow(tmp_path, [f"{first}\n{second}", second])
    assert done.returncode == 4 and "1 of 2 tasks ended well" in done.stdout


@pytest.mark.parametrize(
    ("sbatch", "job"),
    [
        ("echo 'sbatch: balance: 3 h'; echo; echo ' 7'", "7"),
        ("echo 'budget 12;34 left'; echo '7;north'", "7"),
        ("echo '7'; echo 'goodbye'", None),
        ("true", None),
    ],
)
def test_plug_ins_of_a_site_may_print_before_the_number(
    tmp_path: Path, sbatch: str, job: str | None
):
    completed = LINE.format(state="COMPLETED", reason="None", code="0:0")
    done = follow(tmp_path, [completed], sbatch)
    if job is None:
        assert done.returncode == 1 and "in place of a job's number" in done.stderr
        return
    assert done.returncode == 0 and f"submitted job {job};" in done.stdout
    assert "balance" in done.stdout or "budget 12;34 left" in done.stdout
    calls = (tmp_path / "calls").read_text()
    assert ("scontrol --clusters=north show job -o 7" in calls) == ("north" in sbatch)


def test_a_job_is_followed_to_its_end(tmp_path: Path):
    running = LINE.format(state="RUNNING", reason="None", code="0:0")
    # A job that is being requeued shows a bad end for a moment.
    preempted = LINE.format(state="PREEMPTED", reason="None", code="0:15")
    requeued = running.replace("Restarts=0", "Restarts=1")
    failed = LINE.format(state="FAILED", reason="NonZeroExitCode", code="5:0")
    done = follow(tmp_path, [running, preempted, requeued, failed])
    assert done.returncode == 5, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("submitted job 7; its output is kept in ")
    assert "trained" in lines and "well" in done.stdout
    assert "job 7: RUNNING on n[0-1]" in done.stdout
    assert "job 7: requeued; it goes on from its last checkpoint" in done.stdout
    assert "job 7: FAILED on n[0-1] (NonZeroExitCode)" in done.stdout
    assert not (tmp_path / "run" / "progress-0.json").exists(), "of the earlier attempt"


def test_each_task_of_an_array_is_followed(tmp_path: Path):
    ended = "JobId=7 ArrayTaskId={task} JobState={state} NodeList=n0 ExitCode={code}"
    first = ended.format(task=0, state="COMPLETED", code="0:0")
    second = ended.format(task=1, state="CANCELLED", code="0:15")
    waiting = "JobId=7 ArrayTaskId=1-1%2 JobState=PENDING NodeList=(null)"
    done = follow(tmp_path, [f"{first}\n{waiting}", f"{first}\n{second}"])
    assert done.returncode == 130, done.stdout + done.stderr
    assert "job 7_0: COMPLETED on n0" in done.stdout
    assert "job 7: 1 of 2 tasks ended well" in done.stdout


@pytest.mark.parametrize(
    ("state", "code", "status"),
    [("CANCELLED", "0:15", 130), ("TIMEOUT", "0:15", 124), ("OUT_OF_MEMORY", "0:125", 137)],
)
def test_the_command_ends_with_the_documented_status(
    tmp_path: Path, state: str, code: str, status: int
):
    done = follow(tmp_path, [RUNNING, LINE.format(state=state, reason="None", code=code)])
    assert done.returncode == status, done.stdout + done.stderr
    page = (ROOT / "docs" / "launchers" / "slurm.md").read_text(encoding="utf-8")
    documented = page.partition("Exit statuses: ")[2].partition("\n")[0]
    assert str(status) in documented
