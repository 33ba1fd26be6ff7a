"""Tests of ``scaling/measure/sweep.py`` and ``machine.py``: cells, commands, resumes, failures."""

import json
import subprocess
import sys

import pytest

from scaletrain.errors import UserError
from scaletrain.scaling.explain import report
from scaletrain.scaling.measure import against, machine, sweep


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "job.yaml"
    path.write_text("model: mlp\ndata: digits\nbatch_size: 96\nepochs: 2\n")
    return path


# A stand-in for `scaletrain train` that leaves a run's files, counts its starts, and fails when it
# is told to.
TRAIN = """
import json, pathlib, sys, time
run = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
workers = int(sys.argv[sys.argv.index("--workers") + 1])
exchange = sys.argv[sys.argv.index("--exchange") + 1]
import os
side = os.environ.get("PYTHONPATH", "").split(":")[0].rpartition("/")[2]
with open(sys.argv[1], "a") as log: log.write(f"{exchange} {workers} {side}".strip() + "\\n")
run.mkdir(parents=True)
if exchange == "tree":
    (run / "failure-1.json").write_text(json.dumps({"rank": 1, "host": "h", "step": 3, "kind": "exception", "time": 2, "message": "boom"}))
    (run / "failure-0.json").write_text(json.dumps({"rank": 0, "host": "h", "step": 3, "kind": "peer", "time": 1, "message": "lost rank 1"}))
    sys.exit(1)
if exchange == "star": time.sleep(60)
for rank in range(workers):
    record = dict(step=0, rank=rank, time=1., loss=1., samples=8, lr=.1, step_s=.1)
    record |= dict(input_s=0., forward_s=.05, backward_s=.04, update_s=.01)
    (run / f"rank-{rank}.jsonl").write_text("".join(json.dumps(record | {"step": i, "time": 1 + .1 * i}) + "\\n" for i in range(6)))
(run / "summary.json").write_text(json.dumps(dict(workers=workers, exchange=exchange, batch_size=8 * workers, finished=True)))
"""


@pytest.fixture
def started(monkeypatch, tmp_path):
    """Sweeps start the stand-in; returns how to read what it was started with."""
    script, log = tmp_path / "train.py", tmp_path / "log"
    script.write_text(TRAIN)
    log.touch()
    real = sweep.Sweep.command
    monkeypatch.setattr(
        sweep.Sweep,
        "command",
        lambda self, cell, d, trace=False: [
            sys.executable,
            str(script),
            str(log),
            *real(self, cell, d)[3:],
        ],
    )
    return lambda: log.read_text().splitlines()


def make(config, out, exchanges=("ring",), workers=(1, 2), **options):
    plan = sweep.plan(
        sweep.Request(
            [config],
            workers,
            exchanges,
            **{"repeats": 2, "split": False, "threads": 1, "bind": False, "cold": True} | options,
        )
    )
    sweep.claim(out, plan)
    return plan


def test_repeats_are_interleaved_and_turn_round():
    assert [(c, r) for c, r in sweep.order(["a", "b"], 3)] == [
        ("a", 0),
        ("b", 0),
        ("b", 1),
        ("a", 1),
        ("a", 2),
        ("b", 2),
    ]


def test_cells_cover_workers_exchanges_and_variants(config):
    plan = sweep.plan(
        sweep.Request(
            [config], [1, 2], ["ring", "none"], vary={"batch_size": [32, 64]}, split=False
        )
    )
    assert len(plan.cells()) == 8
    assert {c.batch_size for c in plan.cells()} == {32, 64}
    assert len({c.name for c in plan.cells()}) == 8


def test_references_are_what_the_split_needs_and_no_more(config):
    plan = sweep.plan(sweep.Request([config], [1, 2, 4], ["ring"]))
    references = {(c.exchange, c.workers, c.batch_size) for c in plan.cells() if c.reference}
    assert references == {
        ("none", 1, 96),
        ("none", 2, 96),
        ("none", 4, 96),
        ("none", 1, 48),
        ("none", 1, 24),
    }
    weak = sweep.plan(sweep.Request([config], [1, 2], ["ring", "none"], mode="weak"))
    assert not any(c.reference for c in weak.cells())


