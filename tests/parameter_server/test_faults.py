"""Tests ``server/`` and ``worker/`` under faults: processes are killed, stopped and fed rubbish."""

import contextlib
import itertools
import math
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import zmq

from scaletrain.parameter_server.protocol import placement, tcp, wire
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.protocol.wire import Dtype, Header, MessageKind
from scaletrain.parameter_server.server.server import Server
from scaletrain.parameter_server.worker.io_thread import IoThread, Position
from scaletrain.parameter_server.worker.link import Identity, ServerLink
from scaletrain.parameter_server.worker.replica import Replica
from scaletrain.parameter_server.worker.requests import Requests, ServerError
from scaletrain.timeouts import Timeouts
from tests.parameter_server import job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "async"},
        {"mode": "bounded", "staleness": 2},
        {"mode": "sync", "backup_workers": 1},
        {"mode": "sync", "min_workers": 2},
    ],
    ids=["async", "bounded", "spare", "shrinks"],
)
def test_training_goes_on_when_a_worker_is_killed(tmp_path, options):
    made = Settings(3, 20, placement="dedicated", **options)
    with (
        job.server_processes(made, tmp_path),
        job.workers(made, tmp_path, 60, dict.fromkeys(range(3), 0.02)) as started,
    ):
        started[2].wait_for(5)
        started[2].process.kill()
        assert [worker.end() for worker in started[:2]] == [0, 0], [
            worker.lines[-5:] for worker in started[:2]
        ]
        results = [worker.result() for worker in started[:2]]
        assert all(worker.step == 60 for worker in started[:2])
    assert [result["workers"] for result in results] == [2.0, 2.0]  # the sum is over those who live
    assert [result["live"] for result in results] == [
        2,
        2,
    ]  # as each of them had heard at its last step
    lost = job.statistics(tmp_path)["lost"]
    assert [entry["rank"] for entry in lost] == [2]


def test_plain_sync_stops_and_names_the_lost_rank(tmp_path):
    made = Settings(3, 20, placement="dedicated")
    with job.server_processes(made, tmp_path), job.workers(made, tmp_path, 10_000) as started:
        started[1].wait_for(5)
        started[1].process.kill()
        began = time.monotonic()
        assert all(started[rank].end(15) != 0 for rank in (0, 2))
        assert time.monotonic() - began < 10
        for rank in (0, 2):
            assert "worker rank 1 was lost" in "\n".join(started[rank].lines)


def test_a_stopped_worker_is_noticed_after_the_timeout(tmp_path):
    made = Settings(2, 4, placement="dedicated")
    with job.server_processes(made, tmp_path), job.workers(made, tmp_path, 10_000) as started:
        started[1].wait_for(5)
        started[1].process.send_signal(signal.SIGSTOP)
        assert started[0].end(20) != 0
        assert "worker rank 1 was lost" in "\n".join(started[0].lines)


def test_a_server_that_is_stopped_long_before_its_workers_loses_none_of_them(tmp_path):
    """Bug it catches: ZeroMQ's heartbeats, which a stopped process does not answer."""
    made = Settings(2, 4, link="tcp", placement="dedicated")
    with (
        job.server_processes(made, tmp_path) as servers,
        job.workers(made, tmp_path, 60, {0: 0.02, 1: 0.02}) as started,
    ):
        started[1].wait_for(5)
        every = [servers[0], *(worker.process for worker in started)]
        servers[0].send_signal(signal.SIGSTOP)
        time.sleep(2 * made.unanswered_s)
        for process in every[1:]:
            process.send_signal(signal.SIGSTOP)
        time.sleep(0.5)
        for process in every:
            process.send_signal(signal.SIGCONT)
        assert [worker.end() for worker in started] == [0, 0], started[0].lines[-5:]
    assert job.statistics(tmp_path)["lost"] == []


def test_a_worker_that_is_stopped_while_nobody_needs_it_is_not_lost(tmp_path):
    """Bug it catches: as above, from the server's side."""
    made = Settings(2, 4, mode="async", link="tcp", placement="dedicated")
    with (
        job.server_processes(made, tmp_path),
        job.workers(made, tmp_path, 400, {0: 0.03, 1: 0.0}) as started,
    ):
        started[1].wait_for(5)
        started[1].process.send_signal(signal.SIGSTOP)
        time.sleep(2 * made.unanswered_s)
        started[1].process.send_signal(signal.SIGCONT)
        assert [worker.end() for worker in started] == [0, 0], started[1].lines[-5:]
    assert job.statistics(tmp_path)["lost"] == []


