"""Tests ``worker/`` with servers: the same weights as one process, in every mode that promises it.

Servers and workers are threads.
"""

import copy
import dataclasses
import threading
import time

import pytest
import torch
from torch import nn

from scaletrain.errors import UserError
from scaletrain.parameter_server.protocol import wire
from scaletrain.parameter_server.protocol.settings import Settings, settings_from_options
from scaletrain.parameter_server.worker import replica
from scaletrain.parameter_server.worker.link import ServerLink
from scaletrain.parameter_server.worker.requests import ServerError
from scaletrain.training import checkpoint
from scaletrain.training.checkpoint import State
from tests.parameter_server import job

pytestmark = [pytest.mark.slow, pytest.mark.timeout(90)]
SMALL_BLOCKS = {"block_mb": 0.002}  # several blocks, tensors cut across them
STEPS = 12


def assert_close(weights, expected, tolerance=1e-5):
    for weight, reference in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight, reference, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "workers, options",
    [
        (1, {}),
        (3, {}),
        (2, {"servers": 2} | SMALL_BLOCKS),
        (2, {"link": "tcp"} | SMALL_BLOCKS),
        (2, {"link": "tcp", "security": "trusted_network", "connections": 2} | SMALL_BLOCKS),
    ],
)
def test_sync_is_single_process_training(tmp_path, workers, options):
    results = job.train(Settings(workers, 20, **options), tmp_path, STEPS)
    for weights, record in results:
        assert_close(weights, job.single(STEPS, workers))
        assert record["workers"] == workers
        assert record["bytes_sent"] >= 4 * sum(w.numel() for w in weights)
    assert all(torch.equal(a, b) for a, b in zip(results[0][0], results[-1][0], strict=True))


@pytest.mark.parametrize(
    "options", [{}, {"link": "tcp"}, {"mode": "local_sgd", "local_steps": 1}], ids=str
)
def test_what_accelerators_do_gives_the_same(tmp_path, monkeypatch, options):
    """Gradients and weights through staging. On the CPU nothing of it overlaps: tests/gpu has the
    rest.
    """
    monkeypatch.setattr(replica, "needs_staging", lambda device: True)
    settings = Settings(3, 20, servers=2, **options, **SMALL_BLOCKS)
    results = job.train(settings, tmp_path, STEPS)
    monkeypatch.undo()
    direct_dir = tmp_path / "direct"
    direct_dir.mkdir()
    direct = job.train(settings, direct_dir, STEPS)
    for (weights, _), (expected, _) in zip(results, direct, strict=True):
        assert_close(weights, expected)
        if not options.get("mode"):
            assert_close(weights, job.single(STEPS, 3))


def test_a_gradient_that_cannot_be_staged_ends_the_wait(tmp_path, monkeypatch):
    def broken(event):
        raise RuntimeError("device-side assert")

    monkeypatch.setattr(replica, "needs_staging", lambda device: True)
    monkeypatch.setattr(torch.cpu.Event, "synchronize", broken)
    with pytest.raises(
        ServerError, match=r"gradient of block \d+: RuntimeError: device-side assert"
    ):
        job.train(Settings(1, 20), tmp_path, 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5),
        lambda p: torch.optim.Adafactor(p, lr=1e-2),  # looks at whole tensors
        lambda p: torch.optim.SGD(
            [{"params": list(p)[:3]}, {"params": list(p)[3:], "weight_decay": 0.2}], lr=0.05
        ),
    ],
    ids=["AdamW", "RMSprop", "Adafactor", "two groups"],
)
def test_any_optimizer_runs_on_the_server(tmp_path, make):
    def listed(parameters):
        return make(list(parameters))

    for weights, _ in job.train(
        Settings(2, 20, servers=2, **SMALL_BLOCKS), tmp_path, STEPS, make=listed
    ):
        assert_close(weights, job.single(STEPS, 2, listed))


