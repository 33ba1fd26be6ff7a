"""Tests the engine with ranks that fail: 200 injections at random moments (faults.py).

No rank hangs or gets a wrong sum, and a rank that fails names the peer that it waited for.
"""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.engine import faults

NUM, AT_ONCE = 200, 10
SEED = 20261123


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_no_injection_hangs(tmp_path: Path):
    argv = [
        sys.executable,
        "-m",
        "tests.engine.faults",
        str(SEED),
        str(NUM),
        str(AT_ONCE),
        str(tmp_path),
    ]
    done = subprocess.run(
        argv, capture_output=True, text=True, timeout=230, cwd=Path(__file__).parents[2]
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == NUM
    assert all(n >= NUM // len(faults.KINDS) for n in Counter(r["kind"] for r in results).values())
    for result in results:
        survivors = [end for rank, end in enumerate(result["ends"]) if rank != result["victim"]]
        if result["kind"] == "late":
            assert (
                survivors == ["right"] * len(survivors)
                and result["ends"][result["victim"]] == "right"
            ), result
            continue
        assert all(end.startswith(("TimeoutError: ", "ConnectionError: ")) for end in survivors), (
            result
        )
        if result["kind"] == "too late":
            assert result["ends"][result["victim"]].startswith(
                ("TimeoutError: ", "ConnectionError: ")
            ), result
        # gloo's own allreduce, and gloo where its group is made, do not say whom they waited for.
        joining, gloos = (
            result["kind"] == "kill while joining",
            any("(gloo's own)" in end for end in survivors),
        )
        if not gloos and (
            (result["transport"], result["collective"]) != ("gloo", "native") or joining
        ):
            assert any(named(result["victim"], end) for end in survivors), result


def named(rank: int, message: str) -> bool:
    return re.search(rf"\branks? (\d+, )*{rank}\b", message) is not None


def test_injections_differ():
    drawn = [faults.draw(SEED, index) for index in range(len(faults.WIRES) * len(faults.KINDS))]
    assert {case["kind"] for case in drawn} == set(faults.KINDS)
    assert {(case["transport"], case["collective"], case["kind"]) for case in drawn} == {
        (*wire, kind) for wire in faults.WIRES for kind in faults.KINDS
    }
