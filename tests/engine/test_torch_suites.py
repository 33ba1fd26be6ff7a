"""A few of torch's own tests of a backend, under ours; ``tests.engine.torch_suites`` runs all."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import require

WANTED = (
    "test_all_gather",
    "test_all_reduce_full_group_max",
    "test_accumulate_gradients_no_sync_allreduce_hook",
    "test_batch_isend_irecv_gloo",
    "test_monitored_barrier_gloo_subgroup",
    "test_gather_object",
    "test_reduce_sum",
    "test_scatter_checks",
    "test_send_recv_any_source",
    "test_send_recv_with_tag_torch_profiler",
)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_what_torch_asks_of_gloo_holds_for_our_backend(tmp_path: Path):
    require(
        "expecttest", importlib.util.find_spec("expecttest") is not None, "pip install expecttest"
    )
    output = tmp_path / "outcomes.json"
    command = [sys.executable, "-m", "tests.engine.torch_suites.shipped", "4", str(output), *WANTED]
    env = os.environ | {"SCALETRAIN_AS": "gloo"}
    subprocess.run(command, env=env, check=True, capture_output=True, timeout=220)
    assert json.loads(output.read_text()) == dict.fromkeys(sorted(WANTED), "passed")
