"""launching/supervision/output.py: every rank's output is kept, and shown as a person asks. Bugs it
catches: a line of one rank in another's file, a log that fills the disk, a log that ends the job.
"""

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest

from scaletrain.launching.launchers import horovodrun, mpirun, slurm
from scaletrain.launching.supervision.output import Logs, Stream, Writer
from scaletrain.launching.supervision.screen import OUTPUT
from scaletrain.run.layout import RunDir
from tests.cluster.commands import ROOT, clean, command

# What each launcher makes of two ranks that print a prompt, a progress bar, binary data and lines.
OPENMPI_4 = mpirun._labels("openmpi", "mpirun (Open MPI) 4.1.4")
OPENMPI_5 = mpirun._labels("openmpi", "mpirun (Open MPI) 5.0.11")
MPICH = mpirun._labels("mpich", "HYDRA build details:")
LABELLED = [
    (
        OPENMPI_4,
        b"[1,0]<stdout>:Name? [1,1]<stdout>:Name? [1,1]<stdout>: hi\n"
        b"[1,0]<stdout>:10%\r20%\rdone\nmpirun noticed\n[1,1]<stdout>:\xff\n[1,0]<stdout>:end",
        {0: b"Name? 10%\r20%\rdone\nend", 1: b"Name?  hi\n\xff\n", None: b"mpirun noticed\n"},
    ),
    (
        OPENMPI_5,
        b"[1,0]<stdout>: Name?  hi\n[1,0]<stdout>: 10%\r20%\rdone\n[1,1]<stdout>: \n"
        b"[1,0]<stdout>: end[1,1]<stdout>: \xff",
        {0: b"Name?  hi\n10%\r20%\rdone\nend", 1: b"\n\xff"},
    ),
    (
        MPICH,
        b"<output of rank 11>Name? <output of rank 0>[rank 1] hi\n<output of rank 0>\n",
        {0: b"[rank 1] hi\n\n", 11: b"Name? "},
    ),
    (
        slurm._LABELS,
        b" 0: at 12: 30\n11: 5: x\nsrun: error: n1: task 0\n 0: \xff\n",
        {0: b"at 12: 30\n\xff\n", 11: b"5: x\n", None: b"srun: error: n1: task 0\n"},
    ),
    (
        horovodrun._LABELS,
        b"[0]<stdout>: a\n[1,1]<stdout>:b\n",
        {0: b" a\n", 1: b"b\n"},
    ),
]


@pytest.mark.parametrize(("labels", "written", "expected"), LABELLED)
@pytest.mark.parametrize("size", [1 << 16, 7])
def test_the_output_of_a_launcher_goes_to_its_ranks(
    labels: str, written: bytes, expected: dict[int | None, bytes], size: int
):
    """However the pipe cuts it."""
    stream = Stream(
        Writer("mpirun", is_launcher=True), OUTPUT, False, labels, lambda r: Writer("rank", r)
    )
    by_rank: dict[int | None, bytes] = {}
    for start in [*range(0, len(written), size), len(written)]:
        for writer, piece in stream.pieces(written[start : start + size]):
            by_rank[writer.rank] = by_rank.get(writer.rank, b"") + piece
    assert by_rank == expected