def test_reference_runs_are_short(config, tmp_path):
    plan = sweep.plan(sweep.Request([config], [2], ["ring"]))
    reference = next(c for c in plan.cells() if c.reference)
    assert "steps=60" in plan.command(reference, tmp_path) and "epochs=null" in plan.command(
        reference, tmp_path
    )
    assert "steps=60" not in plan.command(plan.cells()[0], tmp_path)


def test_a_failed_cell_keeps_its_first_cause_and_loses_no_other(config, tmp_path, started):
    out = tmp_path / "out"
    plan = make(config, out, ("tree", "ring"))
    lines: list[str] = []
    sweep.run(plan, out, lines.append)
    assert sum("FAILED: rank 1 at step 3: boom" in line for line in lines) == 4
    made = report.of_sweep(out)
    assert [r.repeats for r in made.rows if r.exchange == "ring"] == [2, 2]
    assert all(
        r.failures == ("rank 1 at step 3: boom",) * 2 for r in made.rows if r.exchange == "tree"
    )


def test_a_resume_runs_only_what_is_missing(config, tmp_path, started):
    out = tmp_path / "out"
    sweep.run(make(config, out), out, lambda line: None)
    assert len(started()) == 4
    half = sweep.run_dir(out, make(config, out).cells()[0], 1)
    (half / "summary.json").unlink()
    sweep.run(make(config, out, workers=(1, 2, 3)), out, lambda line: None)
    assert sorted(started()[4:]) == ["ring 1", "ring 3", "ring 3"]


def test_a_directory_of_another_sweep_is_not_mixed_with_this_one(config, tmp_path):
    out = tmp_path / "out"
    make(config, out)
    with pytest.raises(UserError, match="mode differs"):
        make(config, out, mode="weak")
    config.write_text(config.read_text() + "seed: 3\n")
    with pytest.raises(UserError, match="configs differs"):
        make(config, out)


@pytest.mark.slow
def test_a_cell_that_takes_too_long_is_stopped(config, tmp_path, started):
    out = tmp_path / "out"
    plan = make(config, out, ("star",), (1,), cell_timeout_s=1.0, repeats=1)
    sweep.run(plan, out, lambda line: None)
    assert "time limit of 1 s" in report.of_sweep(out).rows[0].failures[0]


def test_mistakes_are_found_before_anything_runs(config):
    with pytest.raises(UserError, match="rong"):
        sweep.plan(sweep.Request([config], [1], ["rong"]))
    with pytest.raises(UserError, match="optimizr"):
        sweep.plan(sweep.Request([config], [1], ["ring"], settings=["optimizr.lr=1"]))
    with pytest.raises(UserError, match="cannot share"):
        sweep.plan(sweep.Request([config], [200], ["ring"]))


def test_more_threads_than_cores_is_marked(config, tmp_path, started):
    out = tmp_path / "out"
    sweep.run(make(config, out, workers=(1, 64), repeats=1, bind=False), out, lambda line: None)
    for path in out.rglob("rank-*.jsonl"):
        path.with_suffix(".json").write_text(
            json.dumps(
                {
                    "node": 0,
                    "device": "cpu",
                    "threads": 1,
                    "cores": [0, 1],
                    "environment": {"commit": "a"},
                }
            )
        )
    assert [r.oversubscribed for r in report.of_sweep(out).rows] == [
        "",
        "more threads than cores",
    ]


def test_what_others_use_of_the_machine_is_recorded(config, tmp_path, started, monkeypatch):
    """The cores worked a second longer than the run's own processes did."""
    clock = iter(range(1000))
    monkeypatch.setattr(machine, "_busy_s", lambda: float(next(clock)))
    monkeypatch.setattr(machine, "_own_s", lambda: 0.0)
    out = tmp_path / "out"
    plan = make(config, out, workers=(1,), repeats=1)
    sweep.run(plan, out, lambda line: None)
    path = machine.path(sweep.run_dir(out, plan.cells()[0], 0))
    assert 0.1 < json.loads(path.read_text())["used_by_others"] <= 1
    assert "BUSY MACHINE" in report.of_sweep(out).summary


