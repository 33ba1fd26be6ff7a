"""Tests the lines of SECURITY.md: others on the host or the network change nothing."""

import contextlib
import re
import resource
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
import zmq

from scaletrain import timeouts
from scaletrain.errors import UserError
from scaletrain.parameter_server.protocol import placement, security, wire
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.worker.requests import ServerError
from scaletrain.run.job_key import job_key
from tests.parameter_server import job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.mark.parametrize("security_option", ["aes", "curve", "trusted_network"])
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
        assert (tmp_path / ".private").stat().st_mode & 0o777 == 0o700
        assert (tmp_path / ".private" / "server-0").stat().st_mode & 0o177 == 0
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


def others_write_into_the_store(run: subprocess.Popen, stop_at: str) -> None:
    """Write what would stop a job, as another user of this host can, once its store is there."""
    deadline = time.monotonic() + 150
    while run.poll() is None and time.monotonic() < deadline:
        for process in psutil.Process(run.pid).children(recursive=True):
            # The attacker scans the ports of loopback; the test need not.
            with contextlib.suppress(psutil.Error):
                environ = process.environ()
                if environ.get("RANK") != "1":
                    continue
                port = int(environ["MASTER_PORT"])
                store = dist.TCPStore("127.0.0.1", port, None, wait_for_workers=False)
                store.set("scaletrain/0/scaletrain/stop_at", stop_at)
                return
        time.sleep(0.05)
    raise AssertionError("no worker was found")


@pytest.mark.timeout(300)
def test_a_job_whose_store_others_write_into_fails_instead_of_stopping(tmp_path):
    """The whole command. It ended early with status 0 before values had to be the job's own."""
    argv = ["-m", "scaletrain.cli", "train", "examples/digits.yaml", "--workers", "2"]
    options = {"exchange.link": "tcp", "exchange.security": "curve", "epochs": "1000"}
    settings = [text for name in options for text in ("--set", f"{name}={options[name]}")]
    run = subprocess.Popen(
        [
            *(sys.executable, *argv, "--exchange", "parameter_server"),
            # Cold: the environment of a process that was forked tells no port.
            *("--cold", "--run-dir", str(tmp_path / "run"), *settings),
        ],
        cwd=job.ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        others_write_into_the_store(run, stop_at="20")
        output, _ = run.communicate(timeout=200)
    finally:
        run.kill()
        run.wait()
    assert run.returncode not in (0, None)
    assert "scaletrain/stop_at was not written by a process of this job" in output, output[-2000:]
    assert not (tmp_path / "run" / "summary.json").exists()
    assert not (tmp_path / "run" / ".job.key").exists()  # it went with the job


OPTIONS = {"link": "tcp", "placement": "dedicated"}


@contextlib.contextmanager
def limited_server(settings: Settings, run_dir: Path, descriptors: int) -> Iterator[psutil.Process]:
    """A server process that may open few descriptors, as on a busy machine."""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))

    process = subprocess.Popen(
        placement.command(settings, run_dir, 0), cwd=job.ROOT, preexec_fn=limit
    )
    try:
        deadline = time.monotonic() + 60
        while placement.read_address(run_dir, 0) is None:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        yield psutil.Process(process.pid)
        assert process.poll() is None, "the server has ended"
    finally:
        process.kill()
        process.wait()


def port_of(run_dir: Path) -> int:
    return int(placement.read_address(run_dir, 0)["endpoints"][0].rpartition(":")[2])


def train_alone(settings: Settings, run_dir: Path, steps: int = 5) -> None:
    """One honest worker trains, and gets the weights that torch alone gets."""
    weights, _ = job.work(settings, run_dir, 0, steps)
    for weight, reference in zip(weights, job.single(steps, 1), strict=True):
        torch.testing.assert_close(weight, reference)


@pytest.mark.parametrize("security_option", ["aes", "curve"])
def test_connections_that_say_nothing_shut_nobody_out(tmp_path, security_option):
    """700 of them against a limit of 256 descriptors, and new ones all the time."""
    settings = Settings(1, 20, security=security_option, **OPTIONS)
    with limited_server(settings, tmp_path, 256) as server, contextlib.ExitStack() as stack:
        port = port_of(tmp_path)
        for _ in range(700):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        flooding = threading.Event()

        def flood() -> None:
            while not flooding.wait(0.005):
                silent = socket.create_connection(("127.0.0.1", port), timeout=10)
                stack.callback(silent.close)

        thread = threading.Thread(target=flood, daemon=True)
        thread.start()
        try:
            train_alone(settings, tmp_path)
        finally:
            flooding.set()
            thread.join(10)
        # ZeroMQ's own time limit would have ended none of them by now.
        deadline = time.monotonic() + 5
        while job.statistics(tmp_path)["turned_away"] < 300:
            assert time.monotonic() < deadline, job.statistics(tmp_path)["turned_away"]
            time.sleep(0.1)
        assert server.num_fds() < 256


