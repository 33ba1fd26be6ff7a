"""Tests of parameter_server/.

Parameter servers on hosts in namespaces: a cut cable and a slow one, between hosts that
encrypt.
"""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from scaletrain.host import processes
from scaletrain.parameter_server.protocol import placement
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.worker.calibration import choose
from scaletrain.rehearsal import Cluster
from tests.parameter_server import job

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(120), pytest.mark.usefixtures("namespaces")]


@contextlib.contextmanager
def training(hosts: Cluster, made: Settings, run_dir, steps: int, delay_s: float):
    """The server on host 0, worker r on host r + 1."""
    server = subprocess.Popen(hosts.command(0, placement.command(made, run_dir, 0)), cwd=job.ROOT)
    started = [
        job.Worker(
            made,
            run_dir,
            rank,
            steps,
            delay_s,
            on_host=lambda argv, host=rank + 1: hosts.command(host, argv),
        )
        for rank in range(made.workers)
    ]
    try:
        with job.killed_at_the_end(started):
            yield started
    finally:
        server.terminate()
        server.wait(10)


def test_a_cut_link_is_noticed_by_both_ends_which_name_each_other(tmp_path):
    made = Settings(2, 4, mode="async", hosts=3, placement="dedicated")
    assert made.cipher == "aes"
    with Cluster(3, bandwidth=None) as hosts, training(hosts, made, tmp_path, 200, 0.05) as started:
        started[1].wait_for(10)
        hosts.cut(2)
        assert started[0].end(60) == 0, started[0].lines[
            -5:
        ]  # the other one goes on to the last step
        assert started[0].step == 200
        assert started[1].end(30) != 0
        said = "\n".join(started[1].lines)
        assert f"parameter server 0 (tcp://{hosts.addresses[0]}:" in said
        assert "closed the connection" in said or "no sign of life" in said
    assert [entry["rank"] for entry in job.statistics(tmp_path)["lost"]] == [1]


def test_plain_sync_names_the_worker_behind_a_cut_link(tmp_path):
    made = Settings(2, 4, hosts=3, placement="dedicated")
    with (
        Cluster(3, bandwidth=None) as hosts,
        training(hosts, made, tmp_path, 10_000, 0.0) as started,
    ):
        started[1].wait_for(10)
        hosts.cut(2)
        assert started[0].end(30) != 0
        assert "worker rank 1 was lost" in "\n".join(started[0].lines)


def test_a_slow_link_is_waited_for(tmp_path):
    made = Settings(2, 4, hosts=3, placement="dedicated")
    with (
        Cluster(3, bandwidth="100Mbit") as hosts,
        training(hosts, made, tmp_path, 30, 0.0) as started,
    ):
        started[1].wait_for(5)
        hosts.shape(2, "1Mbit")
        assert [worker.end(60) for worker in started] == [0, 0], [
            worker.lines[-5:] for worker in started
        ]
        assert started[0].result()["digest"] == started[1].result()["digest"]
    assert job.statistics(tmp_path)["lost"] == []


MEASURE = """
import json, sys
from pathlib import Path
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.worker.calibration import choose, measure
import time
settings, run_dir = Settings.from_json(sys.argv[1]), Path(sys.argv[2])
measure(settings, run_dir, 0)
began = time.monotonic()
rate = measure(settings, run_dir, 0)
print(json.dumps([rate, time.monotonic() - began]))
"""


def test_an_emulated_slow_link_is_found_to_be_slow(tmp_path: Path):
    """100 Mbit/s carry 12.5 MB/s each way, so 6.25 MB/s there and back."""
    settings = Settings(1, 20, hosts=2)
    with Cluster(2, bandwidth="100Mbit") as cluster:
        argv = cluster.command(1, placement.command(settings, tmp_path, 0))
        server = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
        with processes.ended([server]):
            command = [sys.executable, "-c", MEASURE, settings.to_json(), str(tmp_path)]
            output = subprocess.run(
                cluster.command(0, command), check=True, capture_output=True, text=True, timeout=50
            ).stdout
    rate, took_s = json.loads(output.splitlines()[-1])
    # The shaper lets the first bytes pass faster.
    assert 0.5 * 6.25e6 < 1 / rate < 2 * 6.25e6
    assert took_s < 1
    assert choose(30_000_000, rate).block_bytes <= 1 << 19