def test_where_the_system_does_not_tell_nothing_is_recorded(config, tmp_path, started, monkeypatch):
    monkeypatch.setattr(machine, "_busy_s", lambda: None)
    out = tmp_path / "out"
    sweep.run(make(config, out, workers=(1,), repeats=1), out, lambda line: None)
    assert not [*out.rglob("machine.json")] and "BUSY" not in report.of_sweep(out).summary


def test_own_work_is_not_that_of_others(monkeypatch):
    """The cores worked as long as this process and its children did, which is measured here, plus
    nothing.
    """
    monkeypatch.setattr(machine, "_busy_s", lambda: 100.0 + machine._own_s())
    watch = machine.Watch()
    subprocess.run([sys.executable, "-c", "sum(range(5_000_000))"], check=True)
    assert watch.others() == pytest.approx(0, abs=0.01)


def test_what_the_sweep_decides_cannot_be_set_beside_it(config, tmp_path):
    plan = sweep.plan(
        sweep.Request([config], [1, 2], ["ring"], settings=["batch_size=64", "seed=5"])
    )
    for cell in plan.cells():  # a reference computes on a worker's share, whatever the setting says
        words = plan.command(cell, tmp_path)
        assert [word for word in words if word.startswith("batch_size=")][
            -1
        ] == f"batch_size={cell.batch_size}"
    assert {cell.batch_size for cell in plan.cells()} == {64, 32}
    with pytest.raises(UserError, match="--threads"):
        sweep.plan(sweep.Request([config], [1], ["ring"], settings=["threads=2"]))
    with pytest.raises(UserError, match="--mode"):
        sweep.plan(sweep.Request([config], [1], ["ring"], vary={"batch_mode": ["weak", "strong"]}))
    with pytest.raises(UserError, match="numbers and words"):
        sweep.plan(
            sweep.Request(
                [config],
                [2],
                ["ring"],
                launcher="rehearsal",
                vary={"launcher.straggler": [{1: 2.0}]},
            )
        )


def test_a_straggler_is_left_out_where_its_host_is_not_there(config, tmp_path):
    plan = sweep.plan(
        sweep.Request(
            [config], [1, 2], ["ring"], launcher="rehearsal", vary={"launcher.straggler.1": [1, 2]}
        )
    )
    told = {
        (cell.workers, "launcher.straggler.1=2" in plan.command(cell, tmp_path))
        for cell in plan.cells()
        if cell.variant[0][1] == 2
    }
    assert told == {(1, False), (2, True)}


def test_two_versions_take_turns(config, tmp_path, started, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    other = tmp_path / "other"
    (other / "scaletrain").mkdir(parents=True)
    (other / "scaletrain" / "__init__.py").touch()
    out = tmp_path / "out"
    plan = make(config, out, split=True)
    version = against.find(str(other), tmp_path / "copy")
    second = sweep.Against(version, out / "against")
    sweep.run(plan, out, lambda line: None, against=second)
    starts = started()
    # References are this version's alone. The other one begins every second repeat.
    asked_for = [line for line in starts if line.startswith("ring")]
    assert asked_for[:4] == ["ring 1", "ring 1 other", "ring 2", "ring 2 other"]
    assert asked_for[4:] == ["ring 2 other", "ring 2", "ring 1 other", "ring 1"]
    assert "none 1 other" not in starts and "none 1" in starts
    for cell in plan.cells():
        assert sweep.run_dir(second.out, cell, 0).exists() is not cell.reference


def test_the_other_version_is_a_commit_or_a_folder(tmp_path):
    with pytest.raises(UserError, match="no folder scaletrain"):
        against.find(str(tmp_path), tmp_path / "copy")
    with pytest.raises(UserError, match="--against: no-such-commit is not allowed"):
        against.find("no-such-commit", tmp_path / "copy")
    if not (against.PACKAGE.parent / ".git").exists():
        pytest.skip("scaletrain does not run from a checkout")
    version = against.find("HEAD", tmp_path / "copy")
    assert (version.folder / "scaletrain" / "__init__.py").exists() and len(version.name) == 12
    assert version.environ["PYTHONPATH"].startswith(str(tmp_path / "copy"))
    assert against.find("HEAD", tmp_path / "copy") == version  # used again
