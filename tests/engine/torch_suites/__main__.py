"""torch's own tests under gloo and under our backend, as a table in Markdown.

python -m tests.engine.torch_suites OUTPUT
"""

import collections
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from scaletrain.run.environment import environment
from scaletrain.scaling.show import results

RANKS = (4, 8)  # some tests want exactly 4, some at least 8
SUBJECTS = {"gloo": "", "scaletrain": "gloo"}  # and what SCALETRAIN_AS says


def outcomes(ranks: int, subject: str, folder: Path) -> dict[str, str]:
    """Run all tests; return what became of each."""
    output = folder / f"{ranks}-{subject}.json"
    command = [sys.executable, "-m", "tests.engine.torch_suites.shipped", str(ranks), str(output)]
    env = os.environ | {"SCALETRAIN_AS": SUBJECTS[subject]}
    subprocess.run(command, env=env, check=True, stderr=subprocess.DEVNULL, timeout=7200)
    return json.loads(output.read_text(encoding="utf-8"))


def main(output: Path) -> None:
    """Write the page."""
    rows = []
    differences = []
    with tempfile.TemporaryDirectory() as folder:
        for ranks in RANKS:
            found = {subject: outcomes(ranks, subject, Path(folder)) for subject in SUBJECTS}
            for subject, by_name in found.items():
                kinds = collections.Counter(text.partition(":")[0] for text in by_name.values())
                rows.append(
                    f"| {ranks} | {subject} | {kinds['passed']} | {kinds['failed']} |"
                    f" {kinds['skipped']} |"
                )
            for name, theirs in found["gloo"].items():
                ours = found["scaletrain"][name]
                if ours.partition(":")[0] != theirs.partition(":")[0]:
                    differences.append(f"- {ranks} ranks, `{name}`: gloo {theirs}; ours {ours}")
    page = [
        "# torch's own tests of a backend\n",
        "The tests that torch ships (`torch.testing._internal.distributed.distributed_test`), run"
        " on CPUs under gloo",
        "and under our backend by gloo's name: `python -m tests.engine.torch_suites"
        " benchmarks/results/torch_suites.md`.",
        f"{results.measured_on(environment())}\n",
        "Skipped tests need GPUs, MPI or another number of ranks, under both. The checks of"
        " profiles are left out: our events",
        "are called `scaletrain:all_reduce`, not `gloo:all_reduce`, and are not marked as"
        " asynchronous.\n",
        "| ranks | backend | passed | failed | skipped |",
        "|---|---|---|---|---|",
        *rows,
        "\n## Differences\n",
        *(differences or ["None."]),
    ]
    output.write_text("\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
