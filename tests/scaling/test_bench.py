"""Tests of cli/bench/ and benchmarks/lab/.

The commands as people type them: real trainings, and a model timed layer by layer.
"""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from click.testing import CliRunner
from torch import nn

from benchmarks.lab import binding, firecaffe
from scaletrain.cli import cli
from scaletrain.cli.bench.model import time_layers
from scaletrain.errors import UserError
from scaletrain.scaling.measure import sweep

from .runs import write_run


def timed(model: nn.Module, inputs: torch.Tensor, targets: torch.Tensor, passes: int):
    def loss() -> torch.Tensor:
        return nn.functional.cross_entropy(model(inputs), targets)

    return time_layers(model, loss, len(inputs), passes)


def test_every_layer_is_timed_and_counted():
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    inputs, targets = torch.randn(32, 64), torch.randint(0, 10, (32,))
    made = timed(model, inputs, targets, passes=5)
    by = {layer.name: layer for layer in made.layers}
    assert list(by) == ["0", "1", "2"]
    assert [by[name].parameters for name in by] == [64 * 256 + 256, 0, 256 * 10 + 10]
    assert by["0"].activations == 32 * 256
    assert made.weight_bytes == 4 * sum(p.numel() for p in model.parameters())
    assert made.data_to_weight_ratio == pytest.approx(made.activation_bytes / made.weight_bytes)
    assert all(layer.forward_s > 0 and layer.backward_s > 0 for layer in made.layers)
    assert sum(layer.forward_s for layer in made.layers) <= made.forward_s
    assert not any(
        module._forward_hooks for module in model.modules()
    )  # the model is left as it was


def test_a_slow_layer_is_found():
    class Slow(nn.Module):
        def forward(self, x):
            return (x.unsqueeze(-1) * torch.ones(2000)).mean(-1)

    model = nn.Sequential(nn.Linear(64, 64), Slow(), nn.Linear(64, 10))
    made = timed(
        model,
        torch.randn(64, 64),
        torch.randint(0, 10, (64,)),
        passes=3,
    )
    slowest = max(made.layers, key=lambda layer: layer.forward_s)
    assert slowest.type == "Slow"
    assert max(made.layers, key=lambda layer: layer.backward_s).type == "Slow"


