"""Tests of cli/.

The commands as people type them: what they print, what they leave, and their exit status.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from scaletrain import plugins

ROOT = Path(__file__).parents[1]
DIGITS = "examples/digits.yaml"
SUMMARY = {
    "workers", "exchange", "device", "steps", "samples_per_s", "step_s_p50", "step_s_p95", "final_loss", "test_accuracy", "wall_s",
}  # fmt: skip

pytestmark = pytest.mark.slow


def scaletrain(*arguments: str | Path, timeout: float = 90) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "scaletrain.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT)


def test_train_leaves_a_run_directory(tmp_path: Path):
    # A start that failed before its first step is no run.
    (tmp_path / "run").mkdir()
    for name in ("config.yaml", "failure.json", "rank-0.jsonl"):
        (tmp_path / "run" / name).touch()
    done = scaletrain(
        "train",
        DIGITS,
        "--workers",
        "2",
        "--set",
        "steps=12",
        "--set",
        "epochs=null",
        "--run-dir",
        tmp_path / "run",
    )
    assert done.returncode == 0, done.stderr
    for said in (
        "48 (fixed global batch, strong scaling)",
        "learning rate: 0.05 for 96 samples",
        "15 steps of warm-up (longer than the run",
        "(1437 samples, 93 of them left out of each epoch's order)",
    ):
        assert said in done.stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary) >= SUMMARY
    assert (summary["workers"], summary["exchange"], summary["steps"], summary["emulated"]) == (
        2,
        "native",
        12,
        False,
    )
    for rank in (0, 1):
        records = [
            json.loads(line)
            for line in (tmp_path / "run" / f"rank-{rank}.jsonl").read_text().splitlines()
        ]
        assert [record["step"] for record in records] == list(range(12))
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (
        resolved["steps"] == 12
        and resolved["exchange"]["name"] == "native"
        and resolved["batch_mode"] == "strong"
    )
    assert list((tmp_path / "run").glob("step-12.safetensors"))
    again = scaletrain("train", DIGITS, "--run-dir", tmp_path / "run")
    assert again.returncode == 2 and "holds a run already" in again.stderr, (
        "records are never written over"
    )


def test_the_header_of_a_run_tells_what_auto_chose(tmp_path: Path):
    options = ("--workers", "2", "--exchange", "scheduled", "--set", "epochs=1")
    done = scaletrain("train", DIGITS, *options, "--run-dir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    headers = [
        json.loads((tmp_path / "run" / f"rank-{rank}.json").read_text())["chosen"]
        for rank in (0, 1)
    ]
    assert headers[0] == headers[1] and headers[0]["transport"] == "shared_memory"
    known = {*plugins.names("collective"), "native"}
    assert headers[0]["chosen"] and all(
        choice["collective"] in known for choice in headers[0]["chosen"].values()
    )


def test_a_persons_own_model_and_data(tmp_path: Path):
    done = scaletrain(
        "train", "examples/own/job.yaml", "--workers", "2", "--run-dir", tmp_path / "run"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test_accuracy"] >= 0.97


@pytest.mark.slow
def test_lines_of_different_lengths_are_learned_as_by_one_worker(tmp_path: Path):
    """The example whose mean is over characters: three workers end where one does."""
    losses = []
    for workers in ("1", "3"):
        run_dir = tmp_path / workers
        done = scaletrain(
            "train", "examples/characters/job.yaml", "--workers", workers, "--run-dir", run_dir,
            "--set", "steps=60", "--set", "evaluate_every=20",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        summary = json.loads((run_dir / "summary.json").read_text())
        losses.append(summary["test_loss"])
        lines = (run_dir / "evaluations.jsonl").read_text().splitlines()
        evaluations = [json.loads(line) for line in lines]
        assert [evaluation["step"] for evaluation in evaluations] == [20, 40, 60]
        assert evaluations[-1]["test_loss"] == summary["test_loss"]
        assert f"step 20/60  test_loss {evaluations[0]['test_loss']:.4g}" in done.stdout
    assert losses[0] < 3.0  # guessing by the frequency of characters alone gives 3.23
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@pytest.mark.slow
def test_two_models_learn_by_turns(tmp_path: Path):
    """The example of a GAN: what it makes lies on the ring, and all around it."""
    done = scaletrain(
        "train", "examples/gan/job.yaml", "--workers", "2", "--run-dir", tmp_path / "run",
        "--set", "steps=600",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["test_near"] > 0.4  # noise of the ring's size gives 0.2
    assert summary["test_reached"] > 0.8


def test_a_mistake_that_only_a_worker_can_see_is_one_line(tmp_path: Path):
    done = scaletrain(
        "train", DIGITS, "--workers", "2", "--run-dir", tmp_path / "run",
        "--set", "optimizer.nesterov=true", "--set", "optimizer.momentum=0",
    )  # fmt: skip
    assert done.returncode == 2
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.count("Nesterov momentum requires a momentum") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="nccl works here: tests/gpu")
def test_a_wire_that_is_not_to_be_had_is_one_line_and_the_directory_may_be_used_again(
    tmp_path: Path,
):
    run = (
        "train",
        DIGITS,
        "--workers",
        "2",
        "--set",
        "steps=3",
        "--set",
        "epochs=null",
        "--run-dir",
        tmp_path / "run",
    )
    done = scaletrain(*run, "--exchange", "ring@nccl")
    assert done.returncode == 2 and "Traceback" not in done.stderr + done.stdout
    assert done.stderr.count("nccl") == 1, done.stderr
    done = scaletrain(*run, "--exchange", "ring@gloo")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_ranks_and_the_run_goes_on_with_resume(
    number: signal.Signals, tmp_path: Path
):
    run = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "scaletrain.cli",
        "train",
        DIGITS,
        "--workers",
        "3",
        "--set",
        "epochs=200",
        "--run-dir",
        str(run),
    ]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while (
            not (run / "rank-2.jsonl").exists()
            or (run / "rank-2.jsonl").read_text().count("\n") < 20
        ):
            assert time.monotonic() < deadline and process.poll() is None, (
                process.stdout and process.stdout.read()
            )
            time.sleep(0.1)
        process.send_signal(signal.SIGUSR2)
        while not list(run.glob("step-*")):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.05)
        saved = [int(path.stem.removeprefix("step-")) for path in run.glob("step-*")]
        process.send_signal(number)
        output, _ = process.communicate(timeout=30)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 128 + number, output
    assert "asked for a checkpoint; the run goes on" in output and not (run / "save_now").exists()
    summary = json.loads((run / "summary.json").read_text())
    assert summary["finished"] is False and 20 <= summary["steps"] < 2800
    counts = {(run / f"rank-{rank}.jsonl").read_text().count("\n") for rank in range(3)}
    assert counts == {summary["steps"]}, "all ranks stopped at the same step"
    assert len(saved) == 1 and 20 <= saved[0] < summary["steps"], "it went on after SIGUSR2"
    more = str(summary["steps"] + 5)
    done = scaletrain(
        "train",
        DIGITS,
        "--workers",
        "2",
        "--set",
        f"steps={more}",
        "--set",
        "epochs=null",
        "--run-dir",
        run,
        "--resume",
    )
    assert done.returncode == 0, done.stderr
    assert f"resumed at step {summary['steps']}" in done.stdout
    assert json.loads((run / "summary.json").read_text())["steps"] == summary["steps"] + 5


@pytest.mark.parametrize("backend", ["scaletrain", "gloo"])
def test_launch_runs_a_persons_script(backend: str, tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        (ROOT / "examples" / "ddp_script.py")
        .read_text()
        .replace('group("scaletrain")', f'group("{backend}")')
    )
    done = scaletrain("launch", "-n", "3", "--run-dir", tmp_path / "run", "--", script)
    assert done.returncode == 0, done.stderr
    assert "3 workers, loss" in done.stdout and "3 workers on " in done.stderr
    assert done.stderr.startswith(f"run directory: {tmp_path / 'run'}\n")


def test_attach_in_a_persons_loop_equals_one_process(tmp_path: Path):
    script = tmp_path / "loop.py"
    script.write_text(
        "import os, torch, scaletrain\n"
        "torch.manual_seed(0)\n"
        "net = torch.nn.Linear(4, 1)\n"
        "opt = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)\n"
        "model, exchange = scaletrain.attach(net, opt, exchange='tree')\n"
        "x = torch.randn(12, 4); y = x.sum(1, keepdim=True)\n"
        "r, n = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])\n"
        "for _ in range(10):\n"
        "    model.zero_grad()\n"
        "    torch.nn.functional.mse_loss(model(x[r::n]), y[r::n]).backward()\n"
        "    exchange.step()\n"
        "if r == 0: print('weights', net.weight.detach().flatten().tolist())\n"
        "exchange.close()\n"
    )
    found = []
    for workers in ("1", "3"):
        done = scaletrain("launch", "-n", workers, "--run-dir", tmp_path / workers, "--", script)
        assert done.returncode == 0, done.stderr
        line = next(line for line in done.stdout.splitlines() if "weights" in line)
        found.append(json.loads(line[line.index("[", line.index("weights")) :]))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_doctor_tries_and_says_how_to_mend():
    done = scaletrain("doctor", "--json", timeout=300)
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1)
    found = {check["name"]: check for check in report["checks"]}
    assert found["native"]["status"] == "ok" and found["scheduled"]["status"] == "ok", found
    assert all(check["fix"] for check in report["checks"] if check["status"] != "ok")


def test_list_shows_every_plugin_on_disk():
    menu = json.loads(scaletrain("list", "--json").stdout)
    assert set(menu) >= set(plugins.KINDS) - {"verb"}  # `scaletrain --help` lists the verbs
    for kind in set(plugins.KINDS) - {"verb"}:
        typed = [plugins.typed_name(kind, name) for name in plugins.names(kind)]
        assert [entry["name"] for entry in menu[kind]] == typed
