"""launching/supervision/screen.py: output as it is, and a job that outlives its screen. Bug it
catches: a worker's umlaut, a closed terminal or a full disk that ends the job.
"""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaletrain.launching.supervision import screen
from scaletrain.launching.supervision.screen import ERROR, OUTPUT
from tests.cluster.commands import ROOT, clean, command
from tests.launching.test_supervise import carry_out, job_of


def test_frames_come_back_and_a_cut_one_is_left_out():
    data = screen.frame(OUTPUT, b"a\nb") + screen.frame(ERROR, b"") + screen.frame(OUTPUT, b"cut")
    assert [*screen.frames(io.BytesIO(data[:-1]))] == [(OUTPUT, b"a\nb"), (ERROR, b"")]


def test_lines_of_several_processes_do_not_mix():
    merger = screen.Merger()

    def place(name: str, piece: bytes) -> bytes:
        return merger.place(OUTPUT, name, f"[{name}] ".encode() if name else b"", piece)

    assert place("a", b"Name? ") == b"[a] Name? "
    assert place("b", b"hello\n") == b"\n[b] hello\n"
    assert place("a", b"10%\r") == b"[a] 10%\r"
    assert place("a", b"20%\r") == b"[a] 20%\r"
    assert place("", b"scaletrain: stopped\n") == b"\nscaletrain: stopped\n"
    assert merger.place(ERROR, "a", b"[a] ", b"x\n") == b"[a] x\n", "streams are apart"


slow = [pytest.mark.slow, pytest.mark.timeout(60)]


def launch(tmp_path: Path, workers: int, program: str, **options) -> subprocess.Popen:
    argv = command("launch", "-n", str(workers), "--run-dir", str(tmp_path / "run"), "--")
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": clean(), **options}
    return subprocess.Popen([*argv, sys.executable, "-uc", program], cwd=ROOT, **options)


