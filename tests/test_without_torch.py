"""Login nodes: help, list, report, simulate, doctor's help, dry runs and every launcher work
without importing torch.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from scaletrain import plugins

ROOT = Path(__file__).parents[1]

# A torch that raises when it is imported, so a passing command really did without.
REFUSE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" or name.startswith("torch."):
            raise ImportError("torch was imported")
sys.meta_path.insert(0, Refuse())
sys.argv = ["scaletrain", *sys.argv[1:]]
from scaletrain.cli import main
main()
"""


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", REFUSE, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
    )


def test_the_guard_guards():
    done = run("worker", ".")
    assert done.returncode != 0 and "torch was imported" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "--help",
        "train --help",
        "launch --help",
        "report --help",
        "simulate --help",
        "fit --help",
        "proposal --help",
        "doctor --help",
        "list",
        "top tests/golden/sweep/cells/digits-native-w2-b96/0 --once",
        "draw ring",
        "bench --help",
    ],
)
def test_command_runs_without_torch(arguments: str):
    done = run(*arguments.split())
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_a_proposal_is_written_without_torch(tmp_path: Path):
    sweep = "benchmarks/results/scaling/strong"
    asked = ["--samples", "1e8", "--workers-per-node", "2"]
    done = run("proposal", sweep, *asked, "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "node hours" in done.stdout and (tmp_path / "proposal.html").exists()


@pytest.mark.parametrize("launcher", plugins.names("launcher"))
def test_a_plan_is_made_without_torch(launcher: str, tmp_path: Path):
    needed = []
    if launcher == "kubernetes":
        needed = ["--set", "launcher.container=image", "--set", "launcher.run_claim=runs"]
    done = run(
        "train",
        "examples/digits.yaml",
        *needed,
        "--workers",
        "2",
        "--launcher",
        launcher,
        "--run-dir",
        str(tmp_path / "r"),
        "--dry-run",
    )
    assert done.returncode == 0, done.stderr
    assert "scaletrain" in done.stdout
    assert not (tmp_path / "r").exists(), "a dry run writes nothing"


@pytest.mark.parametrize("command", plugins.names("bench"))
def test_bench_help_runs_without_torch(command: str):
    done = run("bench", command.replace("_", "-"), "--help")
    assert done.returncode == 0, done.stderr
