"""Tests of ``scaling/explain/compare.py``: a change is told from noise."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from scaletrain.cli import cli
from scaletrain.errors import UserError
from scaletrain.scaling.explain import report
from scaletrain.scaling.explain.compare import CellChange, compare, differences, lines
from scaletrain.scaling.measure.intervals import Change
from scaletrain.scaling.model import Repeat, Report, ReportHeader

from .runs import write_run


def make(folder, seconds):
    """A report of two repeats and a little noise."""
    runs = [
        write_run(folder / str(i), steps=[[s] * 6] * 2)
        for i, s in enumerate([seconds, seconds * 1.01, seconds * 0.99])
    ]
    return report.of_runs(runs)


def test_a_slowdown_beyond_the_noise_is_a_regression(tmp_path):
    old, new = make(tmp_path / "old", 0.100), make(tmp_path / "new", 0.120)
    (change,) = compare(new, old)
    assert change.regressed and "REGRESSION" in lines([change])[0]
    (back,) = compare(old, new)
    assert back.improved and not back.regressed


def test_noise_is_none(tmp_path):
    (change,) = compare(make(tmp_path / "new", 0.1005), make(tmp_path / "old", 0.100))
    assert not change.regressed and not change.improved


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (0.97, 1.02, "no real change"),
        (0.46, 2.19, "cannot tell"),
        (0.96, 1.30, "cannot tell"),
        (0.6, 0.9, "REGRESSION"),
    ],
)
def test_a_wide_interval_does_not_tell_that_nothing_changed(low, high, told):
    cell = CellChange("ring on 2", Change((low + high) / 2, low, high))
    assert told in lines([cell])[0]


def test_settings_that_differ_are_named_and_repeats_are_not():
    def header(**changes):
        text = "model: mlp\noptimizer: {name: sgd, lr: 0.1}\nepochs: 5\n"
        facts = {"config": {"job": text}, "settings": (), "bound_to_cores": True, "repeats": 3}
        return Report(version=1, header=ReportHeader(**(facts | changes)), summary="", rows=())

    assert differences(header(repeats=2), header()) is None
    assert differences(header(config={"other": "epochs: 1"}), header()) is None
    told = differences(
        header(settings=["epochs=2", "optimizer.lr=0.1"], bound_to_cores=False), header()
    )
    assert told == "measured with different settings: epochs 5 -> 2, bound_to_cores true -> false"


def test_a_cell_that_fails_now_is_a_regression(tmp_path):
    old = make(tmp_path / "old", 0.1)
    new = replace(old, rows=(replace(old.rows[0], runs=(), failures=("boom",)),))
    assert compare(new, old)[0].regressed
    new = replace(old, rows=(replace(old.rows[0], runs=()),))  # not measured yet
    (unknown,) = compare(new, old)
    assert not unknown.regressed and "cannot tell" in lines([unknown])[0]


def test_reports_without_a_common_cell_cannot_be_compared(tmp_path):
    old = make(tmp_path / "old", 0.1)
    new = replace(old, rows=(replace(old.rows[0], exchange="tree"),))
    with pytest.raises(UserError, match="no cell in common"):
        compare(new, old)


@pytest.mark.parametrize(("seconds", "status"), [(0.1, 0), (0.15, 2)])
def test_the_exit_code_tells(tmp_path, seconds, status):
    (tmp_path / "old.json").write_text(json.dumps(make(tmp_path / "old", 0.1).to_json()))
    make(tmp_path / "new", seconds)
    runs = [str(tmp_path / "new" / str(i)) for i in range(3)]
    done = CliRunner().invoke(
        cli,
        ["report", *runs, "--out", str(tmp_path / "out"), "--baseline", str(tmp_path / "old.json")],
    )
    assert done.exit_code == status, done.output


def test_many_cells_are_judged_together(tmp_path):
    """By 95 % each, every twentieth cell would be told to have changed where nothing did."""
    chance = np.random.default_rng(0)

    def runs(rates):
        return tuple(Repeat(samples_per_s=rate, step_s=0.1) for rate in rates)

    def noisy(name, cells=20):
        made = [
            make(tmp_path / name / str(cell), 0.1 * (1 + 0.02 * chance.standard_normal()))
            for cell in range(cells)
        ]
        rows = [
            replace(
                one.rows[0],
                variant={"cell": cell},
                runs=runs(1000 * (1 + 0.02 * chance.standard_normal()) for _ in range(4)),
            )
            for cell, one in enumerate(made)
        ]
        return replace(made[0], rows=tuple(rows))

    changes = [compare(noisy(f"new{i}"), noisy(f"old{i}")) for i in range(5)]
    assert sum(any(cell.regressed or cell.improved for cell in cells) for cells in changes) <= 1
    assert "of all 20 together" in lines(changes[0])[0]
    slow = noisy("slow")
    rows = list(slow.rows)
    rows[7] = replace(rows[7], runs=runs(700 + i for i in range(4)))
    slow = replace(slow, rows=tuple(rows))
    assert [cell.regressed for cell in compare(slow, noisy("before"))].count(True) == 1
