"""Tests of training/tracking.py and of the trackers over it: what is in their files at the end.

One job of two workers logs to all trackers, stops and is resumed. What may go wrong is tried with
trackers of our own, in this process.
"""

import contextlib
import importlib.util
import itertools
import json
import os
import socket
import sqlite3
import struct
import threading
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from scaletrain.errors import UserError
from scaletrain.needs import Needs
from scaletrain.run.layout import RunDir
from scaletrain.run.records import StepRecord
from scaletrain.training import tracking
from scaletrain.training.callbacks import Callback
from scaletrain.training.tracking import Place, Tracker, TrackerRun
from scaletrain.training.trainer import Trainer
from scaletrain.world import World
from tests.conftest import require
from tests.ranks import run_ranks
from tests.training import jobs

JOB = {
    "name": "tracked",
    "model": {"name": "mlp", "sizes": [8, 16, 4]},
    "data": "tests.training.jobs:vectors",
    "batch_size": 15,  # 8 and 7 samples a worker
    "steps": 12,
    "evaluate_every": 6,
    "exchange": "native",
    "lr_schedule": "cosine",
}
TRACKERS = [
    {"name": "tensorboard", "every": 2},
    {"name": "wandb", "every": 2, "mode": "offline"},
    {"name": "mlflow", "every": 2},
    {"name": "prometheus"},
]


def has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunDir, dict[int, float]]:
    """The directory of a run that stopped after 6 steps and was resumed; its losses by step."""
    for tracker in TRACKERS:
        name = tracker["name"]
        library = "prometheus_client" if name == "prometheus" else name
        require(name, has(library), 'pip install "scaletrain[trackers]"')
    run_dir = tmp_path_factory.mktemp("tracked")
    tree = JOB | {"callbacks": TRACKERS}
    losses: dict[int, list[float]] = {}
    parts = [
        run_ranks(jobs.train_rank, 2, tree, run_dir, False, 6),
        run_ranks(jobs.train_rank, 2, tree, run_dir, True),
    ]
    for part in parts:
        for result in part:
            for record in result["records"]:
                weighted = losses.setdefault(record.step, [0.0, 0.0])
                weighted[0] += record.loss * record.count
                weighted[1] += record.count
    # Each figure is the mean over two steps and both ranks.
    means = {}
    for step in range(2, 13, 2):
        totals = [losses[step - 2], losses[step - 1]]
        means[step] = sum(total for total, _ in totals) / sum(count for _, count in totals)
    return RunDir(run_dir), means


def check(figures: dict[str, dict[int, float]], losses: dict[int, float]) -> None:
    assert figures["loss"] == pytest.approx(losses, rel=1e-6)
    assert figures["lr"].keys() == losses.keys()
    assert min(figures["samples_per_s"].values()) > 0
    assert {6, 12} <= figures["test_loss"].keys() and {6, 12} <= figures["test_accuracy"].keys()


@pytest.mark.slow
def test_tensorboard_has_both_parts_of_the_run(tracked):
    run_dir, losses = tracked
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir.tracker("tensorboard")))
    events.Reload()
    figures = {}
    for name in events.Tags()["scalars"]:
        figures[name] = {event.step: event.value for event in events.Scalars(name)}
    check(figures, losses)


@pytest.mark.slow
def test_mlflow_has_both_parts_in_one_run(tracked):
    run_dir, losses = tracked
    database = sqlite3.connect(run_dir.tracker("mlflow") / "mlflow.db")
    assert database.execute("select name, status from runs").fetchall() == [("tracked", "FINISHED")]
    parameters = dict(database.execute("select key, value from params"))
    assert parameters["batch_size"] == "15" and parameters["lr_schedule.name"] == "cosine"
    figures: dict[str, dict[int, float]] = {}
    for name, step, value in database.execute("select key, step, value from metrics"):
        figures.setdefault(name, {})[step] = value
    check(figures, losses)


def wandb_records(path: Path) -> list[bytes]:
    """The records of a file of wandb: LevelDB's log format after a header of 7 bytes."""
    content = path.read_bytes()
    position = 7
    records = []
    record = b""
    while position + 7 <= len(content):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack_from("<IHB", content, position)
        position += 7
        record += content[position : position + length]
        position += length
        if kind in (1, 4):  # whole, or the last part
            records.append(record)
            record = b""
    return records


@pytest.mark.slow
def test_wandb_goes_on_in_the_same_run(tracked):
    run_dir, losses = tracked
    from wandb.proto.wandb_internal_pb2 import Record

    figures: dict[str, dict[int, float]] = {}
    identifiers = set()
    files = [*run_dir.tracker("wandb").rglob("*.wandb")]
    for data in itertools.chain.from_iterable(map(wandb_records, files)):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            identifiers.add(record.run.run_id)
        row = {}
        for item in record.history.item:
            row[item.key or item.nested_key[0]] = json.loads(item.value_json)
        for name, value in row.items():
            figures.setdefault(name, {})[row["step"]] = value
    assert len(files) == 2 and len(identifiers) == 1
    check(figures, losses)


