"""Tests of ``scaling/explain/convergence.py``, on runs whose true samples to accuracy are known."""

import json
import random
from dataclasses import replace

import pytest
from click.testing import CliRunner

from scaletrain.cli import cli
from scaletrain.errors import UserError
from scaletrain.run.layout import RunDir
from scaletrain.scaling.explain import convergence, headline, report
from scaletrain.scaling.measure.run import read_run
from scaletrain.scaling.model import Reached, Repeat, Report, ReportHeader, Row
from scaletrain.scaling.show import render

from .runs import write_run

EVERY = 500  # samples between evaluations


def reached(samples):
    """Return when an evaluation finds what was reached after so many samples."""
    at = -(-samples // EVERY) * EVERY
    return Reached(int(at), int(at - EVERY))


def row(exchange, workers, samples, **facts):
    """Return a row whose repeats truly needed ``samples``; None: a repeat did not get there."""
    runs = tuple(Repeat(100.0 * workers, 0.1, 1.0, each and reached(each)) for each in samples)
    return Row("job", exchange, workers, 96, {}, runs=runs, samples_per_s=100.0 * workers,
               repeats=len(runs), **facts)  # fmt: skip


def of(*rows, stated=()):
    return convergence.of(Report(1, ReportHeader(mode="strong"), "", rows), stated)


def drawn(draw, mean, scatter, n=5):
    return [mean * (1 + draw.gauss(0, scatter)) for _ in range(n)]


@pytest.mark.parametrize("scatter", [0.02, 0.06])
def test_equal_learning_is_hardly_ever_flagged_and_a_fifth_fewer_samples_nearly_always(scatter):
    draw = random.Random(1)
    false, right = 0, 0
    for _ in range(300):
        alone = row("none", 1, drawn(draw, 40_000, scatter))
        [same] = of(alone, row("ring", 4, drawn(draw, 40_000, scatter)))
        [fewer] = of(alone, row("ring", 4, drawn(draw, 30_000, scatter)))
        [more] = of(alone, row("ring", 4, drawn(draw, 50_000, scatter)))
        false += same.is_too_fast
        right += fewer.is_too_fast
        assert not more.is_too_fast
    assert false <= 12  # 2.5 % of 300, with three standard deviations
    assert right >= 285


def test_one_evaluation_earlier_is_no_evidence():
    """Nobody looked in between, and the scatter is small enough to see half of it."""
    alone = row("none", 1, [5_010, 5_020, 5_600, 5_030, 5_040])
    [earlier] = of(alone, row("ring", 2, [4_980, 4_990, 5_400, 4_970, 4_960]))
    assert earlier.samples < earlier.reference_samples and not earlier.is_too_fast
    [far] = of(alone, row("ring", 2, [3_980, 3_990, 4_400, 3_970, 3_960]))
    assert far.is_too_fast


def test_repeats_of_one_seed_are_taken_to_scatter_as_seeds_do():
    """Equal repeats know nothing of other seeds: 6 % fewer samples may be luck, 15 % are not."""
    alone = row("none", 1, [40_000] * 3)
    assert of(alone, row("ring", 2, [40_000] * 3))[0].samples_ci95 is None
    assert not of(alone, row("ring", 2, [37_500] * 3))[0].is_too_fast
    assert of(alone, row("ring", 2, [34_000] * 3))[0].is_too_fast
    assert of(row("none", 1, [40_000]), row("ring", 2, [34_000]))[0].is_too_fast


def test_only_rows_whose_repeats_all_reached_the_target_are_judged():
    alone = row("none", 1, [40_000, 41_000])
    assert of(alone, row("ring", 2, [20_000, None])) == ()
    assert of(row("none", 1, [40_000, None]), row("ring", 2, [20_000, 20_000])) == ()
    assert of(alone, row("none", 2, [20_000, 20_500])) == (), "each trains a model of its own"
    other = replace(row("ring", 2, [20_000, 20_500]), config="other")
    assert of(alone, other) == (), "another job is no reference"


def test_a_stated_reference_takes_the_place_of_one_worker():
    rows = (row("none", 1, [30_000, 31_000, 30_500]), row("ring", 2, [30_000, 30_700, 30_300]))
    assert [each.label for each in of(*rows)] == ["ring on 2"]
    judged = of(*rows, stated=[40_000, 41_000, 40_500])
    assert [(each.label, each.is_too_fast) for each in judged] == [
        ("none on 1", True),
        ("ring on 2", True),
    ]
    assert judged[0].reference == "the stated reference"


def runs_of(tmp_path, workers, target_steps):
    """Write runs, of other seeds each, that reach the target at these steps; evaluated each 5."""
    directories = []
    for seed, step in enumerate(target_steps):
        directory = tmp_path / f"{workers}-{seed}"
        write_run(
            directory,
            exchange="ring",
            steps=[[0.1 / workers] * 8] * workers,
            samples=96 // workers,
            target_step=step,
            target_s=step * 0.1 / workers,
        )
        lines = [json.dumps({"step": 5 * (n + 1), "test_accuracy": 0.9}) for n in range(100)]
        RunDir(directory).evaluations.write_text("\n".join(lines) + "\n")
        directories.append(directory)
    return directories


def test_a_run_that_learns_too_fast_is_flagged_and_not_celebrated(tmp_path):
    alone = runs_of(tmp_path, 1, [400, 410, 395])
    assert read_run(alone[0]).convergence == Reached(400 * 96, 395 * 96)
    fast = runs_of(tmp_path, 2, [200, 210, 205])
    made = report.of_runs([*alone, *fast])
    by_workers = {each.workers: each for each in made.rows}
    assert by_workers[2].is_too_fast and not by_workers[1].is_too_fast
    lead = dict(line.split(": ", 1) for line in made.summary.splitlines())
    assert "TOO FAST TO BE TRUE: ring on 2 (-49% samples)" in lead["How sure"]
    assert "1 worker, ring allows" in lead["How sure"]
    for page in (render.html(made), render.markdown(made)):
        assert "! fewer than the reference allows" in page
        assert "10.2 ± 0.6 !" in page and "40.2 ± 1.9 !" not in page
    assert Report.from_json(json.loads(json.dumps(made.to_json()))) == made
    honest = report.of_runs([*alone, *runs_of(tmp_path / "honest", 2, [405, 390, 400])])
    assert "TOO FAST" not in honest.summary and "as the reference, or more" in render.html(honest)
    assert not any(each.is_too_fast for each in honest.rows)


def test_the_reference_is_stated_on_the_command_line(tmp_path):
    directories = runs_of(tmp_path, 2, [200, 210, 205])
    arguments = ["report", *map(str, directories), "--out", str(tmp_path / "out")]
    runner = CliRunner()
    assert runner.invoke(cli, arguments).exit_code == 0
    made = json.loads((tmp_path / "out" / "report.json").read_text())
    assert made["convergence"] == [] and "TOO FAST" not in made["summary"]
    done = runner.invoke(cli, [*arguments, "--reference-samples", "38000,39500,38800"])
    assert done.exit_code == 0, done.output
    made = json.loads((tmp_path / "out" / "report.json").read_text())
    assert made["header"]["reference_samples"] == [38000, 39500, 38800]
    assert "the stated reference allows" in made["summary"]
    wrong = runner.invoke(cli, [*arguments, "--reference-samples", "many"])
    assert isinstance(wrong.exception, UserError)
    assert "--reference-samples: 'many' is not allowed" in str(wrong.exception)


def test_runs_without_recorded_evaluations_are_not_judged(tmp_path):
    directory = write_run(tmp_path / "run", steps=[[0.1] * 6], target_step=5, target_s=0.5)
    assert read_run(directory).convergence is None
    assert "TOO FAST" not in headline.of(report.of_runs([directory]))