@pytest.mark.parametrize(
    "make, options",
    [
        (
            lambda p: torch.optim.SGD(p, **job.SGD),
            {"server_lr": {"name": "StepLR", "step_size": 4, "gamma": 0.5}},
        ),
        (lambda p: torch.optim.AdamW(p, lr=1e-2), {}),
        (lambda p: torch.optim.Adafactor(p, lr=1e-2), {"link": "tcp"}),
    ],
    ids=["SGD", "AdamW", "Adafactor"],
)
def test_a_checkpoint_holds_the_servers_optimizer_state(tmp_path, make, options):
    """Half of the steps, then new servers and workers with the checkpoint, cut into other blocks:
    as if there had been no pause.
    """
    settings = Settings(2, 20, **options)

    def half(folder, settings, first, last, load):
        def train_one(rank):
            net = job.model()
            optimizer = make(list(net.parameters()))
            if load:
                loaded = checkpoint.load_latest(tmp_path, State(net, optimizer))
                assert loaded and loaded.step == first
            joined = job.exchange(settings, folder, rank)
            joined.attach(net, optimizer)
            for step in range(first, last):
                optimizer.zero_grad()
                job.loss(net, step, rank).backward()
                joined.step()
            if rank == 0:
                checkpoint.save(tmp_path, last, State(net, optimizer), 1)
            joined.close()
            return [p.detach() for p in net.parameters()]

        folder.mkdir()
        with job.servers(settings, folder):
            return job.threads([lambda r=rank: train_one(r) for rank in range(2)])

    half(tmp_path / "a", dataclasses.replace(settings, servers=2, **SMALL_BLOCKS), 0, 6, False)
    weights, _ = half(tmp_path / "b", settings, 6, 12, True)
    whole, _ = half(tmp_path / "c", settings, 0, 12, False)
    assert_close(weights, whole)


def test_tensors_that_stay_whole_travel_in_parts_when_they_are_large(tmp_path, monkeypatch):
    monkeypatch.setattr(wire, "MAX_TENSOR_BYTES", 1024)

    def make(parameters):
        return torch.optim.Adafactor(parameters, lr=1e-2)

    for weights, _ in job.train(Settings(2, 20, link="tcp"), tmp_path, STEPS, make=make):
        assert_close(weights, job.single(STEPS, 2, make))


def test_a_schedule_on_the_server_counts_its_updates(tmp_path):
    expected_model = job.model()
    optimizer = torch.optim.SGD(expected_model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.5)
    for step in range(STEPS):
        optimizer.zero_grad()
        (sum(job.loss(expected_model, step, rank) for rank in range(2)) / 2).backward()
        optimizer.step()
        schedule.step()
    settings = Settings(2, 20, server_lr={"name": "StepLR", "step_size": 3, "gamma": 0.5})
    weights, _ = job.train(settings, tmp_path, STEPS, make=lambda p: torch.optim.SGD(p, lr=0.1))[0]
    assert_close(weights, [p.detach() for p in expected_model.parameters()])


@pytest.mark.parametrize("wire, tolerance", [("bf16", 0.02), ("fp16", 0.005), ("trunc16", 0.04)])
def test_sixteen_bits_on_the_wire_halve_the_bytes_and_stay_near(tmp_path, wire, tolerance):
    weights, record = job.train(Settings(2, 20, wire=wire), tmp_path, STEPS)[0]
    numel = sum(w.numel() for w in weights)
    assert 2 * numel <= record["bytes_sent"] < 2 * numel + 500
    expected = job.single(STEPS, 2)
    assert_close(weights, expected, tolerance)
    assert any(
        not torch.equal(a, b) for a, b in zip(weights, expected, strict=True)
    )  # it did round


def test_async_of_one_worker_is_single_process_training(tmp_path):
    weights, record = job.train(Settings(1, 20, mode="async"), tmp_path, STEPS)[0]
    assert_close(weights, job.single(STEPS, 1))
    assert record["staleness_max"] == 0


@pytest.mark.parametrize("mode", ["async", "bounded"])
def test_async_applies_every_gradient_and_records_staleness(tmp_path, mode):
    settings = Settings(3, 20, mode=mode, staleness=1)
    steps = (
        25 * STEPS
    )  # after 12 one process is at 0.86 of the first loss itself, after 300 at 0.32
    results = job.train(settings, tmp_path, steps, meet=threading.Barrier(3, timeout=30).wait)
    statistics = job.statistics(tmp_path)
    assert statistics["updates"] == 3 * steps
    assert sum(statistics["staleness"].values()) == 3 * steps
    assert any(int(staleness) > 0 for staleness in statistics["staleness"])
    before = sum(job.loss(job.model(), 99999, rank).item() for rank in range(3))
    after = sum(job.loss(job.model_with(results[0][0]), 99999, rank).item() for rank in range(3))
    assert after < 0.8 * before