def test_a_host_that_answers_is_not_taken_for_one_that_is_gone():
    """It acknowledges what a process that is stopped will read later, or has no room for."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        sender = socket.create_connection(listening.getsockname())
        receiver, _ = listening.accept()
    with sender, receiver:
        sender.sendall(b"x" * 1000)
        sender.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sender.send(bytes(1 << 16))  # until nothing fits any more
        time.sleep(1.5)
        assert tcp.unanswered_s(sender.fileno()) < 1
        assert tcp.bytes_received(receiver.fileno()) >= 1000
    for end in socket.socketpair():
        with end:
            assert tcp.unanswered_s(end.fileno()) == tcp.bytes_received(end.fileno()) == 0
    assert tcp.unanswered_s(1 << 20) == 0  # it is closed


def test_a_pause_leaves_a_server_that_has_said_goodbye_alone():
    """Bug it catches: it counts as silent from the pause on, while others are still waited for."""
    left = SimpleNamespace(blocks=[], sockets=[], monitors=[], blocked=set(), heard_at=math.inf)
    silent = SimpleNamespace(
        blocks=[], sockets=[], monitors=[], blocked=set(), heard_at=time.monotonic() - 100,
        unanswered_s=lambda: 0.0,
    )  # fmt: skip
    requests = Requests()
    thread = IoThread(
        SimpleNamespace(settings=Settings(1, 200)), [left, silent], requests, Position(0, {})
    )
    thread._watch_sockets()
    for absent_s, silent_s in ((0.0, 100.0), (40.0, 60.0), (1e4, 0.0)):
        thread._turns = SimpleNamespace(absence=lambda absent_s=absent_s: absent_s)
        requests.notify()
        thread._take_turn()
        assert left.heard_at == math.inf
        assert time.monotonic() - silent.heard_at == pytest.approx(silent_s, abs=5)
    requests.close()


@pytest.mark.parametrize("mode", ["async", "sync"])
def test_a_restarted_worker_joins_again_with_current_weights(tmp_path, mode):
    options = {"min_workers": 1} if mode == "sync" else {}
    made = Settings(2, 20, mode=mode, placement="dedicated", **options)
    with (
        job.server_processes(made, tmp_path),
        job.workers(made, tmp_path, 180, {0: 0.05, 1: 0.05}) as started,
    ):
        started[1].wait_for(10)
        started[1].process.kill()
        started[0].wait_for(20)
        again = job.Worker(made, tmp_path, 1, 180)
        try:
            assert [started[0].end(60), again.end(60)] == [0, 0], (
                started[0].lines[-5:],
                again.lines[-5:],
            )
            steps = [int(line.split()[1]) for line in again.lines if line.startswith("step ")]
            assert steps[0] > 10 and steps[-1] == 180  # it did not begin again at step 1
            assert started[0].result()["workers"] == again.result()["workers"] == 2.0
        finally:
            again.process.kill()
            again.process.wait()


def test_workers_stop_cleanly_when_a_server_is_killed(tmp_path):
    made = Settings(2, 20, servers=2, placement="dedicated")
    with (
        job.server_processes(made, tmp_path) as servers,
        job.workers(made, tmp_path, 10_000) as started,
    ):
        started[0].wait_for(5)
        servers[1].kill()
        assert all(worker.end(15) != 0 for worker in started)
        for worker in started:
            assert re.search(
                r"parameter server 1 .* closed the connection|worker rank \d was lost",
                "\n".join(worker.lines),
            )
        assert any("parameter server 1" in "\n".join(worker.lines) for worker in started)


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_killed_server_goes_on_from_its_snapshot(tmp_path, mode):
    made = Settings(2, 30, mode=mode, placement="dedicated", snapshot_updates=10, restart_servers=1)
    with (
        job.server_processes(made, tmp_path) as servers,
        job.workers(made, tmp_path, 120, {0: 0.02, 1: 0.02}) as started,
    ):
        started[0].wait_for(40)
        servers[0].kill()
        servers[0].wait()
        killed_at = max(worker.step for worker in started)
        servers[0] = job.start_server(made, tmp_path, 0)
        assert [worker.end(60) for worker in started] == [0, 0], [
            worker.lines[-5:] for worker in started
        ]
        assert all(worker.step == 120 for worker in started)
    statistics = job.statistics(tmp_path)
    updates_a_step = 2 if mode == "async" else 1
    restored = statistics["restored_at_update"]
    # At most the interval is lost (and the steps that the snapshot was due in, between two looks at
    # the clock).
    assert (
        killed_at * updates_a_step - 10 - 15 * updates_a_step
        <= restored
        <= (killed_at + 1) * updates_a_step
    )
    assert restored % 1 == 0 and statistics["updates"] >= 120 * updates_a_step - 30 * updates_a_step


def test_a_worker_that_was_given_up_is_told_why_over_an_encrypted_connection(tmp_path):
    """Bug it catches: the refusal travels in the clear, and the worker reports forged frames."""
    made = Settings(
        2, 2, link="tcp", security="aes", mode="bounded", staleness=0, placement="dedicated"
    )

    def sleepy(step: int, joined) -> None:
        if step == 3:
            time.sleep(4)

    with job.servers(made, tmp_path):
        others = threading.Thread(target=job.work, args=(made, tmp_path, 0, 8), daemon=True)
        others.start()
        with pytest.raises(ServerError, match="given up: silent for 2 s while others waited"):
            job.threads([lambda: job.work(made, tmp_path, 1, 8, on_step=sleepy)])
        others.join(20)


def test_a_restored_server_gives_workers_time_to_come_back(tmp_path):
    made = Settings(1, 20, placement="dedicated", snapshot_updates=1, restart_servers=1)
    with job.servers(made, tmp_path) as [server]:

        def on_step(step, joined):
            while step == 2 and server._snapshots.saved_at < 2:
                time.sleep(0.01)

        job.work(made, tmp_path, 0, 2, on_step=on_step)
    successor = Server(made, tmp_path, 0)
    successor._restore()
    successor._tick(time.monotonic())
    assert successor._blocks.updates == 2 and successor._tally.lost == []
    successor._tick(time.monotonic() + Timeouts(made.timeout_s).join_s + 1)
    assert [loss.rank for loss in successor._tally.lost] == [0]


_DISCONNECT = """
import zmq
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.worker.link import Identity, ServerLink

