"""Tests the engine with ranks that fail: 210 injections at random moments (faults.py).

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

NUM, AT_ONCE = 210, 6
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
    num_own_ends = 0
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
        victim = result["ends"][result["victim"]]
        if result["kind"] == "too late":
            assert victim.startswith(("TimeoutError: ", "ConnectionError: ")), result
        if result["kind"] in ("interrupt", "abort"):
            own_end = victim == "interrupted" or "has ended the group (abort)" in victim
            num_own_ends += own_end
            if not own_end:  # on a busy machine the ranks may fail to meet before it
                assert "timed out" in " ".join(result["ends"]), result
                continue
        # gloo's own allreduce, and gloo where its group is made, do not say whom they waited for.
        joining, gloos = (
            result["kind"] == "kill while joining",
            any("(gloo's own)" in end for end in survivors),
        )
        if not gloos and (
            (result["transport"], result["collective"]) != ("gloo", "native") or joining
        ):
            assert any(named(result["victim"], end) for end in survivors), result
    assert num_own_ends > NUM // len(faults.KINDS)  # of twice as many


def named(rank: int, message: str) -> bool:
    return re.search(rf"\branks? (\d+, )*{rank}\b", message) is not None


def test_injections_differ():
    drawn = [faults.draw(SEED, index) for index in range(NUM)]
    assert {case["kind"] for case in drawn} == set(faults.KINDS)
    expected = {(*wire, kind) for wire in faults.WIRES for kind in faults.KINDS}
    expected -= {(*wire, "abort") for wire in set(faults.WIRES) - set(faults.CAN_ABORT)}
    assert {(case["transport"], case["collective"], case["kind"]) for case in drawn} == expected