def test_servers_that_met_a_worker_at_different_steps_agree_at_the_end(tmp_path, monkeypatch):
    """Rank 1 reaches the second server when rank 0 has done steps there: it begins where the first
    one says, and its gradients come late to the second.
    """
    connect = ServerLink.connect

    def late(link: ServerLink, *arguments, **options):
        if link.index == 1 and link._identity.rank == 1:
            time.sleep(0.5)
        return connect(link, *arguments, **options)

    monkeypatch.setattr(ServerLink, "connect", late)
    settings, begun = Settings(2, 5, mode="bounded", staleness=1, servers=2, **SMALL_BLOCKS), []
    job.train(
        settings,
        tmp_path,
        STEPS,
        on_step=lambda step, joined: begun.append((joined.world.rank, step)),
    )
    assert begun.index((0, 1)) < begun.index((1, 1)), "rank 1 was not late"
    assert [step for rank, step in begun if rank == 1] == [*range(1, STEPS + 1)]
    assert job.statistics(tmp_path)["lost"] == []


@pytest.mark.parametrize(
    "mode, outer, after",
    [("local_sgd", "average", 0), ("local_sgd", "nesterov", 0), ("post_local", "average", 4)],
)
def test_local_steps_are_averaged_by_the_outer_optimizer(tmp_path, mode, outer, after):
    settings = Settings(
        2,
        20,
        mode=mode,
        local_steps=4,
        local_after=after,
        outer=outer,
        outer_lr=0.5,
        outer_momentum=0.6,
    )
    results = job.train(settings, tmp_path, STEPS)
    shared = job.model()
    slow = torch.optim.SGD(
        shared.parameters(),
        **({"lr": 1.0} if outer == "average" else {"lr": 0.5, "momentum": 0.6, "nesterov": True}),
    )
    locals_ = [copy.deepcopy(shared) for _ in range(2)]
    fast = [torch.optim.SGD(m.parameters(), **job.SGD) for m in locals_]
    for step in range(STEPS):
        for rank, (net, optimizer) in enumerate(zip(locals_, fast, strict=True)):
            optimizer.zero_grad()
            job.loss(net, step, rank).backward()
            optimizer.step()
        if step < after or (step + 1 - after) % 4 == 0:
            for mean, *mine in zip(
                shared.parameters(), *(m.parameters() for m in locals_), strict=True
            ):
                mean.grad = sum(mean.detach() - p.detach() for p in mine) / 2
            slow.step()
            for net in locals_:
                net.load_state_dict(shared.state_dict())
    for weights, _ in results:
        assert_close(weights, [p.detach() for p in shared.parameters()])


@pytest.mark.parametrize("link", ["unix", "tcp"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adagrad])
def test_sparse_embeddings_move_only_touched_rows(tmp_path, link, kind):
    rows, steps, settings = 5000, 6, Settings(2, 20, servers=2, link=link)

    def build():
        with job.SEEDING:
            torch.manual_seed(3)
            return nn.Sequential(nn.EmbeddingBag(rows, 8, sparse=True, mode="sum"), nn.Linear(8, 2))

    def words(step, rank):
        generator = torch.Generator().manual_seed(step * 10 + rank)
        return torch.cat(
            [torch.randint(0, rows, (4, 5), generator=generator), torch.full((4, 1), 7)], 1
        )  # row 7: shared by all

    def train_one(rank):
        net = build()
        optimizer = kind(net.parameters(), lr=0.1)
        joined = job.exchange(settings, tmp_path, rank)
        joined.attach(net, optimizer)
        moved = []
        for step in range(steps):
            net.zero_grad()
            net(words(step, rank)).square().mean().backward()
            joined.step()
            moved.append(joined.record()["bytes_sent"] + joined.record()["bytes_received"])
        joined.sum(torch.zeros(1))  # everybody has pushed
        state = {name: value.clone() for name, value in net.state_dict().items()}
        joined.close()
        return state, moved

    reference = build()
    optimizer = kind(reference.parameters(), lr=0.1)
    for step in range(steps):
        reference.zero_grad()
        (sum(reference(words(step, rank)).square().mean() for rank in range(2)) / 2).backward()
        optimizer.step()
    with job.servers(settings, tmp_path):
        for state, moved in job.threads([lambda r=rank: train_one(r) for rank in range(2)]):
            assert_close(list(state.values()), list(reference.state_dict().values()))
            assert max(moved[1:]) < 10_000  # the table has 160,000 bytes