context = zmq.Context()
link = ServerLink(Identity(Settings(1, link="tcp"), None, 0, {}, 1, context), 0, [])
for turn in range(600):
    server = context.socket(zmq.ROUTER)
    port = server.bind_to_random_port("tcp://127.0.0.1")
    worker = context.socket(zmq.DEALER)
    worker.connect(f"tcp://127.0.0.1:{port}")
    worker.send(b"")
    server.recv_multipart()
    link.sockets = [worker]
    link.monitors = [worker.get_monitor_socket(zmq.EVENT_DISCONNECTED)]
    if turn % 2:  # the connection ends at the same time
        server.close(linger=0)
    link.disconnect()
    server.close(linger=0)
context.term()
"""


def test_a_worker_that_disconnects_never_waits():
    """A process of its own: ZeroMQ would wait with Python's lock held."""
    subprocess.run([sys.executable, "-c", _DISCONNECT], cwd=job.ROOT, check=True, timeout=30)


def truncated(endpoint: str, count: int, rng: random.Random) -> None:
    """Make connections whose last message is cut off anywhere, from the greeting to the tensor."""
    host, port = endpoint.removeprefix("tcp://").split(":")
    ready = b"\x05READY" + b"\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
    greeting = b"\xff" + bytes(8) + b"\x7f" + b"\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
    header = Header(MessageKind.PUSH, Dtype.FLOAT32, count=500).pack()
    text = greeting + bytes([4, len(ready)]) + ready + bytes([1, len(header)]) + header
    text += b"\x02" + struct.pack(">Q", 2000) + bytes(2000)
    for index in range(count):
        with socket.create_connection((host, int(port))) as peer:
            # Half of them get as far as the tensor.
            peer.sendall(text[: rng.randrange(len(text) - 2000 if index % 2 else 1, len(text))])


