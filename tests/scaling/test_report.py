"""Tests of ``scaling/explain/report.py`` and of ``scaling/show``: figures, pages, plots, traces."""

import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from html.parser import HTMLParser
from types import SimpleNamespace
from urllib.parse import urlsplit

import pytest
from click.testing import CliRunner
from matplotlib.figure import Figure
from rich.console import Console

from scaletrain import plugins
from scaletrain.cli import cli
from scaletrain.errors import UserError
from scaletrain.rehearsal import Cluster
from scaletrain.run.culprit import Kind
from scaletrain.run.layout import RunDir
from scaletrain.run.links import Connection, LinkSample
from scaletrain.run.progress import Progress
from scaletrain.run.records import RecordWriter
from scaletrain.scaling.explain import headline, limiter, losses, report
from scaletrain.scaling.measure import sweep
from scaletrain.scaling.measure.run import read_run
from scaletrain.scaling.model import Loss, Prediction, Repeat, Report, ReportHeader, Row
from scaletrain.scaling.predict.calibration import Estimate, Fit
from scaletrain.scaling.predict.network import allreduce_s, fabric_named
from scaletrain.scaling.predict.step_time import ComputeCost
from scaletrain.scaling.show import (
    page_tables,
    plots,
    publish,
    render,
    results,
    table,
    text,
    trace,
)

from ..run.made_up import made_up
from .browser import browse, dom_with_frames, needs_browser
from .runs import write_run

# What each cell of a made-up sweep takes: 100 ms alone, 55 ms of work for half, 5 ms of
# communication.
STEP_S = {
    ("none", 1, 96): 0.100,
    ("ring", 1, 96): 0.102,
    ("none", 2, 96): 0.055,
    ("ring", 2, 96): 0.060,
    ("none", 1, 48): 0.052,
}


@pytest.fixture
def measured(tmp_path):
    """A sweep's directory with two repeats of every cell, and one cell whose runs failed."""
    config = tmp_path / "job.yaml"
    config.write_text("model: mlp\ndata: digits\nbatch_size: 96\nsteps: 10\n")
    plan = sweep.plan(
        sweep.Request([config], [1, 2], ["ring", "tree", "none"], repeats=2, threads=1)
    )
    out = tmp_path / "out"
    sweep.claim(out, plan)
    for cell in plan.cells():
        for repeat in range(2):
            directory = sweep.run_dir(out, cell, repeat)
            if cell.exchange == "tree":
                directory.mkdir(parents=True)
                (directory / "failed.json").write_text(
                    json.dumps({"reason": "rank 1 at step 3: <boom> | & so on"})
                )
                continue
            seconds = STEP_S[cell.exchange, cell.workers, cell.batch_size] * (1 + 0.002 * repeat)
            # The first three steps are slow: they must not count.
            steps = [[9.0] * 3 + [seconds] * 7] * cell.workers
            write_run(
                directory,
                exchange=cell.exchange,
                steps=steps,
                samples=cell.batch_size // cell.workers,
            )
    return out


def row(made, exchange, workers):
    return next(r for r in made.rows if (r.exchange, r.workers) == (exchange, workers))


def with_row(made, index, **changes):
    """The report with one of its rows changed."""
    rows = list(made.rows)
    rows[index] = replace(rows[index], **changes)
    return replace(made, rows=tuple(rows))


def scaled(runs, factor):
    """The runs of a row, so many times as fast."""
    return tuple(replace(run, samples_per_s=run.samples_per_s * factor) for run in runs)


def test_rows_have_speed_intervals_and_exposed_communication(measured):
    made = report.of_sweep(measured)
    ring = row(made, "ring", 2)
    assert ring.samples_per_s == pytest.approx(96 / 0.060, rel=0.01)
    assert ring.samples_per_s_ci95 > 0
    assert ring.speedup == pytest.approx(
        0.100 / 0.060, rel=1e-6
    )  # over one worker with none; repeats drift together
    assert ring.speedup_ci95 == pytest.approx(0, abs=1e-9)
    assert ring.efficiency == pytest.approx(0.100 / 0.060 / 2, rel=1e-6)
    assert ring.exposed_comm_s == pytest.approx(0.005, rel=0.01)
    assert ring.step_s_p50 == pytest.approx(0.060, rel=0.01)
    assert ring.baseline == "1 worker, no exchange"
    assert [(r.exchange, r.workers, r.batch_size) for r in made.references] == [("none", 1, 48)]


def test_a_failed_cell_says_why_and_the_others_stay(measured):
    made = report.of_sweep(measured)
    tree = row(made, "tree", 2)
    assert tree.samples_per_s is None and "boom" in tree.failures[0]
    assert "2 of 6 cells had failures" in made.summary
    page = render.html(made)
    assert "&lt;boom&gt;" in page and "<boom>" not in page


def test_the_summary_does_not_call_the_best_what_repeats_do_not_tell_apart(measured):
    """Two exchanges that differ by less than their repeats do, and one that is far behind."""
    made = report.of_sweep(measured)
    best, alone = row(made, "ring", 2), headline.of(made)
    assert "may be as fast" not in alone
    slower = replace(best, efficiency=best.efficiency * 0.9)
    near = replace(slower, exchange="near", runs=scaled(best.runs, 0.999))
    far = replace(slower, exchange="far", runs=scaled(best.runs, 0.5))
    told = headline.of(replace(made, rows=(*made.rows, near, far)))
    assert "Near may be as fast." in told and "far" not in told


def test_the_summary_leads_with_the_best_and_names_the_most_workers_beside_it(measured):
    made = report.of_sweep(measured)
    best = row(made, "ring", 2)
    three = replace(
        best,
        workers=3,
        speedup=1.23,
        speedup_ci95=0.1,
        efficiency=0.41,
        oversubscribed="more threads than cores",
        runs=scaled(best.runs, 0.8),
    )
    told = headline.of(replace(made, rows=(*made.rows, three)))
    assert told.startswith("Result: Fastest is ring on 2 workers: 1.67 ± 0.00 times")
    assert (
        "ring on 3 workers, the most measured, reaches 1.23 ± 0.10 times (efficiency 0.41, more threads than cores)."
        in told
    )
    slightly_slower = [scaled([run], 1 - 0.01 * i)[0] for i, run in enumerate(best.runs)]
    same = replace(three, runs=tuple(slightly_slower))
    assert "Ring on 3 workers may be as fast." in headline.of(
        replace(made, rows=(*made.rows, same))
    )