def test_accumulated_passes_are_pushed_once(tmp_path):
    settings = Settings(1, 20)
    net, reference = job.model(), job.model()
    optimizer, plain = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (net, reference))
    with job.servers(settings, tmp_path):
        joined = job.exchange(settings, tmp_path, 0)
        joined.attach(net, optimizer)
        with joined.accumulate():
            job.loss(net, 0, 0).backward()
        job.loss(net, 0, 1).backward()
        joined.step()
        with pytest.raises(ValueError, match="set the rate"):
            job.loss(net, 0, 1).backward()
            optimizer.param_groups[0]["lr"] = 0.2
            joined.step()
    (job.loss(reference, 0, 0) + job.loss(reference, 0, 1)).backward()
    plain.step()
    assert_close(
        [p.detach() for p in net.parameters()], [p.detach() for p in reference.parameters()]
    )


def test_a_second_model_is_refused(tmp_path):
    settings = Settings(1, 20)
    net, other = job.model(), job.model()
    with job.servers(settings, tmp_path):
        joined = job.exchange(settings, tmp_path, 0)
        joined.attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
        with pytest.raises(UserError, match="trains one model, and has one already"):
            joined.attach(other, torch.optim.SGD(other.parameters(), lr=0.1))


def test_workers_with_another_model_are_refused(tmp_path):
    settings = Settings(2, 5)
    with job.servers(settings, tmp_path):
        first = job.exchange(settings, tmp_path, 0)
        net = job.model()
        first.attach(net, torch.optim.SGD(net.parameters(), lr=0.1))
        other = nn.Linear(3, 3)
        with pytest.raises(ServerError, match="not the one that the server has"):
            job.exchange(settings, tmp_path, 1).attach(
                other, torch.optim.SGD(other.parameters(), lr=0.1)
            )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"mode": "async", "backup_workers": 1}, "needs mode: sync"),
        ({"backup_workers": 2}, "allowed: 0 to 1"),
        ({"restart_servers": 1}, "needs snapshots"),
        ({"mode": "post_local"}, "local_after"),
        ({"mode": "asynch"}, "did you mean 'async'"),
        ({"placement": "beside", "servers": 3}, "allowed: 1 to 2"),
    ],
)
def test_options_that_contradict_each_other_are_one_line(options, message):
    with pytest.raises(UserError, match=message):
        settings_from_options(options, 2)


def test_optimizers_that_a_server_cannot_run_are_one_line(tmp_path):
    table = nn.Embedding(10, 2, sparse=True)
    for optimizer, message in (
        (torch.optim.SGD(table.parameters(), lr=0.1, momentum=0.9), "touch every row"),
        (torch.optim.Adam(table.parameters()), "does not take sparse"),
        (torch.optim.LBFGS(table.parameters()), "several times"),
    ):
        with pytest.raises(UserError, match=message):
            job.exchange(Settings(1), tmp_path, 0).attach(table, optimizer)


def test_an_update_that_fails_ends_the_job_with_its_reason_and_no_server(tmp_path):
    """Bug it catches: torch raised in the server, and workers heard of a closed connection."""
    settings = Settings(1, 20)
    with job.servers(settings, tmp_path):
        net = job.model()
        joined = job.exchange(settings, tmp_path, 0)
        joined.attach(net, torch.optim.SparseAdam(net.parameters()))
        job.loss(net, 0, 0).backward()
        with pytest.raises(ServerError, match="cannot make the update: RuntimeError: SparseAdam"):
            joined.step()


@pytest.mark.parametrize(
    "length", [0, 1, wire.MAX_SUM_VALUES, wire.MAX_SUM_VALUES + 1, 3 * wire.MAX_SUM_VALUES - 1]
)
def test_sums_may_be_longer_than_a_message(tmp_path, length):
    """Bug it catches: metrics of many test samples that end the run in its first evaluation."""
    settings = Settings(2, 20)

    def joined_sum(rank):
        joined = job.exchange(settings, tmp_path, rank)
        net = job.model()
        joined.attach(net, torch.optim.SGD(net.parameters(), **job.SGD))
        values = 10.0**rank * torch.arange(length)
        totals = [joined.sum(values), joined.sum(torch.tensor([1.0]))]
        joined.close()
        return totals

    with job.servers(settings, tmp_path):
        results = job.threads([lambda rank=rank: joined_sum(rank) for rank in range(2)])
    for total, following in results:
        assert torch.equal(total, 11.0 * torch.arange(length)) and following.item() == 2