class TestShown:
    pytestmark = slow

    def test_the_bytes_of_one_process_are_unchanged(self, tmp_path: Path):
        raw = bytes(range(256)) + b"no newline at the end"
        env = clean({"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
        done = launch(tmp_path, 1, f"import os; os.write(1, {raw!r})", env=env)
        output, _ = done.communicate(timeout=40)
        assert (done.returncode, output) == (0, raw)

    def test_a_name_that_cannot_be_encoded_ends_nothing(self, tmp_path: Path):
        env = clean({"PYTHONIOENCODING": "ascii"})
        run_dir = tmp_path / "läufe"
        argv = command("launch", "--run-dir", str(run_dir), "--dry-run", "--", "é", "x")
        done = subprocess.run(argv, env=env, cwd=ROOT, capture_output=True, timeout=40)
        assert done.returncode == 0, done.stderr

    @pytest.mark.parametrize("workers", [1, 2])
    def test_names_that_are_not_utf_8_reach_the_program(self, tmp_path: Path, workers: int):
        """An argument, and the working directory with the run directory in it."""
        folder = os.fsencode(tmp_path) + b"/l\xe4ufe"
        os.mkdir(folder)
        program = "import os, sys; os.write(1, os.fsencode(sys.argv[1] + os.getcwd()) + b'\\n')"
        argv = [*command("launch", "-n", str(workers), "--"), sys.executable, "-c", program]
        done = subprocess.run(
            [*argv, b"caf\xe9"], cwd=folder, env=clean(), capture_output=True, timeout=40
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(b"caf\xe9" + folder + b"\n") == workers

    def test_an_exception_whose_text_is_not_utf_8_is_shown(self, tmp_path: Path):
        program = "import os; raise ValueError(os.fsdecode(b'caf\\xe9'))"
        launcher = launch(tmp_path, 2, program)
        _, errors = launcher.communicate(timeout=40)
        assert launcher.returncode == 1 and b"ValueError: caf\\udce9" in errors, errors
        assert b"supervisor" not in errors, errors

    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_prompt_and_a_progress_bar_are_shown_as_they_come(self, tmp_path: Path, workers: int):
        program = (
            "import sys, time; sys.stdout.write('10%\\r20%\\rName? '); time.sleep(4); print('end')"
        )
        launcher = launch(tmp_path, workers, program)
        assert launcher.stdout
        shown = b""
        began = 0.0
        while shown.count(b"Name? ") < workers:
            shown += os.read(launcher.stdout.fileno(), 1000)
            began = began or time.monotonic()
        assert time.monotonic() - began < 3, "only with the line's end"
        assert shown.count(b"20%\r") == workers
        rest, _ = launcher.communicate(timeout=40)
        assert rest.count(b"end\n") == workers

    def test_a_long_line_is_shown_whole(self, tmp_path: Path):
        launcher = launch(tmp_path, 2, "print('x' * 300_000)")
        output, _ = launcher.communicate(timeout=40)
        lines = sorted(output.splitlines())
        assert lines == [f"[rank {rank}] ".encode() + b"x" * 300_000 for rank in (0, 1)]


class TestLost:
    pytestmark = slow

    def test_a_reader_that_leaves_does_not_shorten_the_job(self, tmp_path: Path):
        program = (
            "import pathlib, sys, time\nfor i in range(30): print(i); time.sleep(0.1)\n"
            f"pathlib.Path({str(tmp_path)!r}, 'through').touch()"
        )
        launcher = launch(tmp_path, 1, program)
        assert launcher.stdout and launcher.stderr
        os.read(launcher.stdout.fileno(), 1)
        launcher.stdout.close()
        errors = launcher.stderr.read().decode()
        assert launcher.wait(40) == 0 and (tmp_path / "through").exists(), errors
        assert "standard output is lost: Broken pipe; the job goes on" in errors

    def test_workers_keep_their_time_for_a_checkpoint_when_the_terminal_closes(
        self, tmp_path: Path
    ):
        program = (
            "import pathlib, signal, sys, time\nheard = []\n"
            "signal.signal(signal.SIGTERM, lambda *a: heard.append(1))\nprint('up')\n"
            "while not heard: time.sleep(0.01)\n"
            "for i in range(12): print(i); time.sleep(0.5)\n"
            f"pathlib.Path({str(tmp_path)!r}, 'checkpoint').touch()"
        )
        launcher = launch(tmp_path, 1, program)
        assert launcher.stdout and launcher.stderr and launcher.stdout.readline() == b"up\n"
        launcher.stdout.close()
        launcher.stderr.close()
        launcher.send_signal(signal.SIGHUP)
        assert launcher.wait(40) == 143 and (tmp_path / "checkpoint").exists()

    def test_a_full_disk_under_the_log_does_not_end_the_job(self, tmp_path: Path):
        with open("/dev/full", "wb") as full:
            launcher = launch(tmp_path, 1, "print('x' * 100); raise SystemExit(9)", stdout=full)
            _, errors = launcher.communicate(timeout=40)
        assert launcher.returncode == 9 and b"No space left on device; the job goes on" in errors

    def test_a_full_disk_of_the_run_directory_does_not_hide_the_cause(self, tmp_path: Path):
        run_dir = tmp_path / "run"
        run_dir.mkdir()
        mount = f"mount -t tmpfs -o size=1m tmpfs {run_dir}"
        if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
            pytest.skip("needs the right to mount (root)")
        program = (
            "import os, sys\n"
            f"file = os.open({str(run_dir / 'filler')!r}, os.O_CREAT | os.O_WRONLY)\n"
            "try:\n"
            "    while True: os.write(file, bytes(4096))\n"
            "except OSError: sys.exit(9)\n"
        )
        argv = command("launch", "-n", "2", "--run-dir", str(run_dir), "--", sys.executable)
        done = subprocess.run(
            ["unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh", *argv, "-c", program],
            env=clean(), cwd=ROOT, capture_output=True, timeout=50,
        )  # fmt: skip
        assert done.returncode == 9, done.stderr
        assert b"failure.json cannot be written: No space left on device" in done.stderr
        assert b"ended with status 9" in done.stderr and b"supervisor.py" not in done.stderr

    @pytest.mark.parametrize("workers", [1, 2])
    def test_a_run_directory_that_is_gone_does_not_hide_the_cause(
        self, tmp_path: Path, workers: int
    ):
        body = f"""
        import shutil
        if rank == 0:
            while not Path(os.environ["RUN_DIR"], f"stacks-{workers - 1}.txt").exists():
                time.sleep(0.05)
            time.sleep(0.5)
            shutil.rmtree({str(tmp_path / "run")!r})
            if {workers} == 1:
                raise ValueError("the cause")
            raise SystemExit(9)
        time.sleep(60)
        """
        status, output = carry_out(*job_of(tmp_path, body, workers=workers))
        assert status == (1 if workers == 1 else 9), output
        assert "failure.json cannot be written" in output and "supervisor.py" not in output
        assert ("ValueError: the cause" in output) == (workers == 1), output
