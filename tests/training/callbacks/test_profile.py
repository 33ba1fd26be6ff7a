"""Tests of training/callbacks/profile.py: each rank's trace shows the window, and nothing else."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from scaletrain.run.layout import RunDir
from tests.ranks import run_ranks
from tests.training import jobs

JOB = {
    "model": {"name": "mlp", "sizes": [8, 16, 4]},
    "data": "tests.training.jobs:vectors",
    "batch_size": 16,
    "steps": 8,
    "exchange": "ring",
    "callbacks": [{"name": "profile", "wait": 3, "steps": 2}],
}


def events(run_dir: Path, rank: int) -> list[dict[str, Any]]:
    with gzip.open(RunDir(run_dir).profile(rank), "rt", encoding="utf-8") as file:
        return json.load(file)["traceEvents"]


@pytest.mark.slow
def test_buckets_and_rounds_lie_in_the_steps_beside_torchs_operations(tmp_path: Path):
    run_ranks(jobs.train_rank, 2, JOB, tmp_path)
    for rank in (0, 1):
        trace = events(tmp_path, rank)
        own = [event for event in trace if event.get("cat") == "scaletrain"]
        steps = [event for event in own if event["tid"] == "step"]
        assert [step["name"] for step in steps] == ["step 3", "step 4"]
        begins, ends = steps[0]["ts"], steps[1]["ts"] + steps[1]["dur"]
        for kind in ("bucket", "round", "wait"):
            spans = [event for event in own if event["name"].startswith(kind)]
            assert spans, kind
            for span in spans:
                assert begins <= span["ts"] and span["ts"] + span["dur"] <= ends + 1e3
        # Both clocks are one: the backward pass of torch's trace lies in our step.
        backward = [event for event in trace if event["name"].endswith("AddmmBackward0")]
        assert backward
        assert all(begins <= event["ts"] <= ends for event in backward)


@pytest.mark.slow
def test_a_run_that_ends_in_the_window_has_what_there_was(tmp_path: Path):
    tree = JOB | {"exchange": "native", "callbacks": [{"name": "profile", "wait": 6, "steps": 9}]}
    run_ranks(jobs.train_rank, 1, tree, tmp_path)
    names = {event["name"] for event in events(tmp_path, 0)}
    assert {"step 6", "step 7", "bucket 0"} <= names and "step 5" not in names
