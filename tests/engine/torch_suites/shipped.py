"""torch's own tests of a distributed backend, as far as torch ships them, under one backend.

python -m tests.engine.torch_suites.shipped RANKS OUTPUT [PATTERN ...]

With ``SCALETRAIN_AS=gloo`` the name "gloo" means our backend, so that each test takes the same
branches under both. OUTPUT is a JSON file: the outcome of each test, by name.
"""

import contextlib
import fnmatch
import io
import json
import multiprocessing
import os
import sys
import unittest
import warnings
from pathlib import Path

# torch's module reads these when it is imported.
os.environ["BACKEND"] = "gloo"
os.environ["WORLD_SIZE"] = sys.argv[1] if __name__ == "__main__" else "4"
os.environ["DISTRIBUTED_TESTS_DEFAULT_TIMEOUT"] = "60"
warnings.simplefilter("ignore")

from torch.testing._internal.distributed import distributed_test  # noqa: E402

from scaletrain.engine import group_calls  # noqa: E402, F401 (once, instead of in each rank)

# The tests look for events "gloo:all_reduce" in profiles. Ours have our name.
distributed_test.PROFILING_SUPPORTED_BACKENDS.clear()
distributed_test.SEND_RECV_PROFILING_SUPPORTED_BACKENDS.clear()


class Shipped(distributed_test.TestDistBackend, distributed_test.DistributedTest._DistTestBase):
    """All tests of torch's suite. Ranks are forked: torch is imported once."""

    def setUp(self) -> None:
        super().setUp()
        self._start_processes(multiprocessing.get_context("fork").Process)


def outcome(name: str) -> str:
    """Run one test; return ``passed``, ``skipped`` or ``failed``, the last two with the reason."""
    result = unittest.TestResult()
    # The ranks' tracebacks are in the result, too.
    with contextlib.redirect_stderr(io.StringIO()):
        Shipped(name).run(result)
    wrong = result.failures + result.errors
    if wrong:
        return f"failed: {reason(wrong[0][1])}"
    if result.skipped:
        return f"skipped: {result.skipped[0][1]}"
    return "passed"


def reason(text: str) -> str:
    """Return the last line of a traceback that says what went wrong on a rank."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and "exited with error code" not in line]
    return (errors or lines or ["?"])[-1][:300]


def main(output: Path, patterns: list[str]) -> None:
    """Run the tests whose names match one of the patterns, and write their outcomes."""
    Shipped.setUpClass()
    outcomes = {}
    for name in unittest.TestLoader().getTestCaseNames(Shipped):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            outcomes[name] = outcome(name)
            print(f"{name}: {outcomes[name]}", flush=True)
            output.write_text(json.dumps(outcomes, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[2]), sys.argv[3:] or ["*"])
