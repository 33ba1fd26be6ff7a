"""Tests of gradients that servers clip: as torch clips the mean gradient in one process."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

from scaletrain.errors import UserError
from scaletrain.parameter_server.protocol.consistency import (
    AddGradient,
    ApplyUpdate,
    RuleState,
    Scaling,
    SendNorm,
    SendWeights,
    Synchronous,
    TakeMean,
)
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.server.server import Server
from scaletrain.parameter_server.worker.io_thread import IoThread
from scaletrain.parameter_server.worker.requests import Topic
from tests.parameter_server import job

STEPS = 12
NORM = 0.6  # of gradients between 0.3 and 6
VALUE = 0.05

slow = [pytest.mark.slow, pytest.mark.timeout(120)]


def clip(net: nn.Module, norm: float | None, value: float | None) -> None:
    if norm is not None:
        nn.utils.clip_grad_norm_(net.parameters(), norm)
    if value is not None:
        nn.utils.clip_grad_value_(net.parameters(), value)


def alone(workers: int, norm: float | None, value: float | None) -> list[torch.Tensor]:
    net = job.model()
    optimizer = torch.optim.SGD(net.parameters(), **job.SGD)
    for step in range(STEPS):
        optimizer.zero_grad()
        mean = sum(job.loss(net, step, rank) for rank in range(workers)) / workers
        mean.backward()
        clip(net, norm, value)
        optimizer.step()
    return [parameter.detach() for parameter in net.parameters()]


def work(
    settings: Settings,
    run_dir,
    rank: int,
    norm: float | None = None,
    value: float | None = None,
    before_step: Callable[[int], None] = lambda step: None,
) -> list[torch.Tensor]:
    net = job.model()
    optimizer = torch.optim.SGD(net.parameters(), **job.SGD)
    joined = job.exchange(settings, run_dir, rank)
    joined.attach(net, optimizer)
    assert joined.clip(norm, value)
    step = joined.skip(STEPS)
    while step < STEPS:
        before_step(step)
        optimizer.zero_grad()
        job.loss(net, step, rank).backward()
        joined.step()
        step += 1
        step += joined.skip(STEPS - step)
    joined.sum(torch.zeros(1))
    joined.close()
    return [parameter.detach() for parameter in net.parameters()]


def train(settings: Settings, run_dir, **options) -> list[list[torch.Tensor]]:
    run_dir.mkdir(exist_ok=True)
    with job.servers(settings, run_dir):
        jobs = [
            lambda rank=rank: work(settings, run_dir, rank, **options)
            for rank in range(settings.workers)
        ]
        return job.threads(jobs)  # type: ignore[return-value]


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    for first, second in zip(one, other, strict=True):
        assert torch.equal(first, second)


class TestAsTorch:
    pytestmark = slow

    @pytest.mark.parametrize(
        "settings",
        [
            Settings(1, 20),
            Settings(3, 20, block_mb=0.002),
            Settings(2, 20, servers=2, link="tcp", block_mb=0.002),
            Settings(2, 20, servers=3, link="tcp", security="curve", block_mb=0.002),
        ],
        ids=lambda settings: f"{settings.workers}w{settings.servers}s-{settings.cipher}",
    )
    @pytest.mark.parametrize(("norm", "value"), [(NORM, None), (None, VALUE), (NORM, VALUE)])
    def test_the_mean_gradient_is_clipped_over_all_blocks(self, settings, norm, value, tmp_path):
        expected = alone(settings.workers, norm, value)
        for left, right in zip(expected, alone(settings.workers, None, None), strict=True):
            assert not torch.allclose(left, right, rtol=1e-3), "clipping must matter"
        for weights in train(settings, tmp_path, norm=norm, value=value):
            torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)

    def test_neither_blocks_nor_servers_change_a_bit(self, tmp_path):
        """Nor does another run: the norm is added up in one order, and rounded once."""
        cuts = [
            Settings(2, 20),
            Settings(2, 20),
            Settings(2, 20, block_mb=0.001),
            Settings(2, 20, servers=2, link="tcp", block_mb=0.0005),
        ]
        results = [
            train(settings, tmp_path / str(number), norm=NORM)
            for number, settings in enumerate(cuts)
        ]
        for result in results:
            for weights in result:
                assert_equal(weights, results[0][0])

    def test_a_model_with_a_sparse_table(self, tmp_path):
        """torch's own functions do not take sparse gradients; those of a dense table are equal."""

        def net(sparse: bool) -> nn.Module:
            with job.SEEDING:
                torch.manual_seed(5)
                return nn.Sequential(nn.Embedding(20, 6, sparse=sparse), nn.Linear(6, 1))

        def loss(model: nn.Module, step: int, rank: int) -> torch.Tensor:
            random = torch.Generator().manual_seed(10 * step + rank)
            return (model(torch.randint(20, (9,), generator=random)) - 4.0).square().mean()

        settings = Settings(2, 20, servers=2, block_mb=0.0001)

        def sparse(rank: int) -> dict:
            model = net(True)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            joined = job.exchange(settings, tmp_path, rank)
            joined.attach(model, optimizer)
            joined.clip(NORM, VALUE)
            for step in range(STEPS):
                optimizer.zero_grad()
                loss(model, step, rank).backward()
                joined.step()
            state = {name: value.clone() for name, value in model.state_dict().items()}
            joined.sum(torch.zeros(1))
            joined.close()
            return state

        model = net(False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(STEPS):
            optimizer.zero_grad()
            (sum(loss(model, step, rank) for rank in range(2)) / 2).backward()
            clip(model, NORM, VALUE)
            optimizer.step()
        with job.servers(settings, tmp_path):
            for state in job.threads([lambda: sparse(0), lambda: sparse(1)]):
                torch.testing.assert_close(state, dict(model.state_dict()), rtol=1e-5, atol=1e-6)


class TestFaults:
    pytestmark = slow

    @pytest.mark.parametrize("lost", ["before norms", "after norms"])
    @pytest.mark.parametrize("link", ["unix", "tcp"])
    def test_a_successor_of_one_of_two_servers_changes_no_bit(
        self, lost, link, tmp_path, monkeypatch
    ):
        """Server 1 ends while its updates are held, and again in another step."""
        undisturbed = train(Settings(2, 20, servers=2, block_mb=0.002), tmp_path / "a", norm=NORM)
        settings = Settings(
            2,
            20,
            servers=2,
            link=link,
            block_mb=0.002,
            placement="dedicated",
            snapshot_updates=1,
            restart_servers=2,
        )
        run_dir = tmp_path / "b"
        run_dir.mkdir()
        running: list[Server] = []
        is_awaited = Topic.NORM if lost == "before norms" else Topic.SCALE
        ended = []

        def serve(index: int) -> None:
            for _ in range(3 if index == 1 else 1):
                server = Server(settings, run_dir, index)
                if index == 1:
                    running.append(server)
                server.serve()
                if is_over.is_set():
                    return

        # The server ends when rank 0 is about to ask for norms, or to tell the factor.
        send = IoThread._try_send

        def end_then_send(thread, token, header, payloads) -> bool:
            steps = {3, 7} - set(ended)
            is_time = token.topic is is_awaited and header.step in steps
            if is_time and thread._identity.rank == 0:
                ended.append(header.step)
                running[-1].stop()
            return send(thread, token, header, payloads)

        monkeypatch.setattr(IoThread, "_try_send", end_then_send)
        is_over = threading.Event()
        servers = [threading.Thread(target=serve, args=(index,), daemon=True) for index in (0, 1)]
        for thread in servers:
            thread.start()
        results = job.threads(
            [lambda rank=rank: work(settings, run_dir, rank, norm=NORM) for rank in range(2)]
        )
        is_over.set()
        running[-1].stop()
        assert ended == [3, 7]
        assert len(running) == 3
        for weights in results:
            assert_equal(weights, undisturbed[0])

    def test_spare_workers_and_lost_ones_hold_nobody_up(self, tmp_path):
        """Of three workers two make an update; the slow one leaves in the middle."""
        settings = Settings(3, 20, backup_workers=1, servers=2, block_mb=0.002)
        barrier = threading.Event()

        def before_step(rank: int) -> Callable[[int], None]:
            def wait(step: int) -> None:
                if rank == 2:
                    barrier.wait(0.05)

            return wait

        with job.servers(settings, tmp_path):
            results = job.threads(
                [
                    lambda rank=rank: work(
                        settings, tmp_path, rank, norm=NORM, before_step=before_step(rank)
                    )
                    for rank in range(3)
                ]
            )
        assert_equal(results[0], results[1])
        # Every update was clipped: no further from the start than so many steps of that size.
        start = torch.cat([each.reshape(-1) for each in job.model().parameters()])
        way = torch.cat([each.reshape(-1) for each in results[0]]) - start.detach()
        assert 0.1 < float(way.norm()) < STEPS * 10 * job.SGD["lr"] * (NORM + 0.01)


class TestRule:
    def rule(self, workers: int = 2, backup_workers: int = 0, keys: int = 1) -> Synchronous:
        made = Synchronous(list(range(keys)), workers, backup_workers)
        for rank in range(workers):
            made.join(rank)
        return made

    def test_an_update_waits_for_its_scaling(self):
        rule = self.rule()
        assert rule.push(0, 0, 0, 0, held=True) == [AddGradient(0, 0)]
        assert rule.ask_norm(0, 0, 0) == []
        assert rule.push(0, 1, 0, 0, held=True) == [
            AddGradient(0, 1),
            TakeMean(0, 2),
            SendNorm(0, 0, 0),
        ]
        assert rule.ask_norm(0, 1, 0) == [SendNorm(0, 1, 0)]
        scaling = Scaling(0, 0.5, 1.0)
        assert rule.scale(scaling) == [
            ApplyUpdate(0, 2, 1, scaling),
            SendWeights(0, 0),
            SendWeights(0, 1),
        ]
        assert rule.scale(Scaling(0, 0.7, 1.0)) == [], "the first one counts"

    def test_a_scaling_that_comes_first_holds_nothing_up(self):
        """A server's successor hears it before the gradients come again."""
        rule = self.rule()
        scaling = Scaling(0, 0.5, 1.0)
        assert rule.scale(scaling) == []
        rule.push(0, 0, 0, 0, held=True)
        assert ApplyUpdate(0, 2, 1, scaling) in rule.push(0, 1, 0, 0, held=True)
        rule.push(0, 0, 1, 1, held=True)
        actions = rule.push(0, 1, 1, 1, held=True)
        assert actions == [AddGradient(0, 1), TakeMean(0, 2)], "it was of the step before"

    def test_a_gradient_after_the_mean_is_late(self):
        rule = self.rule(3, backup_workers=1)
        rule.push(0, 0, 0, 0, held=True)
        rule.push(0, 1, 0, 0, held=True)
        assert rule.push(0, 2, 0, 0, held=True) == []
        assert rule.awaited() == set()
        assert rule.ask_norm(0, 2, 0) == [SendNorm(0, 2, 0)], "it may be the last one to know it"
        actions = rule.scale(Scaling(0, 1.0, 1.0))
        assert SendWeights(0, 2, 0, dropped=True) in actions

    def test_an_update_that_is_made_answers_with_its_factor(self):
        rule = self.rule(3, backup_workers=1)
        rule.push(0, 0, 0, 0, held=True)
        rule.push(0, 1, 0, 0, held=True)
        rule.scale(Scaling(0, 0.5, 1.0))
        assert rule.ask_norm(0, 2, 0) == [SendNorm(0, 2, 0, made=True)]

    def test_a_successor_waits_for_somebody_who_knows_the_factor(self):
        rule = self.rule(2)
        rule.restore(RuleState({0: 0}, {0: {}}, {0: -1}, frozenset(), frozenset()))
        rule.join(0, step=1, answered={0: 0})
        rule.join(1, step=0)
        assert rule.ask_norm(0, 1, 0) == []
        assert SendNorm(0, 1, 0, made=True) in rule.scale(Scaling(0, 0.5, 1.0))

    def test_nobody_waits_for_a_factor_that_all_ask_for(self):
        rule = self.rule(2)
        rule.restore(RuleState({0: 0}, {0: {}}, {0: -1}, frozenset(), frozenset()))
        rule.join(0, step=1, answered={0: 0})
        rule.join(1, step=0)
        assert rule.ask_norm(0, 1, 0) == []
        rule._least = rule._needed = 1  # the job goes on without rank 0
        assert rule.lose(0) == [SendNorm(0, 1, 0, made=True)]

    def test_a_snapshot_keeps_the_scaling(self):
        rule = self.rule()
        rule.scale(Scaling(4, 0.25, float("inf")))
        state = RuleState.from_json(rule.state().to_json())
        again = Synchronous([0], 2)
        again.restore(state)
        assert again.scaling == Scaling(4, 0.25, float("inf"))


@pytest.mark.slow
def test_servers_clip_in_one_way_alone(tmp_path):
    settings = Settings(1, 20)
    with job.servers(settings, tmp_path):
        net = job.model()
        joined = job.exchange(settings, tmp_path, 0)
        joined.attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
        assert joined.clip(norm=1.0)
        with pytest.raises(UserError, match="clip gradients already"):
            joined.clip(value=1.0)
        joined.close()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["async", "bounded", "local_sgd", "post_local"])
def test_workers_clip_their_own_gradients_in_other_modes(mode, tmp_path):
    options = {"local_after": 1} if mode == "post_local" else {}
    settings = Settings(1, 20, mode=mode, **options)
    with job.servers(settings, tmp_path):
        net = job.model()
        joined = job.exchange(settings, tmp_path, 0)
        joined.attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
        assert not joined.clip(norm=1.0)
        joined.close()
