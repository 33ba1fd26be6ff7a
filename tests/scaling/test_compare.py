"""Tests of ``scaling/explain/compare.py``: a change is told from noise."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

from scaletrain.cli import cli
from scaletrain.errors import UserError
from scaletrain.scaling.explain import report
from scaletrain.scaling.explain.compare import (
    CellChange,
    compare,
    differences,
    lines,
    power_in_words,
)
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
        (0.94, 1.02, "cannot tell"),
        (0.96, 1.30, "not slower by 5%"),
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


def test_runs_in_turns_show_what_two_sessions_hide(tmp_path):
    """3 % slower while the machine itself varies by 10 % from repeat to repeat."""
    old = make(tmp_path / "old", 0.1)
    pace = [1.0, 0.9, 1.1, 0.95, 1.05]

    def with_rates(rates, turns):
        row = replace(old.rows[0], runs=tuple(Repeat(rate, 0.1) for rate in rates))
        return replace(old, rows=(row,), header=replace(old.header, turns=turns))

    before = [100 * p for p in pace]
    after = [97 * p * q for p, q in zip(pace, [1.001, 0.999, 1.0, 1.0005, 1.0], strict=True)]
    turns = "2026-01-01T00:00:00Z"
    (seen,) = compare(with_rates(after, turns), with_rates(before, turns))
    assert seen.regressed and seen.change.ratio == pytest.approx(0.97, abs=0.002)
    for new_turns, old_turns in ((turns, None), (None, None), (turns, "another")):
        (hidden,) = compare(with_rates(after, new_turns), with_rates(before, old_turns))
        assert not hidden.regressed and "cannot tell" in hidden.verdict
    # A repeat that failed leaves no pairs.
    (unpaired,) = compare(with_rates(after[:4], turns), with_rates(before, turns))
    assert unpaired.change is not None and not unpaired.regressed


def test_a_slow_repeat_of_the_baseline_hides_no_slowdown(tmp_path):
    old = make(tmp_path / "old", 0.1)

    def with_rates(rates):
        row = replace(old.rows[0], runs=tuple(Repeat(rate, 0.1) for rate in rates))
        return replace(old, rows=(row,))

    (change,) = compare(with_rates([90, 90.5, 89.5, 90, 90.2]), with_rates([100, 101, 99, 100, 55]))
    assert change.regressed


def test_the_repeats_that_a_change_needs_are_told_before_measuring(tmp_path):
    told = power_in_words(5, 2, in_turns=True)
    assert "scatter by 1.0%" in told and "5% by 4" in told and "planned: 5" in told, told
    told = power_in_words(5, 2, in_turns=False, before=make(tmp_path / "old", 0.1))
    assert "scattered by 1.0%" in told and "1% by more than 30" in told, told
    assert "--against" in told
