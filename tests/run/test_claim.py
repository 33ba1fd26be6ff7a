"""run/claim.py: one run has one directory. Bug it catches: two commands of the same second that
write over each other.
"""

import multiprocessing
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from scaletrain.errors import UserError
from scaletrain.run import claim
from tests.cluster.commands import DIGITS, ROOT, clean, command, scaletrain


def test_a_taken_name_gets_a_number(tmp_path: Path):
    name = tmp_path / "runs" / "digits"
    directories = [claim.new_directory(name) for _ in range(3)]
    assert [path.name for path in directories] == ["digits", "digits-2", "digits-3"]


def test_processes_that_start_together_get_directories_of_their_own(tmp_path: Path):
    with multiprocessing.get_context("fork").Pool(8) as pool:
        claimed = pool.map(claim.new_directory, [tmp_path / "digits"] * 40, chunksize=1)
    assert len(set(claimed)) == 40


def test_a_directory_in_use_is_refused_until_its_job_has_ended(tmp_path: Path):
    run_dir = tmp_path / "run"
    with claim.in_use(run_dir, "--run-dir"):
        with pytest.raises(UserError) as refused, claim.in_use(run_dir, "--run-dir"):
            pass
        words = str(refused.value)
        assert words.startswith(f"--run-dir {run_dir}: is in use by process {os.getpid()} on ")
        with pytest.raises(UserError), claim.in_use(run_dir, "--run-dir", shared=True):
            pass
    with claim.in_use(run_dir, "--run-dir"):
        pass


def test_the_hosts_of_one_job_share_a_directory(tmp_path: Path):
    with (
        claim.in_use(tmp_path, "--run-dir", shared=True),
        claim.in_use(tmp_path, "--run-dir", shared=True),
        pytest.raises(UserError),
        claim.in_use(tmp_path, "--run-dir"),
    ):
        pass


def test_a_file_system_without_locks_is_used_all_the_same(tmp_path: Path, monkeypatch):
    def no_locks(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(claim.fcntl, "flock", no_locks)
    with claim.in_use(tmp_path, "--run-dir"), claim.in_use(tmp_path, "--run-dir"):
        pass


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_two_launches_of_the_same_second_have_two_directories(tmp_path: Path):
    def started() -> subprocess.Popen:
        argv = command("launch", "-n", "1", "--", "sh", "-c", "sleep 1")
        # The same second for both, whenever they come to it.
        env = clean({"PYTHONPATH": f"{tmp_path}:{ROOT}"})
        return subprocess.Popen(argv, env=env, cwd=tmp_path)

    fixed = "import time; time.strftime = lambda *a: '20260101-000000'\n"
    (tmp_path / "sitecustomize.py").write_text(fixed)
    launches = [started() for _ in range(3)]
    assert [launch.wait(60) for launch in launches] == [0, 0, 0]
    names = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert names == [f"launch-20260101-000000{number}" for number in ("", "-2", "-3")]


@pytest.mark.slow
@pytest.mark.timeout(90)
def test_a_live_job_keeps_its_directory(tmp_path: Path):
    run_dir = tmp_path / "run"
    argv = command("launch", "--run-dir", str(run_dir), "--", "sh", "-c", "echo up; sleep 60")
    launcher = subprocess.Popen(argv, env=clean(), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert launcher.stdout and launcher.stdout.readline() == "up\n"
        for second in (
            scaletrain("launch", "--run-dir", str(run_dir), "--", "true"),
            scaletrain("train", DIGITS, "--run-dir", str(run_dir)),
            scaletrain("train", DIGITS, "--run-dir", str(run_dir), "--resume"),
            scaletrain("bench", "scaling", DIGITS, "--workers", "1", "--out", str(run_dir)),
        ):
            assert second.returncode == 2 and len(second.stderr.splitlines()) == 1
            assert f"{run_dir}: is in use by process {launcher.pid} on" in second.stderr
        assert not (run_dir / "config.yaml").exists()
    finally:
        launcher.send_signal(signal.SIGTERM)
        launcher.communicate(timeout=20)
    began = time.monotonic()
    again = scaletrain("launch", "--run-dir", str(run_dir), "--", "true")
    assert again.returncode == 0 and time.monotonic() - began < 20, again.stderr
