"""Tests of ``scaling/measure/servers.py``: counts are shown, and faster is not always sooner."""

import dataclasses
import io
import json

import numpy as np
import pytest
from rich.console import Console

from scaletrain.run.records import StepRecord
from scaletrain.scaling.explain import report
from scaletrain.scaling.measure import servers
from scaletrain.scaling.model import ServerCounts
from scaletrain.scaling.show import render, table
from tests.scaling.runs import write_run


def with_losses(directory, exchange: str, step_s: float, losses: list[float]):
    write_run(directory, exchange=exchange, steps=[[step_s] * len(losses)] * 2)
    for rank in range(2):
        path = directory / f"rank-{rank}.jsonl"
        records = [StepRecord(**json.loads(line)) for line in path.read_text().splitlines()]
        changed = [
            dataclasses.replace(r, loss=loss) for r, loss in zip(records, losses, strict=True)
        ]
        path.write_text(
            "\n".join(json.dumps(dataclasses.asdict(record)) for record in changed) + "\n"
        )
    return directory


def write_servers(directory, **changes) -> None:
    for index in range(2):
        value = {
            "mode": "async", "staleness": {"0": 30, "2": 10}, "pushes": {"0": 20, "1": 30}, "dropped": {"0": 0, "1": 5},
            "step_s": {"0": 0.01, "1": 0.05}, "lost": [{"rank": 1, "reason": "its connection is closed"}], "refused": {},
            "restored_at_update": None, "cpu_s_per_worker": 1.0, "memory_bytes": 5,
        }  # fmt: skip
        (directory / f"server-{index}.json").write_text(json.dumps(value | changes))


def test_what_several_servers_counted_is_added_up(tmp_path):
    assert servers.read(tmp_path) is None
    write_servers(tmp_path)
    (tmp_path / "server-0.address.json").write_text("{}")
    found = servers.read(tmp_path)
    assert (
        found.servers == 2 and found.staleness == {"0": 60, "2": 20} and found.staleness_mean == 0.5
    )
    assert found.dropped == 0.1 and found.pace_s == (0.01, 0.05)
    line = servers.text(found)
    for part in (
        "2 servers, async",
        "0: 75 %, 2: 25 %",
        "10.0 % dropped",
        "10.0, 50.0 ms",
        "lost rank 1: its connection",
    ):
        assert part in line
    write_servers(tmp_path, restored_at_update=40)
    assert "restored at update 40" in servers.text(servers.read(tmp_path))


def test_time_to_loss_is_when_the_smoothed_loss_gets_there():
    losses = np.linspace(2.0, 0.0, 21)[:, None]
    ended = np.arange(1.0, 22.0)[:, None]
    assert servers.smoothed(losses)[0] == pytest.approx(losses[:10].mean())
    assert servers.time_to_loss(losses, ended, losses[:10].mean() + 1e-9) == 10.0
    assert servers.time_to_loss(losses, ended, losses[4:14].mean() + 1e-9) == 14.0
    assert servers.time_to_loss(losses, ended, -1.0) is None


def test_faster_steps_can_reach_a_loss_later(tmp_path):
    falling = list(np.linspace(2.0, 0.5, 40))
    slowly = list(np.linspace(2.0, 1.0, 40))
    sync = with_losses(tmp_path / "sync", "ring", 0.10, falling)
    eager = with_losses(tmp_path / "async", "parameter_server", 0.08, slowly)
    write_servers(eager)
    made = report.of_runs([sync, eager])
    first, second = made.rows
    assert second.samples_per_s > first.samples_per_s
    assert made.loss_reached == pytest.approx(np.mean(slowly[-10:]))  # the lowest that both reached
    assert first.time_to_loss_s < second.time_to_loss_s
    for page in (render.markdown(made), render.html(made)):
        assert "time to loss" in page and "0: 75 %, 2: 25 %" in page
    console = Console(width=200, record=True, file=io.StringIO())
    table.show(made, console)
    assert (
        f"parameter_server on {second.workers}: 2 servers, async; staleness 0: 75 %"
        in console.export_text()
    )


def test_rare_staleness_is_shown_together():
    counts = ServerCounts(
        servers=1, cores=(0,), mode="async", staleness={"0": 900, "1": 80, "9": 5, "40": 6, "17": 9}, staleness_mean=0.5,
        dropped=0.0, pace_s=(), lost={}, refused=0, restored_at_update=None, cpu_s_per_worker=1.0, memory_bytes=5,
    )  # fmt: skip
    assert "; staleness 0: 90 %, 1: 8 %, others, up to 40: 2 %; " in servers.text(counts)


def test_without_servers_there_is_no_such_table(tmp_path):
    made = report.of_runs([with_losses(tmp_path / "a", "ring", 0.1, [1.0] * 20)])
    assert made.loss_reached is None
    assert "time to loss" not in render.markdown(made)


def test_losses_of_different_jobs_are_not_compared(tmp_path):
    one = with_losses(tmp_path / "a", "ring", 0.1, [2.0] * 20)
    other = with_losses(tmp_path / "b", "parameter_server", 0.1, [0.5] * 20)
    write_servers(other)
    assert report.of_runs([one, other]).loss_reached is not None
    summary = json.loads((other / "summary.json").read_text())
    (other / "summary.json").write_text(json.dumps(summary | {"name": "another"}))
    assert report.of_runs([one, other]).loss_reached is None
