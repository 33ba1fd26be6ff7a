"""Tests what a server's successor, and workers that come late, go on with.

Servers and workers are threads. ``benchmarks.lab faults`` kills processes at random moments.
"""

import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import zmq
from torch import nn

from scaletrain.parameter_server.protocol import wire
from scaletrain.parameter_server.protocol.consistency import (
    AddGradient,
    RuleState,
    SendWeights,
    Synchronous,
)
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.server.endpoint import Endpoint
from scaletrain.parameter_server.server.server import Server
from scaletrain.parameter_server.server.sums import Sums
from scaletrain.parameter_server.worker.client import Client
from scaletrain.parameter_server.worker.io_thread import IoThread, Position
from scaletrain.parameter_server.worker.requests import Requests, Token, Topic
from tests.parameter_server import job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]
STEPS = 24


def normalised() -> nn.Module:
    with job.SEEDING:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(12, 30), nn.BatchNorm1d(30), nn.Tanh(), nn.Linear(30, 4))


def train(settings: Settings, run_dir, restart_at: int | None) -> tuple[list[dict], dict]:
    """Train two workers; end the server at a step of rank 0, and start another one."""
    run_dir.mkdir()
    reached = threading.Event()
    servers = [Server(settings, run_dir, 0)]

    def serve() -> None:
        servers[0].serve()
        if restart_at is not None:
            servers.append(Server(settings, run_dir, 0))
            servers[1].serve()

    def end_server() -> None:
        reached.wait(60)
        servers[0].stop()

    def work(rank: int) -> dict:
        net = normalised()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        joined = job.exchange(settings, run_dir, rank)
        joined.attach(net, optimizer)
        for step in range(STEPS):
            if rank == 0 and step == restart_at:
                reached.set()
            optimizer.zero_grad()
            job.loss(net, step, rank).backward()
            joined.step()
            if step % 5 == 0:
                total = joined.sum(torch.tensor([10.0**rank]))
                assert total.item() == 11.0
        state = {name: value.clone() for name, value in net.state_dict().items()}
        for index, entry in optimizer.state_dict()["state"].items():
            state |= {f"{index}.{name}": value.clone() for name, value in entry.items()}
        joined.close()
        return state

    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    jobs = [lambda: work(0), lambda: work(1)]
    if restart_at is not None:
        jobs.append(end_server)
    states = job.threads(jobs)[:2]
    servers[-1].stop()
    serving.join(20)
    assert len(servers) == (1 if restart_at is None else 2)
    return states, job.statistics(run_dir)


