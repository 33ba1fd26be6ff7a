"""Tests of docs/from_pytorch.md: its script and its job run, and learn the same."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def blocks(language: str) -> list[str]:
    """Return the page's code of a language, in order."""
    page = (ROOT / "docs" / "from_pytorch.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


@pytest.mark.slow
def test_the_script_and_the_job_learn_the_same(tmp_path: Path):
    plain, mine = blocks("python")
    [job] = blocks("yaml")
    for name, text in {"plain.py": plain, "mine.py": mine, "job.yaml": job}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    commands = [
        [sys.executable, "plain.py"],
        [sys.executable, "-m", "scaletrain.cli", "train", "job.yaml", "--workers", "2",
         "--run-dir", "run"],
    ]  # fmt: skip
    accuracies = []
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        [accuracy] = re.findall(r"test accuracy (\d\.\d+)", done.stdout)
        accuracies.append(float(accuracy))
    assert min(accuracies) > 0.9
    assert abs(accuracies[0] - accuracies[1]) < 0.05  # other samples, another order
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert summary["workers"] == 2 and summary["finished"]