def test_layers_of_any_shape_are_timed():
    """Outputs in tuples, weights beside inner layers, one layer used twice."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(8))
            self.lstm, self.act, self.head = (
                nn.LSTM(8, 16, batch_first=True),
                nn.Tanh(),
                nn.Linear(16, 3),
            )

        def forward(self, x):
            return self.head(self.act(self.act(self.lstm(x * self.scale)[0][:, -1])))

    model = Net()
    made = timed(
        model,
        torch.randn(4, 5, 8),
        torch.randint(0, 3, (4,)),
        passes=2,
    )
    by = {layer.name: layer for layer in made.layers}
    assert sum(layer.parameters for layer in made.layers) == sum(
        p.numel() for p in model.parameters()
    )
    assert by["act"].activations == 2 * 4 * 16 and by["lstm"].activations == 4 * 5 * 16 + 2 * 4 * 16
    words = nn.Sequential(
        nn.Embedding(10, 4), nn.Flatten(), nn.Linear(12, 3)
    )  # integers go in, four bytes a number come out
    made = timed(
        words,
        torch.randint(0, 10, (2, 3)),
        torch.tensor([0, 1]),
        passes=1,
    )
    assert made.activation_bytes == 4 * (24 + 24 + 6)


def test_layers_that_were_timed_say_when_gradients_leave(tmp_path):
    config, out = tmp_path / "job.yaml", tmp_path / "layers.json"
    config.write_text(
        "model: {name: mlp, sizes: [64, 32, 10]}\ndata: digits\nbatch_size: 64\nsteps: 12\n"
    )
    timed = CliRunner().invoke(
        cli,
        ["bench", "model", str(config), "--passes", "2", "--out", str(out)],
        catch_exceptions=False,
    )
    assert timed.exit_code == 0, timed.output
    arguments = ["simulate", "--batch", "64", "--workers", "1,2,4", "--half-duplex", "--layers"]
    told = CliRunner().invoke(cli, [*arguments, str(out)], catch_exceptions=False)
    assert told.exit_code == 0 and "ring" in told.output, told.output
    with pytest.raises(UserError, match="bench model --out"):
        CliRunner().invoke(cli, [*arguments, str(config)], catch_exceptions=False)


@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_sweep_of_real_trainings(tmp_path):
    config, out = tmp_path / "job.yaml", tmp_path / "out"
    config.write_text(
        "model: {name: mlp, sizes: [64, 32, 10]}\ndata: digits\nbatch_size: 64\nsteps: 12\n"
    )
    arguments = [
        "bench",
        "scaling",
        str(config),
        "--workers",
        "1,2",
        "--exchange",
        "ring,none",
        "--repeats",
        "1",
        "--out",
        str(out),
    ]
    done = CliRunner().invoke(cli, [*arguments, "--trace"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= 2:  # else nothing is bound
        each = len(cores) // 2
        own = [",".join(map(str, cores[each * rank : each * (rank + 1)])) for rank in range(2)]
        assert f"bound to cores: rank 0 on {own[0]}, 1 on {own[1]}" in done.output
    report = json.loads((out / "report.json").read_text())
    rows = {(row["exchange"], row["workers"]): row for row in report["rows"]}
    assert len(rows) == 4 and all(
        row["samples_per_s"] > 0 and not row["failures"] for row in rows.values()
    )
    assert rows["ring", 2]["gradient_bytes"] == 4 * (64 * 32 + 32 + 32 * 10 + 10)
    assert rows["ring", 2]["final_loss"] == pytest.approx(rows["ring", 1]["final_loss"], abs=1e-4)
    loss = next(x for x in report["losses"] if x["exchange"] == "ring")
    # Within 5 %, of the loss or of a step's hundredth: so short a run may lose next to nothing.
    assert abs(loss["causes"]["unexplained"]) <= max(
        0.05 * abs(loss["loss_s"]), 0.01 * loss["step_s"]
    )
    assert rows["ring", 2]["bytes_sent"] == rows["ring", 2]["gradient_bytes"]
    assert {"commit", "versions", "host", "cores", "config"} <= set(report["header"])
    traces = json.loads(next((out / "traces").glob("*ring-w2*")).read_text())["traceEvents"]
    assert {event["pid"] for event in traces} == {0, 1}
    rings = next((out / "cells").glob("*ring-w2-b64")) / "0"
    offsets = [
        json.loads((rings / f"rank-{rank}.json").read_text())["clock_offset_s"] for rank in (0, 1)
    ]
    assert (
        offsets[0] == 0 and 0 < abs(offsets[1]) < 0.05
    )  # one machine has one clock; the store's round trip is what is left
    ours = [event for event in traces if event["pid"] == 1 and event["ph"] == "X"]
    steps = {event["name"]: event for event in ours if event["name"].startswith("step")}
    for kind, least in (("bucket 0", 12), ("round 0", 12), ("round 1", 12), ("wait for 0", 24)):
        found = [event for event in ours if event["name"] == kind]
        assert len(found) >= least, kind
        inside = [
            e
            for e in found
            if any(s["ts"] <= e["ts"] <= s["ts"] + s["dur"] for s in steps.values())
        ]
        assert len(inside) >= least, kind  # the others are the evaluation's
    assert "<svg" in (out / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(90)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_sweep_that_is_ended_ends_its_training(tmp_path, number):
    config, out = tmp_path / "job.yaml", tmp_path / "out"
    config.write_text(
        "model: {name: mlp, sizes: [64, 32, 10]}\ndata: digits\nbatch_size: 64\nepochs: 2000\n"
    )
    arguments = [
        "bench",
        "scaling",
        config,
        "--workers",
        "2",
        "--exchange",
        "ring",
        "--no-split",
        "--out",
        out,
    ]
    bench = subprocess.Popen(
        [sys.executable, "-m", "scaletrain.cli", *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None,  # CI may run in the background
    )  # fmt: skip

    def training():
        found = [
            p
            for p in psutil.process_iter(["cmdline"])
            if str(out / "cells") in " ".join(p.info["cmdline"] or [])
        ]
        return [p for p in found if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]

    try:
        until = time.monotonic() + 60
        while not [*out.glob("cells/*/0/rank-1.jsonl")]:
            assert time.monotonic() < until and bench.poll() is None, bench.communicate()[0]
            time.sleep(0.1)
        assert len(training()) >= 3  # the command and its two workers
        bench.send_signal(number)
        output, _ = bench.communicate(timeout=30)
        assert (
            bench.returncode == (-number if number == signal.SIGKILL else 128 + number)
            and "Traceback" not in output
        )
        if number != signal.SIGKILL:
            assert "stopped: 5 runs are missing; the same command with --out" in output
        until = time.monotonic() + 15
        while left := training():
            assert time.monotonic() < until, [p.cmdline() for p in left]
            time.sleep(0.1)
    finally:
        for process in (bench, *training()):
            process.kill()


def test_firecaffe_writes_its_page_from_what_was_measured(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    configs = [firecaffe.SUITES / f"{name}.yaml" for name in firecaffe.MB]
    for name, counts, exchanges in (
        ("one", (1,), ("none",)),
        ("many", (2, 4), firecaffe.EXCHANGES),
    ):
        plan = sweep.plan(
            sweep.Request(
                configs, counts, exchanges, repeats=1, launcher="rehearsal", threads=1, split=False
            )
        )
        sweep.claim(data / name, plan)
        for cell in plan.cells():
            if (cell.exchange, cell.workers) != ("ring", 4):  # not yet measured
                steps = [[2.0 / cell.workers + 0.1 * (cell.workers - 1)] * 5] * cell.workers
                run = sweep.run_dir(data / name, cell, 0)
                write_run(
                    run,
                    exchange=cell.exchange,
                    steps=steps,
                    samples=256 // cell.workers,
                    emulated=True,
                )
    row = {
        "MB": 30.4,
        "workers": 2,
        "server_s": 0.6,
        "server_formula_s": 0.5,
        "tree_s": 0.5,
        "tree_formula_s": 0.5,
    }
    (data / "exchanges-2.json").write_text(json.dumps({"tree": [row, row | {"MB": 5.0}]}))
    arguments = [
        "--no-measure",
        "--hosts",
        "2,4",
        "--data",
        str(data),
        "--out",
        str(out),
    ]
    done = CliRunner().invoke(firecaffe.command, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    page = (out / "firecaffe.md").read_text()
    assert "EMULATED" in page and "Unfinished: 2 of 14 runs are missing" in page
    assert (
        re.search(r"\| nin \| tree \| 2 \| 1.10 \| 1.82 \| 0.91 \| \d", page)
        and "| nin | ring | 4 | not measured" in page
    )
    assert "| 30.4 | 2 | 0.60 | 0.50 | 1.20 |" in page and "| 5.0 |" not in page
    assert {p.name for p in out.iterdir()} >= {
        "firecaffe.json",
        "firecaffe.html",
        "firecaffe_speedup.svg",
    }


@pytest.mark.parametrize(
    ("bound", "verdict"),
    [(1.1, "faster when bound"), (0.9, "slower when bound"), (1.001, "not decided")],
)
def test_binding_pays_where_all_of_the_interval_says_so(
    bound: float, verdict: str, monkeypatch: pytest.MonkeyPatch
):
    speeds = itertools.count(1000)  # a machine that becomes a little faster with every run

    def made_up(job: str, exchange: str, bind: bool) -> float:
        return next(speeds) * (bound if bind else 1.0)

    monkeypatch.setattr(binding, "_samples_per_s", made_up)
    row = binding._measure("mlp", "ring", busy=1, repeats=6)
    assert row.verdict == verdict
    assert row.low < bound < row.high
