"""Tests the lines of SECURITY.md: others on the host or the network change nothing."""

import time

import pytest
import torch

from scaletrain.config import timeouts
from scaletrain.errors import UserError
from scaletrain.parameter_server.protocol import placement
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.worker.requests import ServerError
from scaletrain.run.job_key import job_key
from tests.parameter_server import job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.mark.parametrize("security_option", ["curve", "trusted_network"])
def test_peers_without_the_key_never_get_in(tmp_path, monkeypatch, security_option):
    monkeypatch.setattr(timeouts, "_START_S", 4.0)  # else it tries for minutes
    made = Settings(1, 4, link="tcp", security=security_option, placement="dedicated")
    thief = tmp_path / "thief"
    thief.mkdir()
    with job.servers(made, tmp_path):
        while placement.read_address(tmp_path, 0) is None:
            time.sleep(0.01)
        (thief / "server-0.address.json").write_text(
            (tmp_path / "server-0.address.json").read_text()
        )
        net = job.model()
        with pytest.raises(ServerError):  # its own keys are not the job's
            job.exchange(made, thief, 0).attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
        joined = job.exchange(made, tmp_path, 0)
        joined.attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
        joined.close()


def test_keys_and_sockets_are_the_owners_alone(tmp_path):
    with job.servers(Settings(1, 5), tmp_path):
        while placement.read_address(tmp_path, 0) is None:
            time.sleep(0.01)
        assert (tmp_path / ".job.key").stat().st_mode & 0o777 == 0o600
        assert (tmp_path / ".sockets").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / ".sockets" / "server-0").stat().st_mode & 0o177 == 0
        key = job_key(tmp_path)
        (tmp_path / ".job.key").chmod(0o644)
        with pytest.raises(UserError, match="can be read by others"):
            job_key(tmp_path)
        (tmp_path / ".job.key").chmod(0o600)
    argv = " ".join(placement.command(Settings(1), tmp_path, 0))
    assert key.secret.hex() not in argv and key.secret.hex() not in repr(key)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"server-0.json"}  # keys and sockets are gone with the job


def test_keys_outlive_the_first_server_that_ends(tmp_path):
    """A worker that comes later proves itself to the others, or to the successor, by the same."""

    def end(settings, folder):
        folder.mkdir()
        held = []
        with job.servers(settings, folder) as started:
            while any(placement.read_address(folder, i) is None for i in range(len(started))):
                time.sleep(0.01)
            key = job_key(folder)
            started[0].stop()
            while placement.read_address(folder, 0) is not None:
                time.sleep(0.01)
            if len(started) > 1:
                held.append(job_key(folder) == key)
        return held, (folder / ".job.key").exists()

    assert end(Settings(1, 5, servers=2), tmp_path / "two") == ([True], False)
    restarted = Settings(1, 5, snapshot_updates=1, restart_servers=1)
    assert end(restarted, tmp_path / "restarted") == ([], True)