def malformed(rng: random.Random, rank: int, session: int, numel: int) -> list[bytes]:
    """Return a message that a worker with a session could send, and should not."""
    good = Header(
        MessageKind.PUSH, Dtype.FLOAT32, key=0, rank=rank, step=1, session=session, count=numel
    )
    kind = rng.randrange(9)
    if kind == 0:
        return [rng.randbytes(rng.randrange(200)) for _ in range(1 + rng.randrange(5))]
    if kind == 1:
        return [good.pack(), rng.randbytes(4 * numel - 1 - rng.randrange(100)), b""]
    if kind == 2:
        return [good._replace(key=rng.randrange(100, 1 << 32)).pack(), bytes(4 * numel), b""]
    if kind == 3:
        return [good._replace(count=7).pack(), bytes(28), b""]
    if kind == 4:
        return [
            good._replace(version=rng.randrange(1 << 50, 1 << 63)).pack(),
            bytes(4 * numel),
            b"",
        ]
    if kind == 5:
        return [good._replace(session=session ^ 1).pack(), bytes(4 * numel), b""]
    if kind == 6:
        return [good._replace(rank=(rank + 1) % 3).pack(), bytes(4 * numel), b""]
    if kind == 7:
        return [
            good._replace(kind=MessageKind.PUSH_ROWS, rows=1, count=1).pack(),
            bytes(8),
            bytes(4),
        ]
    return [good._replace(dtype=Dtype.FP16).pack(), bytes(2 * numel), b""]


def test_malformed_and_truncated_frames_change_nothing(tmp_path):
    """A third worker joins, sends 10,000 malformed messages and cuts off 1,000 connections.

    With one spare an update takes the gradients of two workers: the weights are those of training
    with the honest two alone.
    """
    rng, steps = random.Random(0), 200
    made = Settings(
        3,
        30,
        link="tcp",
        security="trusted_network",
        placement="dedicated",
        block_mb=0.002,
        backup_workers=1,
    )
    clean = job.single(steps, 2)
    flooded, trained = threading.Event(), threading.Barrier(3)

    def attack() -> int:
        net = job.model()
        replica = Replica(net, torch.optim.SGD(net.parameters(), **job.SGD), made)
        replica.cut(made.block_bytes)
        identity = Identity.make(made, tmp_path, 2, replica.optimizer)
        link = ServerLink(identity, 0, replica.blocks)
        link.connect(time.monotonic() + 20, None)
        [peer], [session], sent = link.sockets, link.sessions, 0
        peer.setsockopt(zmq.SNDHWM, 0)
        endpoint = placement.read_address(tmp_path, 0)["endpoints"][0]
        for _ in range(10):
            truncated(endpoint, 100, rng)
            for _ in range(1000):
                peer.send_multipart(malformed(rng, 2, session, replica.blocks[0].numel))
                sent += 1
        deadline = time.monotonic() + 30
        while (
            sum(job.statistics(tmp_path)["refused"].values()) < 10_000
            and time.monotonic() < deadline
        ):
            while peer.poll(50):
                peer.recv_multipart()
        flooded.set()
        trained.wait(60)  # a spare worker that has left is no longer waited for
        peer.send_multipart([Header(MessageKind.LEAVE, rank=2, session=session).pack()])
        assert peer.poll(5000)
        link.disconnect()
        identity.context.term()
        return sent

    def worker(rank: int):
        def on_step(step, joined):
            time.sleep(0.01)
            if step == steps // 2:
                flooded.wait(60)
            if step == steps:
                trained.wait(60)

        return job.work(made, tmp_path, rank, steps, on_step=on_step)

    with job.server_processes(made, tmp_path):
        *results, sent = job.threads([lambda: worker(0), lambda: worker(1), attack], 90)
    assert sent == 10_000
    refused = job.statistics(tmp_path)["refused"]
    assert sum(refused.values()) == 10_000 and len(refused) >= 6, refused
    for weights, _ in results:
        for weight, reference in zip(weights, clean, strict=True):
            torch.testing.assert_close(weight, reference, rtol=1e-4, atol=1e-4)


