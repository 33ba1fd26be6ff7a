"""Tests ``worker/link.py``: workers run a few blocks ahead of each other, and never into a
deadlock.
"""

import random
import threading
import time
from pathlib import Path

import torch

from scaletrain.parameter_server.protocol import sharding
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.worker.client import Client
from tests.parameter_server import job

BLOCKS, NUMEL, STEPS = 40, 64, 10
SGD = {"name": "SGD", "groups": [{"lr": 1.0}]}


def make_settings(workers: int) -> Settings:
    return Settings(
        workers,
        20,
        link="tcp",
        security="trusted_network",
        connections=1,
        block_mb=4 * NUMEL / (1 << 20),
    )


def join(settings: Settings, run_dir: Path, rank: int) -> Client:
    blocks = sharding.plan(
        [sharding.ParameterSpec((BLOCKS * NUMEL,))], settings.servers, settings.block_bytes
    )
    assert len(blocks) == BLOCKS
    client = Client(settings, run_dir, rank, blocks, SGD)
    if rank == 0:
        for block in blocks:
            client.store(block.key, torch.zeros(NUMEL))
        client.wait_until_stored()
    client.sum(torch.zeros(1).double().numpy())
    return client


def push(client: Client, key: int, step: int, value: float) -> None:
    client.gradient(key)[:] = value
    client.push(key, step, 1.0)


def test_workers_may_push_in_any_order(tmp_path):
    settings = make_settings(3)

    def worker(rank: int) -> None:
        client, order, weights = (
            join(settings, tmp_path, rank),
            random.Random(rank),
            torch.zeros(BLOCKS, NUMEL),
        )
        for step in range(STEPS):
            for key in order.sample(range(BLOCKS), BLOCKS):
                push(client, key, step, rank + key)
                if order.random() < 0.2:
                    time.sleep(0.001)
            for key in range(BLOCKS):
                client.take(key, weights[key].copy_)
        client.close()
        assert torch.equal(
            weights, -STEPS * (1.0 + torch.arange(BLOCKS)[:, None]).expand(-1, NUMEL)
        )  # ranks' mean is 1

    with job.servers(settings, tmp_path):
        job.threads([lambda r=rank: worker(r) for rank in range(3)], 30)


def test_a_worker_waits_for_those_behind(tmp_path):
    """What rank 0 pushes while rank 1 has pushed nothing stays with it, but for a few blocks, those
    that the next forward needs first.
    """
    settings, seen = make_settings(2), threading.Event()
    ahead = settings.blocks_ahead
    assert ahead == 4

    def first() -> None:
        client = join(settings, tmp_path, 0)
        for key in range(BLOCKS):
            push(client, key, 0, 1.0)
        time.sleep(0.5)
        under_way = {token.key for token in client._links[0].under_way}
        seen.set()
        finish(client)
        assert under_way == set(range(ahead))

    def second() -> None:
        client = join(settings, tmp_path, 1)
        assert seen.wait(20)
        for key in range(BLOCKS):
            push(client, key, 0, 3.0)
        finish(client)

    def finish(client: Client) -> None:
        for key in range(BLOCKS):
            client.take(key, lambda values: None)
        client.close()

    with job.servers(settings, tmp_path):
        job.threads([first, second], 30)


def test_who_waits_for_nobody_sends_what_it_has():
    assert Settings(1, hosts=2).blocks_ahead is None
    for mode in ("async", "bounded"):
        assert Settings(4, hosts=2, mode=mode).blocks_ahead is None
