"""Recorded collectives, as torch's own analyser of Flight Recorder's dumps reads them."""

import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaletrain.run import flight
from scaletrain.run.flight import Recorder
from scaletrain.run.layout import RunDir
from tests.conftest import require


def record(files: RunDir, rank: int, size: int, calls: list[tuple[str, int, str]], last: bool):
    """Record a rank's collectives (name, elements, dtype); ``last``: whether the last one ended."""
    recorder = Recorder(files.collectives(rank), rank, size)
    group = recorder.group("0123abcd", range(size))
    for number, (name, count, dtype) in enumerate(calls, 1):
        entry = recorder.began(group, name, number, count, dtype)
        if number < len(calls) or last:
            recorder.ended(entry)


def analysed(files: RunDir, size: int, *options: str) -> str:
    """Return what torch says about the dumps."""
    folder = flight.write_dumps(files, size)
    assert folder is not None
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.flight_recorder.fr_trace",
            str(folder),
            "-p",
            "rank_",
            *options,
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


STEP = [("allreduce", 1000, "float32"), ("allgather", 8, "int64"), ("allreduce", 500, "float32")]


def test_the_rank_that_never_entered_a_collective_is_named_by_torch(tmp_path: Path):
    files = RunDir(tmp_path)
    for rank in range(3):
        calls = STEP * 2 if rank != 1 else (STEP * 2)[:-1]
        record(files, rank, 3, calls, last=rank == 1)
    said = analysed(files, 3)
    assert "Not all ranks joining collective, sequence number: 6" in said
    assert re.search(r"missing ranks: \{1\}", said) and "gloo:all_reduce" in said


def test_ranks_that_call_different_things_are_told_apart_by_torch(tmp_path: Path):
    files = RunDir(tmp_path)
    for rank in range(2):
        count = 1000 if rank == 0 else 999
        record(files, rank, 2, [*STEP, ("allreduce", count, "float32")], last=False)
    said = analysed(files, 2)
    assert "Collective sequence number: 4 has errors" in said
    assert "SIZE_OR_SYNTAX_MISMATCH" in said


def test_nothing_is_wrong_with_equal_ranks_and_a_ring_keeps_the_newest(tmp_path: Path):
    files = RunDir(tmp_path)
    for rank in range(2):
        record(files, rank, 2, STEP * 400, last=True)
    dump = pickle.loads((flight.write_dumps(files, 2) / "rank_1").read_bytes())  # our own
    numbers = [entry["collective_seq_id"] for entry in dump["entries"]]
    assert numbers == list(range(1200 - 512 + 1, 1201))
    assert {entry["state"] for entry in dump["entries"]} == {"completed"}
    said = analysed(files, 2)
    assert "Not all ranks" not in said and "has errors" not in said


def test_without_collectives_there_is_no_dump(tmp_path: Path):
    files = RunDir(tmp_path)
    assert flight.write_dumps(files, 2) is None
    Recorder(files.collectives(0), 0, 2)
    assert flight.write_dumps(files, 2) is None and not files.flight.exists()
    files.collectives(1).write_bytes(b"\xff\xfe damaged")
    assert flight.read_dump(files.collectives(1)) is None


def test_a_call_takes_microseconds(tmp_path: Path):
    recorder = Recorder(tmp_path / "ring", 0, 2)
    group = recorder.group("0", range(2))
    best = 1.0
    for _ in range(20):
        began = time.perf_counter()
        for number in range(100):
            recorder.ended(recorder.began(group, "allreduce", number, 10, "float32"))
        best = min(best, (time.perf_counter() - began) / 100)
    assert best < 20e-6


@pytest.fixture(autouse=True)
def _off():
    assert flight.recorder is None


# Of a directory with 32 KiB of room, which only this process and its children see.
SMALL = 'mount -t tmpfs -o size=32k none "$0" && exec "$@" "$0"'


def test_without_room_for_the_ring_nothing_is_recorded(tmp_path: Path):
    """A file with holes would be mapped, and end the process (SIGBUS) at a later write."""
    small = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", SMALL, str(tmp_path)]
    can = subprocess.run([*small, "true"], capture_output=True, check=False)
    require("namespaces", can.returncode == 0, "namespaces of users and mounts")
    code = (
        "import sys; from pathlib import Path;"
        "from scaletrain.run import flight; from scaletrain.run.layout import RunDir;"
        "recorded = flight.recorded(RunDir(Path(sys.argv[1])), 0, 2); recorded.__enter__();"
        "print([flight.recorder.began(0, 'allreduce', number, 1, 'int8') for number in range(512)]"
        " if flight.recorder else 'nothing is recorded')"
    )
    argv = [*small, sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "nothing is recorded\n"), done.stderr