def test_messages_of_an_admitted_peer_are_checked_one_by_one(tmp_path):
    made = Settings(1, 20, placement="dedicated")
    with job.servers(made, tmp_path) as [server]:
        net = job.model()
        joined = job.exchange(made, tmp_path, 0)
        joined.attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
        before = [p.detach().clone() for p in net.parameters()]
        [(route, peer)] = server._endpoint._peers.items()
        numel = sum(p.numel() for p in net.parameters())
        header = Header(
            MessageKind.PUSH, Dtype.FLOAT32, key=0, rank=0, session=peer.session, count=numel
        )
        cases = {
            "unknown block": [header._replace(key=9).pack(), bytes(4 * numel), b""],
            "gradient does not have": [header._replace(count=5).pack(), bytes(20), b""],
            "bad version": [header._replace(version=3).pack(), bytes(4 * numel), b""],
            "wire dtype": [header._replace(dtype=Dtype.BF16).pack(), bytes(2 * numel), b""],
            "row out of range": [header._replace(rows=1).pack(), bytes(4 * numel), b"\xff" * 8],
            "bad rows": [
                header._replace(kind=MessageKind.PULL_ROWS, rows=1, count=0).pack(),
                bytes(8),
            ],
            "not a message for a server": [
                header._replace(kind=MessageKind.TOTAL, count=1).pack(),
                bytes(4),
            ],
            "bad part": [header._replace(kind=MessageKind.PULL, offset=numel).pack()],
            "unknown session": [header._replace(session=1).pack(), bytes(4 * numel), b""],
            "bad vector": [header._replace(kind=MessageKind.SUM, count=1).pack(), bytes(4)],
        }
        for reason, frames in cases.items():
            with pytest.raises(wire.Refused, match=reason):
                server._endpoint.accept(route, wire.parse([memoryview(frame) for frame in frames]))
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        joined.step()  # of zeros: the weights are as they were
        assert all(torch.equal(p, old) for p, old in zip(net.parameters(), before, strict=True))
        joined.close()


def test_a_server_does_not_outlive_who_started_it(tmp_path):
    code = (
        "import subprocess, sys, time; from scaletrain.parameter_server.protocol import placement, settings; from pathlib import Path;"
        f"p = subprocess.Popen(placement.command(settings.Settings(1), Path({str(tmp_path)!r}), 0)); print(p.pid, flush=True);"
        "time.sleep(60)"
    )
    parent = subprocess.Popen(
        [job.sys.executable, "-c", code], cwd=job.ROOT, stdout=subprocess.PIPE, text=True
    )
    server = int(parent.stdout.readline())
    while placement.read_address(tmp_path, 0) is None:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and _alive(server):
        time.sleep(0.05)
    assert not _alive(server)


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_slow_worker_is_left_behind_by_one_spare(tmp_path):
    """One worker is five times as slow: with a spare, the others' step grows by 10 % at most."""

    def median_step(folder, made, delays, steps):
        folder.mkdir()
        with (
            job.server_processes(made, folder),
            job.workers(made, folder, steps, delays) as started,
        ):
            assert started[0].end(60) == 0, started[0].lines[-5:]
            times = [
                float(line.split()[2]) for line in started[0].lines if line.startswith("step ")
            ]
            assert all(worker.end(30) == 0 for worker in started)
        gaps = sorted(b - a for a, b in itertools.pairwise(times[3:]))
        return gaps[len(gaps) // 2]

    usual = dict.fromkeys(range(3), 0.15)
    slow = usual | {2: 0.75}  # sleeps: what is tested is who waits for whom
    spare = Settings(3, 20, backup_workers=1, placement="dedicated")
    undisturbed = median_step(tmp_path / "a", spare, usual, 20)
    with_spare = median_step(tmp_path / "b", spare, slow, 20)
    without = median_step(tmp_path / "c", Settings(3, 20, placement="dedicated"), slow, 8)
    assert with_spare < 1.1 * undisturbed, (with_spare, undisturbed)
    assert without > 3 * undisturbed
    assert sum(job.statistics(tmp_path / "b")["dropped"].values()) > 0