@pytest.mark.slow
def test_prometheus_has_a_file_for_each_rank(tracked):
    run_dir, _ = tracked
    from prometheus_client.parser import text_string_to_metric_families

    for rank in (0, 1):
        samples = {}
        for family in text_string_to_metric_families(run_dir.prometheus(rank).read_text()):
            for sample in family.samples:
                assert sample.labels["run"] == "tracked" and sample.labels["rank"] == str(rank)
                samples[sample.name, sample.labels.get("figure")] = sample.value
        assert samples["scaletrain_step", None] == 12
        written_at = os.path.getmtime(run_dir.prometheus(rank))
        last_step_at = samples["scaletrain_last_step_timestamp_seconds", None]
        assert 0 < written_at - last_step_at < 20
        assert samples["scaletrain_samples_per_second", None] > 0
        assert (("scaletrain_evaluation", "test_loss") in samples) == (rank == 0)


class Failing(TrackerRun):
    """A tracker whose disk is full after some figures."""

    def __init__(self, place: Place):
        self._left = 2

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._left -= 1
        if not self._left:
            raise OSError(28, "No space left on device")

    def end(self, summary: Mapping[str, Any] | None) -> None:
        raise AssertionError("it has failed before")


class Stuck(TrackerRun):
    """A tracker whose server never answers."""

    def __init__(self, place: Place):
        threading.Event().wait()

    def log(self, step: int, figures: Mapping[str, float]) -> None: ...

    def end(self, summary: Mapping[str, Any] | None) -> None: ...


def failing(trainer: Trainer) -> Callback:
    return Tracker(trainer, "full", Failing, Needs(package="torch"), 1)


def stuck(trainer: Trainer) -> Callback:
    return Tracker(trainer, "away", Stuck, Needs(package="torch"), 1)


def absent(trainer: Trainer) -> Callback:
    return Tracker(trainer, "absent", Failing, Needs("no_such_library", "pip install it"), 1)


class Ends(Callback):
    """Notes how the run ended; raises after a step."""

    def __init__(self, run_dir: Path, raise_after: int | None):
        self._file = run_dir / "ended"
        self._raise_after = raise_after

    def after_step(self, record: StepRecord) -> None:
        if record.step == self._raise_after:
            raise ArithmeticError("mine")

    def close(self, summary: Mapping[str, Any] | None) -> None:
        self._file.write_text("by an error" if summary is None else str(summary["steps"]))


def ends(trainer: Trainer, *, raise_after: int | None = None) -> Callback:
    return Ends(trainer.run_dir, raise_after)


class Unclosable(Callback):
    def close(self, summary: Mapping[str, Any] | None) -> None:
        raise OSError("mine")


def unclosable(trainer: Trainer) -> Callback:
    return Unclosable()


def own(name: str, **options: Any) -> dict[str, Any]:
    callback = {"name": f"tests.training.test_tracking:{name}"} | options
    return JOB | {"exchange": "none", "callbacks": [callback]}


def train(tree: dict[str, Any], run_dir: Path, stop_at: int | None = None) -> dict[str, Any]:
    """Train in this process, and leave no process group behind."""
    try:
        return jobs.train_rank(0, 1, tree, run_dir, stop_at=stop_at)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_a_tracker_that_fails_does_not_end_the_training(tmp_path: Path, capfd):
    result = train(own("failing"), tmp_path)
    assert result["summary"]["finished"]
    [line] = capfd.readouterr().err.splitlines()
    assert line.startswith("callbacks: full has failed, and the run goes on without it: OSError")


def test_a_server_that_is_away_does_not_hold_up_the_training(
    tmp_path: Path, capfd, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tracking, "_PATIENCE_S", 1.0)
    began = time.monotonic()
    result = train(own("stuck"), tmp_path)
    assert result["summary"]["finished"] and time.monotonic() - began < 20
    [line] = capfd.readouterr().err.splitlines()
    assert line == "callbacks: away did not take the last figures in time"


def test_a_missing_library_is_one_line(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"^callbacks: absent needs no_such_library \(pip install it\)$"
    ):
        train(own("absent"), tmp_path)


@pytest.mark.parametrize(
    ("options", "stop_at", "ended"),
    [({}, None, "12"), ({}, 5, "5"), ({"raise_after": 3}, None, "by an error")],
)
def test_callbacks_are_closed_however_the_run_ends(
    options: dict[str, Any], stop_at: int | None, ended: str, tmp_path: Path
):
    with contextlib.suppress(ArithmeticError):
        train(own("ends", **options), tmp_path, stop_at)
    assert (tmp_path / "ended").read_text() == ended


def test_one_that_cannot_be_closed_does_not_keep_the_others_open(tmp_path: Path):
    tree = own("ends")
    unclosable = {"name": "tests.training.test_tracking:unclosable"}
    tree["callbacks"] = [unclosable, *tree["callbacks"], unclosable]
    with pytest.raises(OSError, match="mine"):
        train(tree, tmp_path)
    assert (tmp_path / "ended").read_text() == "12"


def test_prometheus_answers_http_on_a_port_for_each_rank(tmp_path: Path):
    require("prometheus", has("prometheus_client"), 'pip install "scaletrain[trackers]"')
    from scaletrain.training.callbacks import prometheus

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        world = World(rank=1, size=2, local_rank=1, local_size=2)
        trainer: Any = SimpleNamespace(
            run_dir=tmp_path, world=world, config=SimpleNamespace(name="r")
        )
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1: Address already in use"):
            prometheus.callback(trainer, port=port - 1)
    callback = prometheus.callback(trainer, port=port - 1)
    callback.after_step(StepRecord(4, 1, 0.0, 0.5, 8, 0.1, 0.25, 0, 0, 0, 0))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    assert 'scaletrain_step{rank="1",run="r"} 5.0' in text
    assert 'scaletrain_samples_per_second{rank="1",run="r"} 32.0' in text
