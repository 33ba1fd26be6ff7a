"""Tests of ``worker/calibration.py``: the size of blocks follows from the links."""

import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from scaletrain import config
from scaletrain.parameter_server.protocol import sharding
from scaletrain.parameter_server.protocol.settings import Settings, settings_from_options
from scaletrain.parameter_server.server.server import Server
from scaletrain.parameter_server.server.shard import ModelDescription, Shard
from scaletrain.parameter_server.worker import calibration
from scaletrain.parameter_server.worker.calibration import Cut, agree, choose, measure
from scaletrain.training.trainer import Trainer
from scaletrain.world import World
from tests.parameter_server import job
from tests.training import jobs

MB = 1_000_000
SHAPES = ((40, 13), (7,), (333, 3), (5,), (1001,))
OPTIMIZERS = {
    "SGD": {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-3},
    "Adam": {"weight_decay": 0.01},
    "AdamW": {},
    "Adagrad": {},
    "Adadelta": {},
    "Adamax": {},
    "NAdam": {},
    "RAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True},
    "Rprop": {},
    "ASGD": {},
}


def trained(name: str, block_bytes: int) -> torch.Tensor:
    """Return the weights of a shard after some steps, one parameter after the other."""
    blocks = sharding.plan([sharding.ParameterSpec(shape) for shape in SHAPES], 1, block_bytes)
    groups = [{"lr": 0.1, **OPTIMIZERS[name]}]
    described = [sharding.to_json(block) for block in blocks]
    optimizer = {"name": name, "groups": groups}
    shard = Shard(Settings(1), 0, ModelDescription(described, optimizer))
    random = torch.Generator().manual_seed(1)
    sizes = [sharding.ParameterSpec(shape).numel for shape in SHAPES]
    first = [torch.randn(size, generator=random) for size in sizes]
    for block in blocks:
        for piece, in_block in sharding.places(block):
            values = first[piece.parameter][piece.start : piece.stop]
            shard.weights(block.key)[in_block] = values
    for step in range(12):
        gradients = [torch.randn(size, generator=random) for size in sizes]
        for block in blocks:
            parts = [gradients[p.parameter][p.start : p.stop] for p in block.pieces]
            shard.add(block.key, 0, torch.cat(parts))
            shard.apply(block.key, 1, 0.013, step + 1)
    last = [torch.empty(size) for size in sizes]
    for block in blocks:
        for piece, in_block in sharding.places(block):
            target = last[piece.parameter][piece.start : piece.stop]
            target.copy_(shard.weights(block.key)[in_block])
    return torch.cat(last)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_no_size_of_blocks_changes_a_bit(name: str):
    """So a measurement, which differs from run to run, does not either."""
    expected = trained(name, 1 << 20)
    for block_bytes in (64, 192, 1000, 1024, 4096):
        assert torch.equal(trained(name, block_bytes), expected), block_bytes


def test_slow_links_get_small_blocks():
    sizes = [choose(50 * MB, 1 / bytes_per_s).block_bytes for bytes_per_s in (5e6, 50e6, 5e9)]
    assert sizes == sorted(sizes)
    assert sizes[0] <= 1 << 19 and sizes[-1] > 4 * MB
    for rate in (None, 1e-3, 1e-15):
        for num_bytes in (0, 1, 1 << 40):
            size = choose(num_bytes, rate).block_bytes
            assert 1 << 17 <= size <= 1 << 23 and size & (size - 1) == 0


def test_only_links_without_a_number_are_measured():
    assert not settings_from_options({}, 2).measures_blocks  # shared memory
    assert settings_from_options({"link": "tcp"}, 2).measures_blocks
    assert settings_from_options({"wire": "bf16"}, 2).measures_blocks
    fixed = settings_from_options({"link": "tcp", "block_mb": 0.5}, 2)
    world = World(0, 2, 0, 2, launcher="local")
    nowhere = Path("/nonexistent")  # no server is asked
    assert agree(fixed, nowhere, world, dist.HashStore(), MB) == Cut(1 << 19)


@pytest.mark.slow
@pytest.mark.parametrize("security", ["trusted_network", "aes", "curve"])
def test_loopback_is_measured_in_time(security: str, tmp_path: Path):
    settings = Settings(2, 20, servers=2, link="tcp", security=security)
    with job.servers(settings, tmp_path):
        measure(settings, tmp_path, 0)  # the first one waits for the servers to be up
        began = time.monotonic()
        rate = measure(settings, tmp_path, 0)
        took_s = time.monotonic() - began
    assert rate is not None and 1e-10 < rate < 1e-6
    # The limit is 0.25 s; the rest is for connections, on a machine that does other things, too.
    assert took_s < 2