def test_workers_may_send_more_than_strangers(tmp_path):
    """Whatever proves that they are workers."""
    for option in ("aes", "curve", "trusted_network"):
        settings = Settings(1, 20, security=option, **OPTIONS)
        folder = tmp_path / option
        with job.servers(settings, folder) as [server]:
            joined = job.exchange(settings, folder, 0)
            model = torch.nn.Linear(400, 400)  # 640 KB, ten times as much
            joined.attach(model, torch.optim.SGD(model.parameters(), lr=0.1))
            for _ in range(3):
                model(torch.ones(400)).sum().backward()
                joined.step()
                time.sleep(0.1)
            joined.close()
            assert server._endpoint.turned_away == 0


def speak_zmtp(port: int, password: dict[str, str]) -> socket.socket:
    """Connect as ZeroMQ does, up to the point where messages may be sent."""

    def text(value: bytes) -> bytes:
        return bytes([len(value)]) + value

    def command(name: bytes, body: bytes) -> bytes:
        whole = text(name) + body
        return b"\x04" + text(whole)

    [(user, secret)] = password.items()
    peer = socket.create_connection(("127.0.0.1", port), timeout=5)
    greeting = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"PLAIN".ljust(20, b"\0") + bytes(32)
    peer.sendall(greeting + command(b"HELLO", text(user.encode()) + text(secret.encode())))
    ready = text(b"Socket-Type") + struct.pack(">I", 6) + b"DEALER"
    peer.sendall(command(b"INITIATE", ready))
    return peer


def test_a_message_without_an_end_is_cut_off(tmp_path):
    """By somebody who has read the gate's password on the network, and has no key."""
    settings = Settings(1, 20, security="trusted_network", **OPTIONS)
    with limited_server(settings, tmp_path, 1024) as server:
        peer = speak_zmtp(port_of(tmp_path), security.gate_password(job_key(tmp_path)))
        before = server.memory_info().rss
        frame = b"\x03" + struct.pack(">Q", 1 << 20) + bytes(1 << 20)  # more frames follow
        sent = 0
        with pytest.raises(OSError):
            while sent < 4 << 30:
                peer.sendall(frame)
                sent += len(frame)
        assert server.memory_info().rss - before < 512 << 20
        train_alone(settings, tmp_path)


def test_without_the_key_no_message_reaches_the_server(tmp_path):
    """Not even under ``trusted_network``, which encrypts nothing."""
    settings = Settings(1, 20, security="trusted_network", **OPTIONS)
    with job.servers(settings, tmp_path) as [server]:
        while placement.read_address(tmp_path, 0) is None:
            time.sleep(0.01)
        peer = speak_zmtp(port_of(tmp_path), {"worker": "0" * 64})
        header = wire.Header(wire.MessageKind.HELLO).pack()
        with contextlib.suppress(OSError):
            peer.sendall(bytes([1, len(header)]) + header + b"\x00\x02{}")
            while peer.recv(1000):
                pass
        assert not server._endpoint.refused
        train_alone(settings, tmp_path)
        assert not server._endpoint.refused


def test_hellos_without_a_proof_shut_nobody_out(tmp_path):
    settings = Settings(1, 20, security="trusted_network", **OPTIONS)
    hello = {"rank": 0, "workers": 1, "connection": 0, "incarnation": 1, "attempt": 1}
    with job.servers(settings, tmp_path), zmq.Context() as context:
        while placement.read_address(tmp_path, 0) is None:
            time.sleep(0.01)
        strangers = []
        for _ in range(50):  # a job of one worker has room for ten peers
            stranger = context.socket(zmq.DEALER)
            stranger.linger = 0
            security.pass_gate(stranger, job_key(tmp_path))
            stranger.connect(placement.read_address(tmp_path, 0)["endpoints"][0])
            frames = [wire.Header(wire.MessageKind.HELLO).pack()]
            frames.append(wire.to_json(hello | {"nonce": "0" * 32}))
            stranger.send_multipart(frames)
            strangers.append(stranger)
        assert all(stranger.poll(5000) for stranger in strangers)  # each got a challenge
        train_alone(settings, tmp_path)
        for stranger in strangers:
            stranger.close()


def test_statistics_that_cannot_be_written_end_no_server(tmp_path):
    """The file's place is taken, as by a full disk or a lack of descriptors."""
    settings = Settings(1, 20, placement="dedicated")
    (tmp_path / "server-0.json").mkdir()
    with job.servers(settings, tmp_path):
        train_alone(settings, tmp_path)


def test_every_test_that_the_threat_model_names_exists():
    text = (job.ROOT / "SECURITY.md").read_text(encoding="utf-8")
    folders = {"test_sealed": "engine"}
    for line in text.splitlines():
        module = ""
        for name in re.findall(r"test_\w+", line):
            path = job.ROOT / "tests" / folders.get(name, "parameter_server") / f"{name}.py"
            if path.exists():
                module = path.read_text(encoding="utf-8")
            else:
                assert f"def {name}(" in module, name