@pytest.mark.parametrize("link", ["unix", "tcp"])
def test_a_successor_goes_on_as_if_nothing_had_happened(tmp_path, link):
    """Weights, running statistics, Adam's state, the schedule, the counts: bit by bit."""
    settings = Settings(
        2,
        20,
        link=link,
        placement="dedicated",
        block_mb=0.001,
        server_lr={"name": "StepLR", "step_size": 7, "gamma": 0.5},
        snapshot_updates=1000,  # none but the first one, and the one at the server's end
        restart_servers=1,
    )
    undisturbed, counts = train(settings, tmp_path / "undisturbed", None)
    restarted, counts_after = train(settings, tmp_path / "restarted", 9)
    assert counts_after["restored_at_update"] >= 8
    for before, after in zip(undisturbed, restarted, strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert torch.equal(value, after[name]), name
    for name in ("staleness", "dropped", "updates", "lost"):
        assert counts[name] == counts_after[name], name


def test_weights_come_from_the_successor_of_a_server_that_died_in_mid_update(tmp_path, monkeypatch):
    """Bug it catches: a worker that waits for ever for an update to end, in the dead's memory."""
    settings = Settings(
        1, 20, mode="async", placement="dedicated", block_mb=0.002, restart_servers=1
    )
    servers = [Server(settings, tmp_path, 0), Server(settings, tmp_path, 0)]
    take = Client._take_shared
    killed = []

    def take_from_the_dead(client, key, answered, sink) -> int:
        if client.step == 6 and not killed:
            killed.append(key)
            servers[0]._blocks.shard.slab.sequence[:] += 1  # odd: an update is under way
            servers[0].stop()
        return take(client, key, answered, sink)

    def serve() -> None:
        for server in servers:
            server.serve()

    monkeypatch.setattr(Client, "_take_shared", take_from_the_dead)
    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    [(weights, _)] = job.threads([lambda: job.work(settings, tmp_path, 0, 12)])
    servers[1].stop()
    serving.join(20)
    assert killed
    for ours, expected in zip(weights, job.single(12, 1), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("kind", ["dense", "rows"])
def test_a_server_may_die_between_the_parts_of_its_answer(tmp_path, monkeypatch, kind):
    """Bug it catches: a worker sends the rest of a gradient alone, which its successor refuses."""
    monkeypatch.setattr(wire, "MAX_TENSOR_BYTES", 256)
    settings = Settings(
        1, 20, link="tcp", placement="dedicated", snapshot_updates=50, restart_servers=1
    )
    servers = [Server(settings, tmp_path, 0), Server(settings, tmp_path, 0)]
    tell = Endpoint.tell
    lost = []

    def tell_half(endpoint, rank, header, payload=None) -> bool:
        is_answer = header.kind in (wire.MessageKind.WEIGHTS, wire.MessageKind.APPLIED)
        if is_answer and header.step == 5 and not lost and told and told[-1] == header.key:
            lost.append(header.key)
            time.sleep(0.3)  # the worker reads what was sent
            servers[0].stop()
        if is_answer:
            told.append(header.key)
        return not lost and tell(endpoint, rank, header, payload)

    told: list[int] = []

    def serve() -> None:
        servers[0].serve()
        monkeypatch.setattr(Endpoint, "tell", tell)
        servers[1].serve()

    def train(joined) -> dict:
        with job.SEEDING:
            torch.manual_seed(3)
            net = nn.Sequential(nn.Embedding(60, 8, sparse=kind == "rows"), nn.Linear(8, 40))
        # Adafactor looks at whole tensors, and Adagrad takes rows.
        make = torch.optim.Adagrad if kind == "rows" else torch.optim.Adafactor
        optimizer = make(net.parameters(), lr=0.1)
        if joined is not None:
            joined.attach(net, optimizer)
        for step in range(10):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(step)
            net(torch.randint(0, 60, (30,), generator=generator)).square().mean().backward()
            (optimizer if joined is None else joined).step()
        state = {name: value.clone() for name, value in net.state_dict().items()}
        if joined is not None:
            joined.close()
        return state

    monkeypatch.setattr(Endpoint, "tell", tell_half)
    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    [state] = job.threads([lambda: train(job.exchange(settings, tmp_path, 0))])
    servers[1].stop()
    serving.join(20)
    assert len(lost) == 1
    torch.testing.assert_close(state, train(None), rtol=1e-5, atol=1e-6)


def test_a_successor_that_refuses_the_old_session_is_joined(tmp_path, monkeypatch):
    """ZeroMQ reconnects by itself; a busy worker sees its push refused before it sees the end.

    Bug it catches: a worker that gives up because the successor does not know its session.
    """
    attend = IoThread._attend

    def attend_blindly(thread, ready) -> None:
        monitors = [monitor for link in thread._links for monitor in link.monitors]
        attend(thread, {socket: ready[socket] for socket in ready if socket not in monitors})

    monkeypatch.setattr(IoThread, "_attend", attend_blindly)
    settings = Settings(1, 20, mode="async", placement="dedicated", restart_servers=1)
    first, second = Server(settings, tmp_path, 0), Server(settings, tmp_path, 0)

    def serve() -> None:
        first.serve()
        second.serve()

    def restart(step: int, joined) -> None:
        if step == 6:
            first.stop()
            while second._blocks is None:
                time.sleep(0.01)
            time.sleep(0.5)  # ZeroMQ tries again every 50 ms

    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    [(weights, _)] = job.threads([lambda: job.work(settings, tmp_path, 0, 12, on_step=restart)])
    second.stop()
    serving.join(20)
    assert job.statistics(tmp_path)["refused"] == {"unknown session": 1}
    for ours, expected in zip(weights, job.single(12, 1), strict=True):
        torch.testing.assert_close(ours, expected)


def test_a_server_may_die_before_its_first_snapshot(tmp_path, monkeypatch):
    settings = Settings(
        2, 20, placement="dedicated", block_mb=0.002, snapshot_updates=50, restart_servers=1
    )
    first = Server(settings, tmp_path, 0)

    def die() -> None:
        raise KeyError("dead")

    monkeypatch.setattr(first, "_keep_first", die)
    first._blocks = None
    partial = tmp_path / ".server-0.safetensors.1"

    def serve() -> None:
        with pytest.raises(KeyError, match="dead"):
            first.serve()
        partial.write_bytes(b"half")  # what a killed server was writing
        second.serve()

    second = Server(settings, tmp_path, 0)
    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    results = job.threads(
        [lambda: job.work(settings, tmp_path, 0, 10), lambda: job.work(settings, tmp_path, 1, 10)]
    )
    second.stop()
    serving.join(20)
    assert not partial.exists()
    for weights, _ in results:
        for weight, reference in zip(weights, job.single(10, 2), strict=True):
            torch.testing.assert_close(weight, reference, rtol=1e-4, atol=1e-5)


def test_a_worker_that_comes_late_begins_with_the_meeting_of_the_others(tmp_path):
    settings = Settings(2, 20, mode="async", placement="dedicated")
    meets, met = threading.Event(), threading.Event()

    def join(rank: int):
        net = job.model()
        joined = job.exchange(settings, tmp_path, rank)
        joined.attach(net, torch.optim.SGD(net.parameters(), lr=0.01))
        return net, joined

    def first() -> list[float]:
        net, joined = join(0)
        for step in range(10):
            job.loss(net, step, 0).backward()
            joined.step()
        meets.set()
        totals = [joined.sum(torch.ones(1)).item()]
        met.wait(60)
        # The other worker has come again, as a process that was started again does.
        job.loss(net, 10, 0).backward()
        joined.step()
        totals.append(joined.sum(torch.ones(1)).item())
        joined.close()
        return totals

    def late() -> None:
        meets.wait(60)
        _, joined = join(1)
        assert (joined.skip(99), joined.owes_meeting()) == (10, True)
        assert joined.sum(torch.ones(1)).item() == 2.0
        _, again = join(1)
        assert (again.skip(99), again.owes_meeting()) == (10, False)
        met.set()
        again.close()

    with job.servers(settings, tmp_path):
        totals, _ = job.threads([first, late])
    assert totals == [2.0, 1.0]


def test_sums_wait_for_workers_that_owe_them_alone():
    sums = Sums(3)
    number = 5 * wire.SUMS_OF_A_STEP
    everybody = {0, 1, 2}
    one = np.ones(1)
    for rank in everybody:
        sums.came(rank)
    assert sums.add(number, 0, one) is None and sums.add(number, 1, one) is None
    assert sums.complete(everybody, everybody) == [] and sums.awaited(everybody) == {2}
    sums.add(number, 2, one)
    [total] = sums.complete(everybody, everybody)
    assert total.values == [3.0] and sums.met_step == 5
    # A process in the place of rank 2 has no part in what is left of this meeting.
    sums.came(2)
    for rank in (0, 1):
        sums.add(number + 1, rank, one)
    [total] = sums.complete(everybody, everybody)
    assert total.ranks == [0, 1]
    # Rank 0 has gone past a sum that rank 1 asks for alone.
    sums.add(number + 3, 0, one)
    sums.add(number + 2, 1, one)
    assert [each.number for each in sums.complete(everybody, everybody)] == [number + 2]


def test_a_restored_rule_answers_workers_that_the_others_are_ahead_of():
    rule = Synchronous([0], 2)
    for rank in (0, 1):
        rule.join(rank)
    for step in range(3):
        for rank in (0, 1):
            rule.push(0, rank, step, step)
    restored = Synchronous([0], 2)
    restored.restore(RuleState.from_json(rule.state().to_json()))
    assert restored.join(1, 2) == 2
    # Rank 1 did not get the answer to step 2, which the snapshot holds.
    assert restored.push(0, 1, 2, 3) == [SendWeights(0, 1)]
    # From an older snapshot: rank 0 comes after rank 1, and has seen step 6 done.
    assert restored.push(0, 1, 6, 3) == [AddGradient(0, 1)]
    restored.join(0, 6, {0: 6})
    assert restored.settle() == [SendWeights(0, 1, dropped=True)]
    assert restored.settle() == []


def test_a_request_that_is_sent_again_waits_in_the_queue_once():
    requests = Requests()
    token = Token(Topic.UPDATE, 0)
    sent = []

    def send(token, header, payloads) -> bool:
        sent.append(token)
        return True

    requests.ask(token, wire.Header(wire.MessageKind.PUSH), [])
    requests.send_again(lambda token: True)
    requests.send(send)
    assert sent == [token]
    # A sum that was answered goes to a successor once more; nobody waits for its answer.
    total = Token(Topic.SUM, 4)
    answer = wire.Message(wire.Header(wire.MessageKind.TOTAL), ())
    requests.ask(total, wire.Header(wire.MessageKind.SUM), [])
    requests.send(send)
    requests.answer(total, answer)
    assert requests.wait(total).message is answer
    requests.repeat_last_sum()
    requests.send(send)
    assert sent == [token, total, total]
    requests.answer(total, answer)
    assert not requests.is_open(total) and total not in requests._answers
    requests.close()


def test_a_full_connection_is_used_again_after_another_server_was_lost():
    """Bug it catches: the news that it has room was lost, and requests stayed with the worker."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as server:
        port = server.bind_to_random_port("tcp://127.0.0.1")
        with context.socket(zmq.PAIR) as socket:
            socket.connect(f"tcp://127.0.0.1:{port}")
            lost = SimpleNamespace(blocks=[], sockets=[], monitors=[], blocked=set())
            full = SimpleNamespace(
                blocks=[], sockets=[socket], monitors=[], blocked={0}, heard_at=time.monotonic()
            )
            settings = Settings(1, 20, servers=2)
            requests = Requests()
            thread = IoThread(
                SimpleNamespace(settings=settings), [lost, full], requests, Position(0, {})
            )
            thread._watch_sockets()  # as after the loss
            del thread._links[0]
            thread._attend(dict(thread._poller.poll(5000)))
            requests.close()
        assert full.blocked == set()
