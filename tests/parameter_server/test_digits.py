"""Tests of parameter_server/.

Tests the whole command, on real digits, in every mode of the parameter server.
"""

import json
import subprocess
import sys

import pytest

from tests.parameter_server.job import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


@pytest.mark.parametrize(
    "settings",
    [
        {"mode": "async", "link": "tcp", "security": "aes"},
        {"mode": "bounded", "link": "tcp", "security": "curve"},
        {"mode": "sync", "backup_workers": 1, "placement": "beside", "servers": 2},
        {"mode": "local_sgd"},
        {"mode": "local_sgd", "outer": "nesterov"},
    ],
    ids=lambda settings: settings.get("outer", settings["mode"]),
)
def test_digits_are_learned_in_every_mode(tmp_path, settings):
    options = [
        text for key, value in settings.items() for text in ("--set", f"exchange.{key}={value}")
    ]
    argv = [
        sys.executable,
        "-m",
        "scaletrain.cli",
        "train",
        "examples/digits.yaml",
        "--exchange",
        "parameter_server",
    ]
    done = subprocess.run(
        [*argv, "--workers", "3", "--run-dir", str(tmp_path / "run"), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["test_accuracy"] >= 0.97
    assert (
        f"{settings.get('servers', 1)} server" in done.stdout
        and f"{settings['mode']}; staleness" in done.stdout
    )
