"""Tests of cli/progress_bar.py: the bar of a run that goes on begins where the run does."""

import io
import json
import re
import threading
import time
from pathlib import Path

import pytest
from rich.console import Console

from scaletrain.cli import progress_bar
from scaletrain.run.atomic import write_json
from scaletrain.run.layout import RunDir
from scaletrain.run.records import RecordWriter, StepRecord, cut_lines

HEADER = {"num_steps": 200, "global_batch": 64, "evaluate_every": None, "save_every": None}


def write_steps(run_dir: Path, first: int, end: int, *, append: bool) -> None:
    writer = RecordWriter(run_dir, 0, append=append)
    for step in range(first, end):
        times = {"input_s": 0, "forward_s": 0, "backward_s": 0, "update_s": 0}
        writer.write(StepRecord(step, 0, 100.0 + step, 0.5, 32, 0.1, step_s=1.0, **times))
    writer.close()


def until(condition, limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_records_of_the_part_before_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    drawn = io.StringIO()
    console = Console(file=drawn, force_terminal=True, width=140)
    monkeypatch.setattr(progress_bar, "Console", lambda stderr: console)
    monkeypatch.setattr(progress_bar, "_REFRESH_S", 0.02)
    files = RunDir(tmp_path)
    write_json(files.header(0), HEADER | {"num_steps": 100})
    write_steps(tmp_path, 0, 90, append=False)
    over = threading.Event()
    arguments = (files, progress_bar._version(files.header(0)), over)
    follower = threading.Thread(target=progress_bar._follow, args=arguments, daemon=True)
    follower.start()
    try:
        time.sleep(0.1)  # the worker is starting
        cut_lines(files.records(0), lambda record: record["step"] < 50)
        write_json(files.header(0), HEADER)
        time.sleep(0.1)
        assert "/" not in drawn.getvalue(), "nothing of the old part is drawn"
        write_steps(tmp_path, 50, 60, append=True)
        until(lambda: "60/200" in drawn.getvalue())
    finally:
        over.set()
        follower.join(20)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", drawn.getvalue())
    assert "90/" not in text
    assert "140 s left" not in text and "2 min left" in text
    assert json.loads(files.header(0).read_text())["num_steps"] == 200