class TestLogs:
    @staticmethod
    def logs(folder: Path, said: list[str], limit_bytes: int = 1000) -> Logs:
        return Logs(RunDir(folder), " h0", said.append, limit_bytes)

    def test_the_newest_part_is_kept_within_the_limit(self, tmp_path: Path):
        said: list[str] = []
        written = b""
        for part in range(2):  # the second is a run that goes on
            logs = self.logs(tmp_path, said)
            for number in range(500):
                line = b"%d %d\n" % (part, number)
                logs.keep(Writer("rank 3", 3), line)
                written += line
        newest = (tmp_path / "logs" / "rank-3.log").read_bytes()
        older = (tmp_path / "logs" / "rank-3.log.1").read_bytes()
        assert written.endswith(older + newest) and not said
        assert 0 < len(newest) <= 1000 and 990 < len(older) <= 1000
        assert len([*(tmp_path / "logs").iterdir()]) == 2

    def test_more_writers_than_files_may_be_open(self, tmp_path: Path):
        logs = self.logs(tmp_path, [])
        for part in (b"a", b"b"):
            for rank in range(300):
                logs.keep(Writer(f"rank {rank}", rank), b"%d%s" % (rank, part))
        for rank in range(300):
            kept = (tmp_path / "logs" / f"rank-{rank}.log").read_bytes()
            assert kept == b"%da%db" % (rank, rank)

    def test_hosts_that_share_the_directory_keep_their_launchers_apart(self, tmp_path: Path):
        self.logs(tmp_path, []).keep(Writer("torchrun", is_launcher=True), b"x")
        assert (tmp_path / "logs" / "process-torchrun-h0.log").read_bytes() == b"x"

    def test_a_full_disk_is_told_once_and_may_have_room_again(self, tmp_path: Path):
        said: list[str] = []
        logs = self.logs(tmp_path, said)
        (tmp_path / "logs").mkdir()
        (tmp_path / "logs" / "rank-0.log").symlink_to("/dev/full")
        for _ in range(3):
            logs.keep(Writer("rank 0", 0), b"lost")
            logs.keep(Writer("rank 1", 1), b"kept")
        assert (tmp_path / "logs" / "rank-1.log").read_bytes() == b"kept" * 3
        assert len(said) == 1 and "No space left on device; the job goes on" in said[0]

    def test_a_removed_run_directory_stays_away(self, tmp_path: Path):
        said: list[str] = []
        logs = self.logs(tmp_path / "gone", said)
        logs.keep(Writer("rank 0", 0), b"lost")
        assert len(said) == 1 and not (tmp_path / "gone").exists()


PROGRAM = r"""
import os, sys
rank = os.environ["RANK"]
os.write(1, b"caf\xe9 %s\n10%%\r20%%\rdone" % rank.encode())
os.write(2, b"a warning\n")
raise SystemExit(7 if rank == "1" else 0)
"""
SHOWN = b"caf\xe9 %d\n10%%\r20%%\rdone"


@pytest.mark.slow
@pytest.mark.timeout(60)
class TestShown:
    def launch(self, tmp_path: Path, *options: str) -> tuple[bytes, str, Path]:
        run_dir = tmp_path / "run"
        argv = command("launch", "-n", "2", "--run-dir", str(run_dir), *options)
        argv += ["--", sys.executable, "-c", PROGRAM]
        done = subprocess.run(argv, env=clean(), cwd=ROOT, capture_output=True, timeout=40)
        assert done.returncode == 7, done.stderr
        # Whatever is shown, everything is kept.
        for rank in range(2):
            kept = (run_dir / "logs" / f"rank-{rank}.log").read_bytes()
            assert sorted(kept) == sorted((SHOWN % rank) + b"a warning\n")
        return done.stdout, done.stderr.decode(), run_dir

    def test_json_gives_every_byte_with_its_rank_and_stream(self, tmp_path: Path):
        output, errors, _ = self.launch(tmp_path, "--log-format", "json")
        assert errors == "", "all lines are in one place"
        written: dict[tuple[int | None, str], bytes] = {}
        for line in output.splitlines():
            record = json.loads(line)
            text = record["text"].encode()
            if "base64" in record:
                text = base64.b64decode(record["base64"])
            if not record.get("partial"):
                text += b"\n"
            place = (record["rank"], record["stream"])
            written[place] = written.get(place, b"") + text
            assert record["time"].endswith("Z") and record["process"]
        for rank in range(2):
            assert written[rank, "stdout"] == SHOWN % rank
            assert written[rank, "stderr"] == b"a warning\n"
        assert b"rank 1 on" in written[None, "stderr"]

    def test_rank_0_alone(self, tmp_path: Path):
        output, errors, run_dir = self.launch(tmp_path, "--show", "0")
        assert output.startswith(b"[rank 0] caf\xe9 0\n") and b"[rank 1]" not in output
        assert errors.count("a warning") == 1
        assert f"the output of rank 1: {run_dir}/logs/rank-1.log" in errors

    def test_errors_of_all(self, tmp_path: Path):
        output, errors, _ = self.launch(tmp_path, "--show", "errors")
        assert output == b"" and errors.count("a warning") == 2

    def test_a_launcher_that_mixes_its_workers_shows_all_or_is_refused(self, tmp_path: Path):
        argv = command("launch", "--launcher", "torchrun", "--show", "0", "true")
        done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=40)
        assert done.returncode == 2 and "--show: '0' is not allowed here: torchrun" in done.stderr
        assert not list(tmp_path.iterdir())
