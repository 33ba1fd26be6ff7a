"""One process of ``scaletrain bench parameter-server``.

It prints the median seconds of its measurement as JSON.
"""

import json
import statistics
import sys
import time
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

from scaletrain import programs

programs.begin(__name__)

import numpy as np
import psutil
import torch
import torch.distributed as dist
import zmq

from scaletrain.engine.process_group import Options
from scaletrain.parameter_server.protocol import security, sharding
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.worker.client import Client


def null_steps(
    run_dir: str, rank: str, settings: str, mode: str, total_bytes: str, steps: str
) -> dict[str, float]:
    """Push gradients and pull weights, and compute nothing.

    ``dense`` moves all parameters, ``sparse`` 32 rows of a table of that size. Gradients are copied
    to where they are sent from; with ``placed`` they lie there already, as the bytes of a bare
    socket do. Weights are copied from where they arrive to where they are used. The model's own
    memory is that of one block, because 1 GB of it for each of 8 workers would not fit beside the
    rest.
    """
    of_servers = Settings(**json.loads(settings))
    numel = max(1, int(total_bytes) // 4)
    width = 256
    shape = (numel // width, width) if mode == "sparse" else (numel,)
    blocks = sharding.plan(
        [sharding.Parameter(shape, sparse=mode == "sparse")],
        of_servers.servers,
        of_servers.block_bytes,
    )
    optimizer = {
        "name": "SGD",
        "groups": [{"lr": 0.0, "momentum": 0.9 if mode == "momentum" else 0.0}],
    }
    client = Client(of_servers, Path(run_dir), int(rank), blocks, optimizer)
    if int(rank) == 0:
        for block in blocks:
            client.store(block.key, torch.zeros(block.numel))
    largest = 0 if mode == "sparse" else max(block.numel for block in blocks)
    gradient, weights = torch.ones(largest), torch.empty(largest)
    rows = torch.arange(32 // of_servers.servers)
    values = torch.ones(len(rows), width)
    cpu_s = 0.0
    client.sum(np.zeros(1))  # together
    ends = [time.perf_counter()]
    for step in range(int(steps) + 2):
        if step == 2:
            cpu_s = _servers_cpu_s(Path(run_dir), of_servers.servers)
        if mode == "sparse":
            for block in blocks:
                client.ask_rows(block.key, rows)
            for block in blocks:
                client.rows(block.key)
                client.push_rows(block.key, step, 0.0, rows, values)
            for block in blocks:
                client.take_rows(block.key)
        else:
            order = (
                blocks if mode == "placed" else blocks[::-1]
            )  # backward makes the last ones first
            for block in order:
                if mode != "placed" or step == 0:
                    torch.from_numpy(client.gradient(block.key)).copy_(gradient[: block.numel])
                client.push(block.key, step, 0.0)
            for block in order:  # as the exchange does
                client.take(block.key, weights[: block.numel].copy_)
        ends.append(time.perf_counter())
    cpu_s = _servers_cpu_s(Path(run_dir), of_servers.servers) - cpu_s
    client.sum(np.zeros(1))
    client.close()
    return {"step_s": _each(ends[2:]), "server_cpu_s": cpu_s / int(steps)}


def _servers_cpu_s(run_dir: Path, servers: int) -> float:
    """Return the processor time of all servers so far. They run on this machine."""
    total = 0.0
    for index in range(servers):
        times = psutil.Process(
            int(json.loads((run_dir / f"server-{index}.address.json").read_text())["pid"])
        ).cpu_times()
        total += times.user + times.system
    return total


def bare(
    side: str, address: str, run_dir: str, curve: str, total_bytes: str, steps: str
) -> dict[str, float]:
    """Send bytes and get as many back between a bare pair of ZeroMQ sockets, over one TCP link.

    Messages are as large as the parameter server's blocks.
    """
    chunk = Settings(
        1, link="tcp", security="curve" if curve == "curve" else "trusted_network"
    ).block_bytes
    keys = security.job_keys(Path(run_dir))
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    if curve == "curve":
        if side == "echo":
            socket.curve_server = True
            socket.curve_publickey, socket.curve_secretkey = (
                keys.server_public.encode(),
                keys.server_secret.encode(),
            )
        else:
            socket.curve_serverkey = keys.server_public.encode()
            socket.curve_publickey, socket.curve_secretkey = (
                keys.worker_public.encode(),
                keys.worker_secret.encode(),
            )
    if side == "echo":
        port = socket.bind_to_random_port("tcp://127.0.0.1")
        Path(address).write_text(f"tcp://127.0.0.1:{port}")
        while True:
            frame = socket.recv(copy=False)
            if len(frame) == 1:
                return {}
            socket.send(frame, copy=False)
    while not Path(address).exists() or not Path(address).read_text():
        time.sleep(0.01)
    socket.connect(Path(address).read_text())
    data, times = np.ones(int(total_bytes), np.uint8), []
    target = np.empty(int(total_bytes), np.uint8)
    for _ in range(int(steps) + 2):
        began, sent, received = time.perf_counter(), 0, 0
        while received < len(data):
            if sent < len(data) and sent - received < 8 * chunk:
                socket.send(data[sent : sent + chunk], copy=False)
                sent = min(len(data), sent + chunk)
            elif sent == len(data) or socket.poll(0):
                frame = socket.recv(copy=False)
                target[received : received + len(frame)] = np.frombuffer(frame.buffer, np.uint8)
                received += len(frame)
            else:
                socket.poll(1)
        times.append(time.perf_counter() - began)
    socket.send(b"x")
    socket.close(linger=1000)
    return {"step_s": statistics.median(times[2:])}


def _join(rank: str, size: str, store: str, port: str = "") -> None:
    shared: dist.Store = (
        dist.TCPStore(store, int(port), int(size), rank == "0", timedelta(seconds=60))
        if port
        else dist.FileStore(store, int(size))
    )
    dist.init_process_group(
        "gloo", store=shared, rank=int(rank), world_size=int(size), timeout=timedelta(seconds=120)
    )


def gloo_pair(rank: str, store: str, total_bytes: str, steps: str) -> dict[str, float]:
    """Send bytes with gloo, and get as many back."""
    _join(rank, "2", store)
    data, times = torch.ones(int(total_bytes) // 4), []
    for _ in range(int(steps) + 2):
        began = time.perf_counter()
        if rank == "0":
            dist.send(data, 1)
            dist.recv(data, 1)
        else:
            dist.recv(data, 0)
            dist.send(data, 0)
        times.append(time.perf_counter() - began)
    return {"step_s": statistics.median(times[2:])}


def tree(
    rank: str, size: str, address: str, port: str, total_bytes: str, steps: str
) -> dict[str, float]:
    """Reduce as FireCaffe does: our collective ``tree`` over TCP, the whole vector a message."""
    _join(rank, size, address, port)
    group = dist.new_group(
        backend="scaletrain", pg_options=Options(collective="tree", transport="gloo")
    )
    data, ends = torch.zeros(int(total_bytes) // 4), []
    for _ in range(int(steps) + 2):
        dist.all_reduce(data, group=group)
        ends.append(time.perf_counter())
    return {"step_s": _each(ends[1:])}


def _each(ends: list[float]) -> float:
    """Return the median seconds of exchanges that follow one another, as those of training do.

    No rank starts an exchange before it has the result of the last one.
    """
    return statistics.median(after - before for before, after in pairwise(ends))


if __name__ == "__main__":
    programs.done()
    torch.set_num_threads(1)
    measurements = {"null": null_steps, "bare": bare, "gloo": gloo_pair, "tree": tree}
    measure = measurements[sys.argv[1]]
    print(json.dumps(measure(*sys.argv[2:])), flush=True)