@pytest.mark.slow
def test_all_workers_take_what_rank_0_has_measured(tmp_path: Path, monkeypatch):
    settings = Settings(3, 20, link="tcp", placement="dedicated")
    measured = []

    def counting(*arguments) -> float:
        measured.append(arguments)
        return 1 / 5e6

    monkeypatch.setattr(calibration, "measure", counting)
    store = dist.HashStore()
    with job.servers(settings, tmp_path):
        worlds = [World(rank, 3, rank, 3, launcher="local") for rank in (2, 1, 0)]
        cuts = job.threads(
            [lambda w=world: agree(settings, tmp_path, w, store, 9 * MB) for world in worlds]
        )
        again = agree(settings, tmp_path, worlds[-1], store, 9 * MB)
    assert cuts == [choose(9 * MB, 1 / 5e6)] * 3
    assert again == cuts[0], "a rank 0 that was started again changes nothing"
    assert len(measured) == 1


@pytest.mark.slow
def test_the_last_rank_measures_where_rank_0_has_the_server_beside_it(tmp_path: Path, monkeypatch):
    settings = Settings(3, 20, hosts=2)
    measured = []

    def counting(settings: Settings, run_dir: Path, rank: int) -> float:
        measured.append(rank)
        return 1 / 5e6

    monkeypatch.setattr(calibration, "measure", counting)
    store = dist.HashStore()

    def join(rank: int) -> Cut:
        world = World(rank, 3, rank, 3, launcher="local")
        return agree(settings, tmp_path, world, store, 9 * MB, is_beside=True)

    cuts = job.threads([lambda rank=rank: join(rank) for rank in range(3)])
    assert cuts == [choose(9 * MB, 1 / 5e6)] * 3
    assert measured == [2]
    # A last rank that never comes holds nobody up.
    monkeypatch.setattr(calibration, "_PATIENCE_S", 0.1)
    store = dist.HashStore()
    assert join(0) == choose(9 * MB, None)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["dies", "hangs"])
def test_a_server_that_is_lost_meanwhile_ends_the_measurement(
    fault: str, tmp_path: Path, monkeypatch
):
    settings = Settings(
        1, 20, link="tcp", placement="dedicated", snapshot_updates=5, restart_servers=1
    )
    servers = [Server(settings, tmp_path, 0), Server(settings, tmp_path, 0)]
    handle = Server.handle
    probes = []

    def stop_at_the_third(server, peer, message) -> None:
        if message.header.kind.name == "PROBE":
            probes.append(message.header.count)
            if len(probes) == 3:
                if fault == "dies":
                    server.stop()
                return  # without an answer
        handle(server, peer, message)

    monkeypatch.setattr(Server, "handle", stop_at_the_third)

    def serve() -> None:
        for server in servers:
            server.serve()

    serving = threading.Thread(target=serve, daemon=True)
    serving.start()
    began = time.monotonic()
    weights, _ = job.work(settings, tmp_path, 0, 5)
    assert time.monotonic() - began < 15
    if fault == "hangs":
        servers[0].stop()
    servers[1].stop()
    serving.join(10)
    assert len(probes) == 3, "it goes on with what it has measured"
    torch.testing.assert_close(weights, job.single(5, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_successor_keeps_the_blocks(tmp_path: Path):
    """It has them from its snapshot; a worker that is started again has them from the store."""
    settings = Settings(
        2,
        20,
        link="tcp",
        placement="dedicated",
        min_workers=1,
        snapshot_updates=3,
        restart_servers=1,
    )
    servers = [Server(settings, tmp_path, 0), Server(settings, tmp_path, 0)]

    def serve() -> None:
        for server in servers:
            server.serve()

    serving = threading.Thread(target=serve, daemon=True)
    serving.start()

    def on_step(step: int, joined) -> None:
        if step == 6 and joined.world.rank == 0:
            servers[0].stop()

    try:
        [first, second] = job.threads(
            [
                lambda rank=rank: job.work(settings, tmp_path, rank, 12, on_step=on_step)
                for rank in range(2)
            ]
        )
    finally:
        servers[1].stop()
        serving.join(10)
    assert servers[1]._snapshots.restored_at is not None
    for one, other in zip(first[0], second[0], strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_the_choice_is_recorded_and_said(tmp_path: Path, monkeypatch):
    lines = []
    fit = Trainer.fit

    def saying(trainer, *arguments, **named):
        lines.extend(trainer.describe())
        return fit(trainer, *arguments, **named)

    monkeypatch.setattr(Trainer, "fit", saying)
    options = {"link": "tcp", "placement": "dedicated"}
    tree = {
        "model": {"name": "mlp", "sizes": [8, 16, 4]},
        "data": "tests.training.jobs:vectors",
        "batch_size": 16,
        "steps": 2,
        "optimizer": {"name": "sgd", "lr": 0.1},
        "exchange": {"name": "parameter_server"} | options,
    }
    config.check(tree)
    with job.servers(settings_from_options(options, 1, 20.0), tmp_path):
        result = jobs.train_rank(0, 1, tree, tmp_path)
    chosen = result["summary"]["chosen"]
    assert chosen["block_mb"] == (1 << 17) / (1 << 20)  # the smallest: the model is small
    assert chosen["link_mb_per_s"] > 1
    [line] = [each for each in lines if each.startswith("blocks: ")]
    assert line.startswith("blocks: 0.125 MiB (a server sends back ")