def test_noisy_repeats_name_no_cause(tmp_path):
    """Two equal workers whose repeats scatter more than the loss: the interval decides, not the
    mean.
    """
    for exchange, steps in {
        "none": {1: [0.1, 0.1, 0.1], 2: [0.04, 0.09, 0.06]},
        "ring": {2: [0.05, 0.10, 0.07]},
    }.items():
        for workers, seconds in steps.items():
            for repeat, each in enumerate(seconds):
                directory = tmp_path / f"{exchange}-{workers}-{repeat}"
                write_run(
                    directory,
                    exchange=exchange,
                    steps=[[each] * 6] * workers,
                    samples=96 // workers,
                    batch_mode="strong",
                )
    for repeat in range(3):
        write_run(tmp_path / f"small-{repeat}", exchange="none", steps=[[0.052] * 6], samples=48)
    made = report.of_runs(sorted(path for path in tmp_path.iterdir()))
    (ring,) = [loss for loss in made.losses if loss.exchange == "ring"]
    assert ring.limiter is None and ring.sentence.startswith(
        "Too noisy to say whether anything is lost"
    )
    assert ring.efficiency == pytest.approx(row(made, "ring", 2).efficiency)
    ratio = row(made, "ring", 2).samples_per_s / row(made, "none", 1).samples_per_s
    assert row(made, "ring", 2).speedup == pytest.approx(ratio)


def test_a_busy_machine_is_told_where_it_is_known(measured):
    assert "BUSY" not in report.of_sweep(measured).summary
    for number, run in enumerate(
        sorted(path.parent for path in measured.glob("cells/*/*/summary.json"))
    ):
        (run / "machine.json").write_text(
            json.dumps({"used_by_others": 0.4 if number == 0 else 0.02})
        )
    made = report.of_sweep(measured)
    told = "BUSY MACHINE: other processes used more than 10% of the cores during 1 of 10 runs (40% at most)."
    assert told in made.summary and made.header.busy == told
    assert render.html(made).count(told) == 2  # the summary and the environment
    for run in measured.glob("cells/*/*/machine.json"):
        run.write_text(json.dumps({"used_by_others": 0.02}))
    quiet = report.of_sweep(measured)
    assert quiet.header.used_by_others == 0.02 and "BUSY" not in quiet.summary


def test_exposed_communication_has_its_interval(measured):
    made = report.of_sweep(measured)
    index = made.rows.index(row(made, "ring", 2))
    made = with_row(made, index, exposed_comm_s_ci95=0.00125)
    for page in (render.html(made), render.markdown(made)):
        assert re.search(r"5\.0\d ± 1\.25", page)
    console = Console(width=200, record=True, file=io.StringIO())
    table.show(made, console)
    assert re.search(r"5\.0\d ± 1\.25", console.export_text())


def drawn(draw):
    figure = Figure(figsize=(6.0, 3.8), layout="constrained")
    axes = figure.add_subplot()
    draw(axes)
    figure.draw_without_rendering()
    return figure, axes


def test_legends_cover_nothing_and_points_at_one_place_stand_side_by_side(measured):
    made = report.of_sweep(measured)
    for draw in (plots.curves(made.rows, "speedup"), plots.anatomy(made.losses)):
        figure, axes = drawn(draw)
        (legend,) = figure.legends
        assert (
            legend.get_window_extent().y1 <= axes.get_tightbbox().y0 + 1
            and axes.get_legend() is None
        )
        assert legend.get_window_extent().width <= figure.bbox.width
    _, axes = drawn(plots.curves(made.rows, "speedup"))
    starts = [bars.lines[0].get_xdata()[0] for bars in axes.containers]
    assert len(set(starts)) == len(starts) == 2 and max(abs(x - 1) for x in starts) < 0.05


def test_bars_below_zero_are_not_cut(measured):
    both = report.of_sweep(measured).losses
    assert (
        len(both) == 2
    )  # the second one's unexplained part makes a layer whose bar in the first is next to nothing
    first, second = both
    gains = {**first.causes, "communication": -0.02, "unexplained": -1e-9}
    both = [
        replace(first, causes=gains),
        replace(second, causes={**second.causes, "unexplained": -0.005}),
    ]
    _, axes = drawn(plots.anatomy(both))
    assert axes.get_ylim()[0] < -21 and axes.get_ylim()[1] > 1000 * both[0].ideal_s


def test_the_loss_is_split_and_adds_up(measured):
    made = report.of_sweep(measured)
    loss = next(x for x in made.losses if x.exchange == "ring")
    assert loss.loss_s == pytest.approx(0.060 - 0.050, rel=0.01)
    assert sum(loss.causes.values()) == pytest.approx(loss.loss_s)
    assert abs(loss.causes["unexplained"]) < 0.05 * loss.loss_s
    assert loss.causes["communication"] == pytest.approx(0.005, rel=0.02)
    assert loss.limiter == "communication"


def test_the_page_is_one_file_that_asks_for_nothing(measured):
    page = render.html(report.of_sweep(measured))
    assert "<script" not in page
    # Namespaces of SVG are names, not addresses; nothing else may look like one.
    assert set(re.findall(r"https?://[^\s\"'<>)]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert page.count("<svg") >= 3 and "var(--ink)" in page and "prefers-color-scheme: dark" in page
    identifiers = re.findall(r'\bid="([^"]+)"', page)
    assert len(identifiers) == len(set(identifiers))


def test_the_environment_is_told_in_words_and_no_fact_is_left_out():
    """Each field of the header but those that have another place on the page."""
    elsewhere = {"emulation", "config", "argv"}
    values = {
        "cores": 41, "memory_bytes": 43 * 2**30, "versions": {"torch": "44.5"}, "repeats": 47,
        "threads_per_worker": 53, "bound_to_cores": True, "settings": ("steps=59",),
        "vary": {"model.width": [61, 67]}, "created": "2026-11-28T19:08:01Z",
        "load_average": 71.5, "runs_planned": 73, "runs_missing": 79, "used_by_others": 0.83,
        "emulated": False, "devices": ("H200",), "reference_samples": (89.0, 97.0),
    }  # fmt: skip
    names = {field.name for field in fields(ReportHeader)} - elsewhere
    values |= {name: f"<{name}>" for name in names - set(values)}
    told = text.environment(ReportHeader(**values))
    assert not [name for name in told if "_" in name or name[0].islower()]
    whole = " ".join(f"{name}: {fact}." for name, fact in told.items())
    for words in (
        *(value for value in values.values() if str(value).startswith("<")),
        "Cores: 41.", "Memory: 43.0 GiB.", "torch 44.5", "47 repeats", "Threads a worker: 53.",
        "kept on cores: yes.", "steps=59", "model.width: 61, 67.", "2026-11-28 19:08:01 UTC",
        "71.5", "Runs: 73, ", "79 missing", "used 83% of the cores. <busy>", "Emulated: no.", "H200",
        "89, 97",
    ):  # fmt: skip
        assert words in whole
    page = render.html(Report(1, ReportHeader(memory_bytes=2**34), "No run.", ()))
    assert "<dt>Memory</dt><dd>16.0 GiB</dd></dl>" in page and "memory_bytes" not in page
    assert "None" not in page[page.index("<h2>Environment") :]


def test_every_format_is_written(measured):
    made = report.of_sweep(measured)
    publish.publish(made, measured, formats=publish.FORMATS)
    assert {p.suffix for p in measured.iterdir() if p.is_file()} >= {
        ".html",
        ".md",
        ".csv",
        ".svg",
        ".png",
        ".json",
    }
    assert "± " in (measured / "report.md").read_text()
    with pytest.raises(UserError, match="allowed"):
        publish.publish(made, measured, formats=["pdf"])


@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("several", [False, True])
def test_tables_in_markdown_are_tables(measured, timed: bool, several: bool):
    """A head, a line of dashes, then rows of as many cells, a failed cell's and a timed one's
    included.
    """
    made = replace(report.of_sweep(measured), loss_reached=0.5)
    for number in range(len(made.rows)):
        made = with_row(made, number, variant={"batch_size": number % 2} if several else {})
    if timed:
        made = with_row(made, 0, target_s=1.5, target_runs=2)
    page = render.markdown(made)
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3 and page.endswith(".\n")
    for head, dashes, *rows in tables:
        assert set(dashes) == {"|", "-", ":"} and rows
        assert {line.count("|") for line in (head, dashes, *rows)} == {head.count("|")}, head
    assert ("time to accuracy" in tables[0][0]) == timed


def test_emulated_runs_are_labelled(tmp_path):
    cluster = Cluster(2, bandwidth="1Gbit", latency="100us", loss=0.01)  # described, not started
    emulation = {"network": cluster.describe(), "compute": {"step_s": 0.1, "sample_s": 0.0}}
    for workers in (1, 2):
        write_run(
            tmp_path / str(workers), steps=[[0.1] * 6] * workers, emulated=True, emulation=emulation
        )
    made = report.of_runs([tmp_path / "1", tmp_path / "2"])
    assert made.header.emulated and made.summary.startswith("Result: EMULATED")
    for part in ("links of 1Gbit", "0.1 ms of latency", "0.01 of the packets lost"):
        assert part in made.summary
    assert "Emulated" in render.html(made) and "EMULATED" in render.markdown(made)


def test_weak_scaling_counts_samples_not_steps(tmp_path):
    for workers, seconds in ((1, 0.1), (4, 0.125)):
        write_run(tmp_path / str(workers), steps=[[seconds] * 8] * workers, batch_mode="weak")
    made = report.of_runs([tmp_path / "1", tmp_path / "4"])
    four = row(made, "ring", 4)
    assert four.speedup == pytest.approx(4 * 0.1 / 0.125) and four.efficiency == pytest.approx(0.8)


def test_a_directory_without_a_run_is_a_plain_mistake(tmp_path):
    with pytest.raises(UserError, match="no finished run"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="no sweep"):
        report.of_sweep(tmp_path)


def test_trace_puts_all_ranks_on_one_clock(tmp_path):
    run = write_run(tmp_path / "run", steps=[[0.1] * 4, [0.2] * 4])
    (run / "rank-1.json").write_text(json.dumps({"clock_offset_s": 0.05}))
    events = trace.of_run(run).to_json()["traceEvents"]
    steps = {(e["pid"], e["name"]): e for e in events if e["name"].startswith("step")}
    assert steps[1, "step 0"]["ts"] == pytest.approx(0) and steps[0, "step 0"][
        "ts"
    ] == pytest.approx(0.05e6)
    assert steps[1, "step 1"]["dur"] == pytest.approx(0.2e6)
    parts = [e for e in events if e["pid"] == 0 and e.get("tid") == 1 and e["ph"] == "X"]
    assert sum(e["dur"] for e in parts) == pytest.approx(4 * 0.1e6)


def test_trace_shows_buckets_rounds_and_waits_without_covering_each_other(tmp_path):
    run = write_run(tmp_path / "run", steps=[[0.1] * 2])
    spans = [
        {"kind": "bucket", "name": "bucket 0", "began": 1000.01, "s": 0.05, "bytes": 4},
        {"kind": "bucket", "name": "bucket 1", "began": 1000.02, "s": 0.01, "bytes": 8},
        {"kind": "bucket", "name": "bucket 0", "began": 1000.11, "s": 0.05, "bytes": 4},
        {"kind": "wait", "name": "wait for 1", "began": 1000.03, "s": 0.01},
    ]
    text = "".join(json.dumps(span) + "\n" for span in spans)
    (run / "spans-0.jsonl").write_text(text + '{"kind": "round", "na')  # the worker was killed
    events = trace.of_run(run).to_json()["traceEvents"]
    rows = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert list(rows.values()) == ["step", "parts", "bucket", "bucket (2)", "wait"]
    shown = [
        (rows[e["tid"]], e["name"], e["args"].get("bytes"))
        for e in events
        if e["ph"] == "X" and e["tid"] > 1
    ]
    assert shown == [
        ("bucket", "bucket 0", 4), ("bucket", "bucket 0", 4), ("bucket (2)", "bucket 1", 8), ("wait", "wait for 1", None),
    ]  # fmt: skip
    assert next(e for e in events if e["name"] == "bucket 1")["ts"] == pytest.approx(0.02e6)


def test_report_renders_again_without_torch(measured, tmp_path):
    (tmp_path / "blocked").mkdir()
    (tmp_path / "blocked" / "torch.py").write_text(
        "raise ImportError('torch is not wanted here')\n"
    )
    code = (
        "from scaletrain.cli import cli;"
        f"cli(['report', {str(measured)!r}, '--format', 'html,md'], standalone_mode=False)"
    )
    env = os.environ | {"PYTHONPATH": str(tmp_path / "blocked")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env
    )
    assert done.returncode == 0, done.stderr
    assert (measured / "report.html").exists() and "ring on 2 workers" in done.stdout


def test_an_unfinished_sweep_says_how_much_is_missing(measured):
    for directory in sorted((measured / "cells").glob("*none*"))[:2]:
        (directory / "1" / "summary.json").unlink()
    made = report.of_sweep(measured)
    assert "Unfinished: 2 of 14 runs are missing" in made.summary  # 6 cells and 1 reference, twice
    assert made.header.runs_missing == 2


def test_one_run_has_no_interval_and_its_conclusions_say_so(measured):
    path = measured / "sweep.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"repeats": 1}))
    (measured / "header.json").unlink(missing_ok=True)
    made = report.of_sweep(measured)
    loss = next(x for x in made.losses if x.exchange == "ring")
    assert (
        " Single runs: no interval." in loss.sentence
        and "How sure: Single runs: no interval" in made.summary
    )
    assert (
        "Single runs: no interval." in render.html(made)
        and "±" not in render.markdown(made).split("exchange adds")[0]
    )


def test_a_missing_repeat_leaves_the_interval_that_the_others_give(measured):
    shutil.copytree(
        next(measured.glob("cells/*none-w1-b96")) / "1",
        next(measured.glob("cells/*none-w1-b96")) / "2",
    )
    ring = row(report.of_sweep(measured), "ring", 2)
    assert ring.speedup == pytest.approx(0.100 / 0.060, rel=2e-3) and 0 < ring.speedup_ci95 < 0.1


def test_what_a_speed_up_is_over_is_told_where_no_single_worker_was_measured(measured):
    for cell in measured.glob("cells/*-w1-*"):
        shutil.rmtree(cell)
    made = report.of_sweep(measured)
    assert re.search(
        r"workers?: [0-9,]+ samples/s\. No other number of workers to compare with\.",
        made.summary,
    )
    assert (
        row(made, "ring", 2).speedup is None
        and "no other number of workers" in made.header.baseline
    )
    assert "speedup" not in render.images(made, "svg") and "–" in render.markdown(made)
    for cell in measured.glob("cells/*-w2-*"):
        shutil.rmtree(cell)
    nothing = report.of_sweep(measured)
    assert "Speed-up over: nothing was measured." in render.markdown(
        nothing
    ) and "not measured" in render.html(nothing)


def test_residuals_of_the_fit_are_not_shown_as_predictions(measured):
    header = json.dumps(
        {"model.weight": {"dtype": "F32", "shape": [10**6], "data_offsets": [0, 4 * 10**6]}}
    ).encode()
    for run in measured.glob(
        "cells/*/*/"
    ):  # how many bytes the gradients have is read from a checkpoint
        (run / "step-10.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    made = report.of_sweep(measured)
    assert made.predictions and all(p.in_fit for p in made.predictions)
    for page in (render.html(made), render.markdown(made)):
        assert "residual of the fit" in page and "not a test of the model" in page
    made = replace(made, predictions=(replace(made.predictions[0], in_fit=False),))
    assert "1 of 1 were left out" in render.markdown(made)


def test_one_worker_at_each_batch_size_is_listed(measured):
    made = report.of_sweep(measured)
    small, large = made.batches
    assert (small.batch_size, large.batch_size) == (48, 96)
    assert large.efficiency == 1 and small.efficiency == pytest.approx(
        (0.100 / 96) / (0.052 / 48), rel=1e-6
    )
    assert "One worker at each batch size" in render.html(made)


def test_workers_that_share_a_gpu_are_marked(measured):
    for records in measured.rglob("rank-*.jsonl"):
        header = {
            "node": 0,
            "device": "cuda:0",
            "device_name": "H100",
            "environment": {"commit": "abc"},
        }
        records.with_suffix(".json").write_text(json.dumps(header))
    made = report.of_sweep(measured)
    assert made.header.devices == ("H100",)
    assert (
        row(made, "ring", 1).oversubscribed == ""
        and row(made, "ring", 2).oversubscribed == "workers that share a GPU"
    )
    assert "oversubscribed: workers that share a GPU." in render.markdown(
        made
    ) and "; H100; " in render.markdown(made)


def test_every_figure_says_when_the_machine_is_oversubscribed(measured):
    made = report.of_sweep(measured)
    made = with_row(made, 0, oversubscribed="more threads than cores")
    assert all(
        b"oversubscribed: more threads than cores" in image
        for image in render.images(made, "svg").values()
    )


def test_sweeps_of_different_cells_make_one_report(measured, tmp_path):
    config = tmp_path / "job.yaml"
    plan = sweep.plan(sweep.Request([config], [4], ["ring"], repeats=2, threads=1, split=False))
    sweep.claim(tmp_path / "more", plan)
    for repeat in range(2):
        write_run(
            sweep.run_dir(tmp_path / "more", plan.cells()[0], repeat),
            steps=[[0.04] * 8] * 4,
            samples=24,
        )
    made = report.of_sweep(measured, tmp_path / "more")
    assert row(made, "ring", 4).speedup == pytest.approx(0.1 / 0.04, rel=0.01)
    assert made.header.runs_planned == 16


def test_a_page_of_results_keeps_what_people_wrote(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("Before.\n")
    results.write(page, "one\n")
    page.write_text(page.read_text() + "After.\n")
    results.write(page, "two")
    assert page.read_text() == f"Before.\n\n{results.BEGIN}\ntwo\n{results.END}\nAfter.\n"


@pytest.mark.slow
@needs_browser
@pytest.mark.parametrize(
    "look", [["--window-size=390,900"], ["--window-size=1200,900", "--force-dark-mode"]]
)
def test_the_page_in_a_browser(measured, tmp_path, look):
    page = tmp_path / "report.html"
    page.write_text(render.html(report.of_sweep(measured)))
    log = tmp_path / "net.json"
    quiet = [
        "--disable-background-networking",
        "--disable-component-update",
        "--no-first-run",
        "--disable-sync",
    ]
    shot = [
        f"--screenshot={tmp_path / 'shot.png'}",
        f"--log-net-log={log}",
        "--enable-logging=stderr",
        "--v=0",
    ]
    done = browse(page, *look, *quiet, *shot)
    assert (tmp_path / "shot.png").stat().st_size > 20_000, done.stderr
    assert "CONSOLE" not in done.stderr
    asked = set(re.findall(r'"url":"([^"]+)"', log.read_text()))
    hosts = {
        host
        for url in asked
        if url.startswith(("http:", "https:", "ws:"))
        if (host := urlsplit(url).hostname)
    }
    assert not [host for host in hosts if "google" not in host or host.startswith("fonts.")], (
        asked
    )  # a browser calls home


@pytest.mark.slow
@needs_browser
def test_the_page_on_paper(measured, tmp_path):
    """Light whatever the screen's theme is, and no figure is cut in two."""
    (tmp_path / "page.html").write_text(render.html(report.of_sweep(measured)))
    browse(tmp_path / "page.html", "--force-dark-mode", f"--print-to-pdf={tmp_path / 'page.pdf'}")
    made = (tmp_path / "page.pdf").read_bytes()
    assert made.startswith(b"%PDF")
    assert 1 <= len(re.findall(rb"/Type /Page\b(?!s)", made)) <= 3


def test_the_fewest_workers_count_as_ideal_only_where_there_are_more(tmp_path):
    for workers, seconds in ((2, 0.1), (4, 0.0625)):
        write_run(tmp_path / str(workers), steps=[[seconds] * 8] * workers, samples=96 // workers)
    made = report.of_runs([tmp_path / "2", tmp_path / "4"])
    assert row(made, "ring", 4).speedup == pytest.approx(2 * 0.1 / 0.0625)
    assert row(made, "ring", 4).baseline == "1 worker (2 workers, ring, taken as ideal)"


def test_all_exchanges_are_held_against_the_same_speed(tmp_path):
    """Else the one that is slower with one worker looks as if it scaled better."""
    for exchange, workers, seconds in (
        ("ring", 1, 0.1),
        ("tree", 1, 0.12),
        ("ring", 2, 0.06),
        ("tree", 2, 0.065),
    ):
        steps = [[seconds] * 8] * workers
        write_run(
            tmp_path / f"{exchange}{workers}", exchange=exchange, steps=steps, samples=96 // workers
        )
    made = report.of_runs(sorted(tmp_path.iterdir()))
    assert {r.baseline for r in made.rows} == {"1 worker, ring"}
    assert row(made, "ring", 2).speedup == pytest.approx(0.1 / 0.06)
    assert row(made, "tree", 2).speedup == pytest.approx(0.1 / 0.065)
    assert made.summary.startswith("Result: Fastest is ring on 2 workers")


def test_the_short_run_of_one_worker_is_the_baseline_where_no_cell_is(tmp_path):
    config = tmp_path / "job.yaml"
    config.write_text("model: mlp\ndata: digits\nbatch_size: 96\nsteps: 100\n")
    plan = sweep.plan(sweep.Request([config], [2, 4], ["ring", "tree"], repeats=2, threads=1))
    sweep.claim(tmp_path / "out", plan)
    alone = {96: 0.100, 48: 0.052, 24: 0.028}
    for cell in plan.cells():
        seconds = (
            alone[cell.batch_size]
            if cell.workers == 1
            else 0.11 / cell.workers + 0.01 * (cell.exchange == "tree")
        )
        for repeat in range(2):
            steps = [[seconds * (1 + 0.002 * repeat)] * 8] * cell.workers
            share = cell.batch_size // cell.workers
            write_run(
                sweep.run_dir(tmp_path / "out", cell, repeat),
                exchange=cell.exchange,
                steps=steps,
                samples=share,
            )
    made = report.of_sweep(tmp_path / "out")
    assert made.header.baseline == "1 worker, no exchange (short runs)"
    assert row(made, "ring", 2).speedup == pytest.approx(0.100 / 0.055, rel=1e-6)
    assert row(made, "tree", 4).speedup == pytest.approx(0.100 / 0.0375, rel=1e-6)
    # The table and the sentences below it tell the same efficiency.
    for loss in made.losses:
        assert loss.efficiency == pytest.approx(row(made, loss.exchange, loss.workers).efficiency)


def test_emulated_accelerators_learn_nothing_and_no_figure_says_so(tmp_path):
    emulation = {"compute": {"step_s": 0.01, "sample_s": 0.001}}
    made = report.of_runs(
        [write_run(tmp_path / "a", steps=[[0.1] * 6], emulated=True, emulation=emulation)]
    )
    assert made.rows[0].test_accuracy is None and made.rows[0].final_loss is None
    assert (
        report.of_runs([write_run(tmp_path / "b", steps=[[0.1] * 6])]).rows[0].test_accuracy == 0.5
    )


def test_the_markdown_says_where_the_time_goes_and_how_to_reproduce(measured):
    (measured / "header.json").write_text(
        json.dumps(
            report.of_sweep(measured).header.to_json()
            | {"argv": "scaletrain bench scaling job.yaml"}
        )
    )
    told = render.markdown(report.of_sweep(measured))
    assert "| communication | stragglers |" in told and re.search(
        r"\| ring \| 2 \| 60.06 \| 50.05 \| 10.01 \|", told
    )
    assert (
        "    scaletrain bench scaling job.yaml\n" in told
        and "job:\n\n```yaml\nmodel: mlp\n" in told
    )


def test_a_target_that_some_repeats_reached_says_how_many(tmp_path):
    runs = [
        write_run(tmp_path / str(i), steps=[[0.1] * 6], target_s=s)
        for i, s in enumerate([9.0, 11.0, None])
    ]
    made = report.of_runs(runs)
    (only,) = made.rows
    assert (only.target_s, only.target_runs) == (10.0, 2) and only.target_s_ci95 > 1
    assert text.to_target(only).startswith("10.0 ± ") and text.to_target(only).endswith(
        "(2 of 3 runs)"
    )
    assert text.to_target(only) in render.markdown(made) and text.to_target(only) in render.html(
        made
    )


def test_what_collectives_send_is_told_from_their_schedule(measured):
    made = report.of_sweep(measured)
    assert "traffic" not in render.images(made, "svg")  # nobody knows how large the gradients are
    for path in measured.rglob("rank-0.jsonl"):
        tensors = json.dumps(
            {"model.w": {"dtype": "F32", "shape": [1000], "data_offsets": [0, 4000]}}
        ).encode()
        path.with_name("step-10.safetensors").write_bytes(
            len(tensors).to_bytes(8, "little") + tensors
        )
    made = report.of_sweep(measured)
    ring = row(made, "ring", 2)
    assert (ring.bytes_sent, ring.bytes_sent_is) == (
        4000,
        "the schedule's",
    )  # 2 (p - 1) / p of the gradients
    assert row(made, "none", 2).bytes_sent is None and row(made, "ring", 1).bytes_sent == 0
    assert b"the schedule's" in render.images(made, "svg")["traffic"]


def test_more_threads_than_cores_is_told_from_what_ranks_and_servers_are(tmp_path):
    two = {"steps": [[0.1] * 6] * 2, "cores": 2}
    alone = write_run(tmp_path / "a", **two)
    beside = write_run(tmp_path / "b", exchange="parameter_server", launcher="local", **two)
    counted = {
        "mode": "sync",
        "staleness": {},
        "pushes": {},
        "dropped": {},
        "lost": [],
        "step_s": {},
        "refused": {},
    }
    counted |= {"restored_at_update": None, "cpu_s_per_worker": 0.0, "memory_bytes": 1}
    (beside / "server-0.json").write_text(json.dumps(counted))
    spread = write_run(tmp_path / "c", exchange="tree", steps=[[0.1] * 6] * 4, cores=2)
    for rank in range(4):
        header = json.loads((spread / f"rank-{rank}.json").read_text())
        (spread / f"rank-{rank}.json").write_text(json.dumps(header | {"node": rank // 2}))
    made = report.of_runs([alone, beside, spread])
    assert [r.oversubscribed for r in made.rows] == ["", "more threads than cores", ""]
    (spread / "summary.json").write_text(
        (spread / "summary.json")
        .read_text()
        .replace('"finished"', '"launcher": "rehearsal", "finished"')
    )
    # One worker that is bound to a core, and a server that has the other one.
    bound = write_run(
        tmp_path / "d", exchange="parameter_server", launcher="local", steps=[[0.1] * 6], cores=1
    )
    (bound / "server-0.json").write_text(json.dumps(counted | {"cores": [0, 1]}))
    assert not report.of_runs([bound]).rows[0].oversubscribed
    assert report.of_runs([spread]).rows[0].oversubscribed  # emulated hosts are one machine


def test_a_report_names_the_commits_that_ran(tmp_path):
    runs = [
        write_run(tmp_path / str(i), steps=[[0.1] * 6], commit=commit)
        for i, commit in enumerate(["b2", "a1", "b2"])
    ]
    assert report.of_runs(runs).header.commit == "a1, b2"


def test_a_report_of_several_jobs_is_not_fitted_as_one(measured, tmp_path):
    made = report.of_sweep(measured)
    for number in range(len(made.rows)):
        made = with_row(made, number, variant={"launcher.bandwidth": f"{number}Gbit"})
    (tmp_path / "mixed.json").write_text(json.dumps(made.to_json()))
    with pytest.raises(UserError, match="one calibration cannot explain"):
        CliRunner().invoke(
            cli, ["fit", str(tmp_path / "mixed.json"), "--model", "1MB"], catch_exceptions=False
        )


def test_far_predictions_are_drawn_dashed():
    rows = [
        SimpleNamespace(strategy="ring", workers=n, machines=n, speedup=0.9 * n, fast_speedup=n)
        for n in (1, 4, 16, 64)
    ]
    _, axes = drawn(plots.simulation(rows, 16))
    (far,) = [
        line for line in axes.get_lines() if line.get_linestyle() == "--" and len(line.get_xdata())
    ]
    assert list(far.get_xdata()) == [16, 64]
    _, axes = drawn(plots.simulation(rows, None))
    assert not [line for line in axes.get_lines() if line.get_linestyle() == "--"]


def test_a_better_collective_is_predicted_where_none_was_measured(measured):
    """A tree of 100 MB on 8 workers, over a network that is known: rings send half as much in each
    of fewer steps.
    """
    told = [Estimate(value, value * 0.9, value * 1.1) for value in (1e-4, 1e8)]
    fitted = Fit(ComputeCost(0.01), *told, overlap=True, residuals=[], max_workers=8)
    made = report.of_sweep(measured)
    own = Row("job", "tree", 8, 96, {}, efficiency=0.2, gradient_bytes=100_000_000)
    loss = next(x for x in made.losses if x.exchange == "ring")
    loss = replace(loss, exchange="tree", workers=8, limiter="communication")
    (loss,) = losses.with_alternatives([loss], [own], fitted)
    better, low, high = re.search(
        r"(\w+) instead of tree should raise efficiency from (0\.\d\d) to (0\.\d\d) or more",
        loss.sentence,
    ).groups()
    assert better.lower() != "tree" and float(high) > 1.5 * float(low) == 1.5 * 0.2


@pytest.mark.parametrize("workers", [2, 4])
def test_a_slow_loader_is_named_with_its_rank_in_summary_table_and_per_rank_view(tmp_path, workers):
    directory = tmp_path / "slow"
    write_run(directory, steps=[[0.1]] * workers)
    for each in made_up(workers, 60, seed=0, slow={1: (Kind.INPUT, 0.0283)}):
        writer = RecordWriter(directory, each.rank)
        for record in each.records:
            writer.write(record)
        writer.close()
        sign = Progress(each.rank, 1, each.host, doing="finished")
        RunDir(directory).progress(each.rank).write_text(json.dumps(sign.to_json()))
    made = report.of_runs([directory])
    [row] = made.rows
    assert "rank 1 on h0: input takes 28." in row.culprit
    assert f"ring on {workers} workers: {row.culprit}." in made.summary
    slower_s = 0.0283 / row.step_s_mean  # the loader's part of a step
    change = made.summary.splitlines()[2]
    assert change.startswith("Change: Rank 1 on h0: more loader_workers, or data nearer to that")
    told = re.search(r"without it, steps [\d,]+ to [\d,]+ would be up to (\d+)% shorter\.$", change)
    assert int(told.group(1)) == pytest.approx(100 * slower_s, abs=2)
    slow, other = row.ranks[1], row.ranks[0]
    assert (slow.rank, slow.host) == (1, "h0")
    assert slow.input_s == pytest.approx(0.030, rel=0.1)
    assert other.wait_s - slow.wait_s == pytest.approx(0.028, rel=0.1)
    assert report.Report.from_json(json.loads(json.dumps(made.to_json()))) == made


def test_a_slow_host_is_named_in_the_lead_with_its_interval(tmp_path):
    """Four emulated hosts in a ring, one at a quarter of the bandwidth of the others."""
    directory, size, slow = tmp_path / "slow", 4, 2
    write_run(directory, steps=[[0.1]] * size)
    for each in made_up(size, 60, seed=0):
        writer = RecordWriter(directory, each.rank)
        for record in each.records:
            writer.write(record)
        writer.close()
        host = f"host{each.rank}"
        sign = Progress(each.rank, 1, host, doing="finished")
        RunDir(directory).progress(each.rank).write_text(json.dumps(sign.to_json()))
        lines = []
        for number in range(6):
            connections = []
            for edge in ((each.rank - 1) % size, each.rank):
                # A rank sends over the link that has its number.
                ends = [f"10.0.0.{edge}:1", f"10.0.0.{(edge + 1) % size}:2"]
                if edge != each.rank:
                    ends.reverse()
                speed = 25e6 / 4 if slow in (edge, (edge + 1) % size) else 25e6
                num_bytes = number * 1_000_000 if edge == each.rank else 1000
                seconds = num_bytes / speed * (1 + 0.05 * (number % 2))
                connections.append(Connection(*ends, num_bytes, seconds, num_bytes // 1448, 0))
            began = each.records[0].time
            lines.append(LinkSample(began - 0.01 + 0.6 * number, connections, host)._asdict())
        text = "".join(json.dumps(line) + "\n" for line in lines)
        RunDir(directory).links(each.rank).write_text(text)
    lead = dict(line.split(": ", 1) for line in report.of_runs([directory]).summary.splitlines())
    assert "rank 2 on host2: slow link costs" in lead["Cause"]
    assert re.search(r"ms a step more \(\d[\d.]* to \d", lead["Cause"]), lead["Cause"]
    assert lead["Change"].startswith("Rank 2 on host2: a look at its cable, port and neighbours")


def cell(exchange, workers, speedup, ci95, scatter=0.001, **facts):
    """Return a row with a speed-up."""
    factors = (1 - scatter, 1.0, 1 + scatter)
    runs = tuple(Repeat(100 * speedup * factor, 0.1) for factor in factors)
    return Row(
        "job", exchange, workers, 96, {}, samples_per_s=100 * speedup, speedup=speedup,
        speedup_ci95=ci95, efficiency=speedup / workers, baseline="1 worker, none", runs=runs,
        repeats=3, **facts,
    )  # fmt: skip


def lead_of(*rows, found=()):
    told = headline.of(Report(1, ReportHeader(mode="strong"), "", rows, losses=found))
    return dict(line.split(": ", 1) for line in told.splitlines())


def test_the_lead_is_of_several_workers_and_says_what_limits_who_and_what_to_do():
    culprit = "rank 1 on h0: input takes 28 ms longer"
    loss = Loss(
        "job", "ring", 2, {}, 3, 0.1, 0.05, 0.05, 0.4, 0.01, {"input": 0.05}, None, "input",
        finding="Input is the bottleneck.", advice="Use more loader_workers.",
    )  # fmt: skip
    alone = cell("ring", 1, 1.2, 0.01)
    lead = lead_of(alone, cell("ring", 2, 0.8, 0.02, culprit=culprit), found=(loss,))
    assert list(lead) == ["Result", "Cause", "Change", "How sure"]
    assert lead["Result"].startswith(
        "More workers are slower than one. The fastest of them, ring on 2 workers, reaches 0.80"
    )
    assert "1 worker:" not in lead["Result"]
    assert lead["Cause"] == f"Input is the bottleneck. ring on 2 workers: {culprit}."
    assert lead["Change"] == "Use more loader_workers."
    assert lead["How sure"].startswith("The speed-up is known to ± 2% (95 %, 3 repeats).")


def test_the_lead_names_no_fastest_if_repeats_tell_nobody_from_one_worker():
    noisy = lead_of(cell("ring", 2, 1.2, 0.5), cell("tree", 4, 1.1, 0.6))
    assert noisy["Result"].startswith("Too noisy to name a fastest: none is surely faster than")
    assert "ring on 2 workers" in noisy["Result"] and "Fastest is" not in noisy["Result"]
    slower = lead_of(cell("ring", 2, 0.9, 0.5))
    assert "Too noisy" in slower["Result"] and "slower than one" not in slower["Result"]
    told = lead_of(cell("ring", 2, 1.2, 0.5), cell("tree", 4, 1.1, 0.05))
    assert "Fastest is ring" in told["Result"]
    assert "Fastest is ring" in lead_of(cell("ring", 2, 1.2, 0.1))["Result"]


def test_the_lead_speaks_of_several_workers_even_if_only_one_was_measured():
    """What was asked for has failed: the speed of one worker is no answer to it."""
    failed = Row("job", "ring", 2, 96, {}, failures=("rank 1: no memory",))
    alone, apart = cell("ring", 1, 1.0, 0.01), cell("none", 2, 1.9, 0.01)
    lead = lead_of(alone, apart, failed)
    assert lead["Result"] == "No run of ring on 2 workers has finished: rank 1: no memory."
    assert "1 of 3 cells had failures: ring on 2." in lead["How sure"]
    missing = replace(failed, failures=())
    assert lead_of(alone, missing)["Result"] == "No run of ring on 2 workers has finished."
    assert lead_of(alone)["Result"].startswith("Fastest is ring on 1 worker")


def test_the_lead_says_so_if_nobody_holds_up_the_others(measured):
    assert report.of_sweep(measured).summary.count("No rank or link stands out as slow.") == 1
    # Nobody has looked where no records are.
    assert "stands out as slow" not in "".join(lead_of(cell("ring", 2, 1.5, 0.1)).values())


@pytest.mark.parametrize(
    ("causes", "efficiency", "ci95"),
    [
        ({"input": 0.02}, 0.8, 0.01),
        ({"input": 0.02, "communication": 0.0199}, 0.8, 0.01),
        ({"input": 0.02}, 0.8, 0.19),
        ({"input": 0.02, "unexplained": -0.015}, 0.8, 0.01),
        ({"input": 0.0001}, 0.99, 0.01),
        (None, 0.8, 0.01),
    ],
)
def test_the_lead_has_four_lines_whatever_was_found(causes, efficiency, ci95):
    """A cause, two that cost the same, noise, gains that cancel it, no loss, and no references."""
    found = ()
    if causes is not None:
        evidence = limiter.Evidence(
            [limiter.Cause(*each) for each in causes.items()], efficiency, ci95
        )
        loss = Loss(
            "job", "ring", 2, {}, 3, 0.1, 0.1 - evidence.loss_s, evidence.loss_s, efficiency, ci95,
            causes, None, None, limiter.finding(evidence), limiter.advice(evidence),
        )  # fmt: skip
        found = (loss,)
    lead = lead_of(cell("none", 1, 1.0, None), cell("ring", 2, 2 * efficiency, ci95), found=found)
    assert list(lead) == ["Result", "Cause", "Change", "How sure"]
    assert all(len(line) > 20 for line in lead.values()), lead


def test_the_winner_of_several_that_may_be_equal_was_lucky_and_the_lead_says_by_how_much():
    scatter = 0.02
    best, rival = cell("ring", 4, 3.0, 0.1, scatter), cell("tree", 4, 2.99, 0.1, scatter)
    lead = lead_of(cell("none", 1, 1.0, None), best, rival)
    # The larger of two normal values is 1 / sqrt(pi) deviations above their mean.
    lucky = scatter / math.sqrt(3) / math.sqrt(math.pi)
    assert "Tree may be as fast." in lead["How sure"]
    assert (
        f"If both are equally fast, the winner's figure is {lucky:.1%} too high by luck."
        in lead["How sure"]
    )
    clear = lead_of(cell("none", 1, 1.0, None), best, cell("tree", 4, 2.0, 0.1, scatter))
    assert "luck" not in clear["How sure"]


def test_a_repeat_that_is_left_out_is_shown_wherever_the_figures_are(tmp_path):
    runs = []
    for number, step_s in enumerate([0.1, 0.101, 0.2, 0.0995, 0.1005]):
        runs.append(write_run(tmp_path / str(number), steps=[[step_s] * 8] * 2))
    runs.append(write_run(tmp_path / "alone", steps=[[0.2] * 8], samples=96))
    made = report.of_runs(runs)
    two = row(made, "ring", 2)
    assert two.outliers == (3,) and two.samples_per_s == pytest.approx(96 / 0.1, rel=0.01)
    told = "ring on 2: repeat 3 (-50%) of 5 left out of the means as outlying, by samples/s."
    console = Console(width=200, record=True, file=io.StringIO())
    table.show(made, console)
    for page in (render.html(made), render.markdown(made), console.export_text()):
        assert told in page
    assert "1 outlying repeat left out." in made.summary
    _, axes = drawn(plots.curves(made.rows, "speedup"))
    crosses = [line for line in axes.get_lines() if line.get_marker() == "x"]
    assert [list(line.get_ydata()) for line in crosses if len(line.get_xdata())] == [
        [pytest.approx(two.speedup / 2, rel=0.01)]
    ]


@pytest.mark.parametrize("workers", [2, 4, 16])
def test_busbw_is_what_the_network_carried_at_least(workers):
    """A ring over a known network, behind which next to nothing is computed."""
    fabric = fabric_named("1gbit")
    exchange_s = allreduce_s("ring", workers, 1e8, fabric)
    facts = {"gradient_bytes": 100_000_000, "backward_s": exchange_s + 0.001}
    rate = cell("ring", workers, 1.5, 0.1, **facts).bus_bytes_per_s
    assert rate == pytest.approx(fabric.network.bandwidth_bytes_per_s, rel=0.02)
    assert rate < fabric.network.bandwidth_bytes_per_s
    assert cell("none", workers, 1.5, 0.1, **facts).bus_bytes_per_s is None
    assert cell("ring", 1, 1.0, None, **facts).bus_bytes_per_s is None


class Tables(HTMLParser):
    """The cells of a page's tables: of each line, (the column that each cell names, its title)."""

    def __init__(self, page):
        super().__init__()
        self.titles, self.lines, self._in_title = [], [], False
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        named = dict(attributes)
        if tag == "table":
            self.titles.append([])
        elif tag == "th":
            self._in_title = True
        elif tag == "tr":
            self.lines.append([])
        elif tag == "td" and "colspan" not in named:
            line = self.lines[-1]
            line.append((named["data-name"], self.titles[-1][len(line)]))

    def handle_endtag(self, tag):
        self._in_title = self._in_title and tag != "th"

    def handle_data(self, data):
        if self._in_title:
            self.titles[-1].append(data)


def test_on_narrow_screens_each_cell_names_its_column_and_no_table_is_cut_in_print(measured):
    page = render.html(report.of_sweep(measured))
    tables = Tables(page)
    assert [len(titles) for titles in tables.titles] == [14, 12, 3]
    assert sum(map(len, tables.lines)) > 60
    assert all(name == title for line in tables.lines for name, title in line)
    style = page[page.index("<style>") : page.index("</style>")]
    narrow = style[style.index("(max-width: 64rem)") : style.index("(max-width: 30rem)")]
    assert "td::before { content: attr(data-name)" in narrow and "tr { display: grid" in narrow
    on_paper = style[style.index("@media print") :]
    assert "overflow: visible" in on_paper and "nowrap" not in on_paper
    assert re.search(r"th, td {[^}]*white-space: normal", on_paper)


WIDTHS = (390, 800, 1100, 1400)


@pytest.mark.slow
@needs_browser
def test_no_width_of_screen_hides_a_column(measured, tmp_path):
    """Nothing is wider than its frame, from a phone to a desktop."""
    script = """
      onload = () => { for (const frame of document.querySelectorAll("iframe")) {
        const page = frame.contentDocument;
        const cut = [...page.querySelectorAll(".wide, html")]
          .filter(part => part.scrollWidth > part.clientWidth).length;
        document.body.append(`[${frame.width}: ${cut} cut]`); } }
    """
    page = render.html(report.of_sweep(measured))
    shown = dom_with_frames(tmp_path, page, WIDTHS, script)
    found = re.findall(r"\[(\d+): (\d+) cut\]", shown)
    assert found == [(str(width), "0") for width in WIDTHS]


@pytest.mark.slow
@needs_browser
def test_no_column_is_cut_on_paper(measured, tmp_path):
    """A page as wide as A4 between its margins, with the style of paper."""
    made = replace(report.of_sweep(measured), loss_reached=0.5)
    for number in range(len(made.rows)):
        made = with_row(made, number, variant={"launcher.bandwidth": f"{number}Gbit"})
    page = render.html(with_row(made, 0, target_s=12.25, target_s_ci95=3.5, target_runs=2))
    page = page.replace("@media screen", "@media speech").replace("@media print", "@media all")
    width = round((297 - 2 * 12) / 25.4 * 96)
    script = """
      onload = () => { const page = document.querySelector("iframe").contentDocument;
        const wide = [...page.querySelectorAll("body *")]
          .filter(part => part.getBoundingClientRect().right > page.documentElement.clientWidth + 1);
        document.body.append(`[${page.querySelectorAll("td").length} cells, ${wide.length} cut]`); }
    """
    shown = dom_with_frames(tmp_path, page, [width], script)
    cells, cut = re.search(r"\[(\d+) cells, (\d+) cut\]", shown).groups()
    assert int(cells) > 60 and int(cut) == 0


def test_an_exchange_has_one_colour_in_every_report():
    assert plots.colour_of("ring") == plots.colour_of("ring@gloo") != plots.colour_of("native")
    assert plots.colour_of("parameter_server:async") == plots.colour_of("parameter_server")
    assert plots.colour_of("package.mine:factory") in plots.SERIES
    known = [*plugins.names("exchange"), *plugins.names("collective")]
    colours = [plots.colour_of(name) for name in known]
    assert len(set(colours)) == len(known), "two of them look alike"
    # Of a simulation, too, wherever it stands among the strategies.
    points = [
        SimpleNamespace(strategy=name, workers=n, machines=n, speedup=0.9 * n, fast_speedup=n)
        for name in ("server:4", "tree", "ring", "server", "server+3")
        for n in (1, 4)
    ]
    _, axes = drawn(plots.simulation(points, None))
    looks = {}
    for line in axes.get_lines():
        looks[line.get_label().split(" ")[0]] = (line.get_color(), line.get_marker())
    assert looks["ring"][0] == plots.colour_of("ring")
    assert looks["tree"][0] == plots.colour_of("tree")
    servers = [looks[name] for name in ("server", "server:4", "server+3")]
    assert {colour for colour, _ in servers} == {plots.colour_of("parameter_server")}
    assert len(set(servers)) == 3, "they differ in their markers"


def test_the_ranks_that_are_shown_wait_for_each_other(measured):
    """Workers without an exchange come first in a table, and never wait."""
    made = report.of_sweep(measured)
    (view,) = [plot for plot in plots.of_report(made) if plot.name == "ranks"]
    _, axes = drawn(view.draw)
    assert axes.get_xlabel() == "rank (ring on 2)"


def test_the_ranks_that_are_shown_are_those_of_the_lead(measured):
    made = report.of_sweep(measured)
    slower = replace(row(made, "ring", 2), exchange="native", speedup=1.1)
    made = replace(made, rows=(slower, *made.rows))
    (view,) = [plot for plot in plots.of_report(made) if plot.name == "ranks"]
    _, axes = drawn(view.draw)
    assert axes.get_xlabel() == "rank (ring on 2)"


def test_a_figure_that_rounds_to_nothing_has_no_sign():
    assert text.number(-0.001) == "0.00" and text.number(-0.006) == "-0.01"


def test_an_interval_of_decades_is_no_interval():
    wide = Prediction("ring", 2, 0.05, 0.052, False, 0.0003, 95.0)
    made = Report(1, ReportHeader(), "", (), predictions=(wide, replace(wide, high_s=0.0006)))
    cells = [line.cells for line in page_tables.predicted(made).lines]
    assert [each[-2] for each in cells] == ["too wide to say", "0.30 to 0.60"]


def test_intervals_are_drawn_whole():
    axes = Figure().add_subplot()
    plots.curves([cell("ring", 1, 1.0, None), cell("ring", 2, 1.5, 3.0)], "speedup")(axes)
    low, high = axes.get_ylim()
    assert low < -1.5 and high > 4.5


def test_a_prediction_plot_has_ticks_and_its_intervals():
    axes = Figure().add_subplot()
    points = [Prediction("ring", n, 0.05 + 0.001 * n, 0.052, n < 4, 0.045, 0.06) for n in (2, 4)]
    plots.predicted(points)(axes)
    low, high = axes.get_xlim()
    assert len([tick for tick in axes.get_xticks() if low <= tick <= high]) >= 3
    assert high > 60 and low < 45
