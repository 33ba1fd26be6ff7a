"""One process of ``scaletrain bench parameter-server``.

It prints the median seconds as JSON. Its first argument names the measurement.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

from scaletrain import programs

programs.begin(__name__)  # before torch is imported

import numpy as np
import psutil
import torch
import torch.distributed as dist
import zmq

from scaletrain.engine.choice import Options
from scaletrain.parameter_server.protocol import security, sharding
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.worker import calibration
from scaletrain.parameter_server.worker.client import Client
from scaletrain.run.layout import RunDir
from scaletrain.world import World

_WARMUP_STEPS = 2
_TABLE_WIDTH = 256  # of the sparse table
_TABLE_ROWS = 32  # that a sparse step reads and changes
_BARE_BYTES = {False: 8 << 20, True: 1 << 20}  # of a bare message, by whether CURVE encrypts it
_CHUNKS_AHEAD = 8  # that a bare socket sends before the first has come back


def null_steps(
    run_dir: str, rank: str, settings_json: str, mode: str, total_bytes: str, steps: str
) -> dict[str, float]:
    """Push gradients and pull weights, as training does, without computing anything.

    Gradients are copied to where they are sent from, and weights from where they arrive to where
    they are used. The model's own memory is that of one block: 1 GB for each of 8 workers would
    not fit beside the rest.

    Args:
        run_dir: of the servers.
        rank: of this worker.
        settings_json: ``Settings.to_json``.
        mode: ``dense``; ``momentum``: with momentum on the servers; ``placed``: gradients lie
            already where they are sent from, as those of a bare socket do; ``sparse``: some rows of
            a table.
        total_bytes: of the model.
        steps: to measure.
    """
    settings = Settings.from_json(settings_json)
    is_sparse = mode == "sparse"
    numel = max(1, int(total_bytes) // 4)
    shape = (numel // _TABLE_WIDTH, _TABLE_WIDTH) if is_sparse else (numel,)
    parameter = sharding.ParameterSpec(shape, sparse=is_sparse)
    world = World(int(rank), settings.workers, int(rank), settings.workers, launcher="local")
    store = dist.FileStore(f"{run_dir}/store", settings.workers)
    dense_bytes = 0 if is_sparse else 4 * numel
    cut = calibration.agree(settings, Path(run_dir), world, store, dense_bytes)
    blocks = sharding.plan([parameter], settings.servers, cut.block_bytes)
    momentum = 0.9 if mode == "momentum" else 0.0
    # A rate of 0 still does the whole update, and the weights stay finite for any number of steps.
    optimizer = {"name": "SGD", "groups": [{"lr": 0.0, "momentum": momentum}]}
    client = Client(settings, Path(run_dir), int(rank), blocks, optimizer)
    if int(rank) == 0:
        for block in blocks:
            client.store(block.key, torch.zeros(block.numel))
        client.wait_until_stored()
    exchange: Callable[[int], None]
    if is_sparse:
        exchange = _SparseStep(client, blocks, settings.servers)
    else:
        exchange = _DenseStep(client, blocks, is_placed=mode == "placed")
    client.sum(np.zeros(1))  # all workers begin together
    ends = [time.perf_counter()]
    cpu_s_before = 0.0
    for step in range(int(steps) + _WARMUP_STEPS):
        if step == _WARMUP_STEPS:
            cpu_s_before = _servers_cpu_s(Path(run_dir), settings.servers)
        exchange(step)
        ends.append(time.perf_counter())
    cpu_s = _servers_cpu_s(Path(run_dir), settings.servers) - cpu_s_before
    # No worker leaves while another still exchanges.
    client.sum(np.zeros(1))
    client.close()
    return {
        "step_s": _median_gap(ends[_WARMUP_STEPS:]),
        "server_cpu_s": cpu_s / int(steps),
        "block_mb": cut.block_bytes / (1 << 20),
    }


class _DenseStep:
    """Pushes the gradient of every block, then takes its new weights."""

    def __init__(self, client: Client, blocks: Sequence[sharding.Block], is_placed: bool):
        largest = max(block.numel for block in blocks)
        self._client = client
        self._is_placed = is_placed
        # Backward makes the last blocks' gradients first.
        self._order = list(blocks) if is_placed else list(reversed(blocks))
        self._gradient = torch.ones(largest)
        self._weights = torch.empty(largest)

    def __call__(self, step: int) -> None:
        for block in self._order:
            # A placed gradient is written once, and sent from its place again and again.
            if not self._is_placed or step == 0:
                target = torch.from_numpy(self._client.gradient(block.key))
                target.copy_(self._gradient[: block.numel])
            self._client.push(block.key, step, 0.0)
        # All pushes come first: servers work on early blocks while later ones are on their way.
        for block in self._order:
            self._client.take(block.key, _copy_into(self._weights[: block.numel]))


class _SparseStep:
    """Reads some rows of a table, and pushes their gradient."""

    def __init__(self, client: Client, blocks: Sequence[sharding.Block], servers: int):
        self._client = client
        self._blocks = blocks
        # Each server holds a block of the table, so all blocks together give _TABLE_ROWS rows.
        self._rows = torch.arange(_TABLE_ROWS // servers)
        self._values = torch.ones(len(self._rows), _TABLE_WIDTH)

    def __call__(self, step: int) -> None:
        # All servers are asked before the first answer is awaited: they work at the same time.
        for block in self._blocks:
            self._client.ask_rows(block.key, self._rows)
        for block in self._blocks:
            self._client.rows(block.key)
            self._client.push_rows(block.key, step, 0.0, self._rows, self._values)
        for block in self._blocks:
            self._client.take_rows(block.key)


def _servers_cpu_s(run_dir: Path, servers: int) -> float:
    """Return the processor time of all servers so far; they run on this machine."""
    total = 0.0
    for index in range(servers):
        address = json.loads(RunDir(run_dir).server_address(index).read_text(encoding="utf-8"))
        times = psutil.Process(int(address["pid"])).cpu_times()
        total += times.user + times.system
    return total


def bare(
    side: str, address_file: str, run_dir: str, curve: str, total_bytes: str, steps: str
) -> dict[str, float]:
    """Send so many bytes and get as many back, over one TCP connection of bare ZeroMQ sockets.

    Messages are as large as suits the link.

    Args:
        side: ``echo`` serves; the other side measures.
        address_file: where the serving side writes its address.
        run_dir: where the keys lie.
        curve: ``curve`` to encrypt.
        total_bytes: to send in each direction.
        steps: to measure.
    """
    encrypted = curve == "curve"
    socket = _bare_socket(side == "echo", encrypted, Path(run_dir))
    if side == "echo":
        _echo(socket, Path(address_file))
        return {}
    socket.connect(_wait_for_text(Path(address_file)))
    data = np.ones(int(total_bytes), np.uint8)
    target = np.empty(int(total_bytes), np.uint8)
    times = []
    for _ in range(int(steps) + _WARMUP_STEPS):
        began = time.perf_counter()
        _there_and_back(socket, data, target, _BARE_BYTES[encrypted])
        times.append(time.perf_counter() - began)
    # One byte ends the echo. The linger gives it a second (1,000 ms) to leave.
    socket.send(b"x")
    socket.close(linger=1000)
    return {"step_s": statistics.median(times[_WARMUP_STEPS:])}


def _bare_socket(is_server: bool, encrypted: bool, run_dir: Path) -> zmq.Socket:
    # A DEALER may send again before an answer comes; a REQ socket may not.
    socket = zmq.Context().socket(zmq.DEALER)
    if encrypted:
        encrypt = security.encrypt_server if is_server else security.encrypt_worker
        encrypt(socket, security.CurveKeys.of_job(run_dir))
    return socket


def _echo(socket: zmq.Socket, address_file: Path) -> None:
    """Send every message back, until one of a single byte comes."""
    port = socket.bind_to_random_port("tcp://127.0.0.1")
    address_file.write_text(f"tcp://127.0.0.1:{port}")
    while True:
        frame = socket.recv(copy=False)
        if len(frame) == 1:
            return
        socket.send(frame, copy=False)


def _wait_for_text(path: Path) -> str:
    # The other side does not write atomically: an empty file is one that is being written.
    while not path.exists() or not path.read_text():
        time.sleep(0.01)
    return path.read_text()


def _there_and_back(
    socket: zmq.Socket, data: np.ndarray, target: np.ndarray, chunk_bytes: int
) -> None:
    """Send data in chunks, some of them ahead of those that come back."""
    num_sent = num_received = 0  # bytes
    while num_received < len(data):
        all_sent = num_sent == len(data)
        # Some chunks ahead keep both directions busy.
        if not all_sent and num_sent - num_received < _CHUNKS_AHEAD * chunk_bytes:
            socket.send(data[num_sent : num_sent + chunk_bytes].data, copy=False)
            num_sent = min(len(data), num_sent + chunk_bytes)
        elif all_sent or socket.poll(0):
            frame = socket.recv(copy=False)
            end = num_received + len(frame)
            # The parameter server's client copies what arrives, too: the comparison stays fair.
            target[num_received:end] = np.frombuffer(frame.buffer, np.uint8)
            num_received = end
        else:
            # Enough is on its way: wait up to 1 ms for a chunk to come back.
            socket.poll(1)


def _join(rank: str, size: str, store: str, port: str = "") -> None:
    """Make gloo's process group, over a TCP store if there is a port, else over a file."""
    shared: dist.Store
    if port:
        shared = dist.TCPStore(store, int(port), int(size), rank == "0", timedelta(seconds=60))
    else:
        shared = dist.FileStore(store, int(size))
    dist.init_process_group(
        "gloo", store=shared, rank=int(rank), world_size=int(size), timeout=timedelta(seconds=120)
    )


def gloo_pair(rank: str, store: str, total_bytes: str, steps: str) -> dict[str, float]:
    """Send so many bytes and get as many back, by gloo."""
    _join(rank, "2", store)
    data = torch.ones(int(total_bytes) // 4)
    times = []
    for _ in range(int(steps) + _WARMUP_STEPS):
        began = time.perf_counter()
        # In opposite order: two ranks that both send first would wait for each other.
        if rank == "0":
            dist.send(data, 1)
            dist.recv(data, 1)
        else:
            dist.recv(data, 0)
            dist.send(data, 0)
        times.append(time.perf_counter() - began)
    return {"step_s": statistics.median(times[_WARMUP_STEPS:])}


def tree(
    rank: str, size: str, address: str, port: str, total_bytes: str, steps: str
) -> dict[str, float]:
    """Sum by FireCaffe's reduction tree over TCP, the whole vector in every message."""
    _join(rank, size, address, port)
    options = Options(collective="tree", transport="gloo")
    group = dist.new_group(backend="scaletrain", pg_options=options)
    data = torch.zeros(int(total_bytes) // 4)
    ends = []
    for _ in range(int(steps) + _WARMUP_STEPS):
        dist.all_reduce(data, group=group)
        ends.append(time.perf_counter())
    # A gap needs the end before it, here that of the second and last warm-up step.
    return {"step_s": _median_gap(ends[1:])}


def _copy_into(target: torch.Tensor) -> Callable[[torch.Tensor], None]:
    def copy(weights: torch.Tensor) -> None:
        target.copy_(weights)

    return copy


def _median_gap(ends: list[float]) -> float:
    """Return the seconds of one exchange among exchanges that follow one another.

    They do so in training: no rank starts an exchange before it has the result of the last one.
    """
    return statistics.median(after - before for before, after in pairwise(ends))


if __name__ == "__main__":
    programs.done()
    # Workers and servers share this machine's cores.
    torch.set_num_threads(1)
    parts: dict[str, Callable[..., Any]] = {
        "null": null_steps,
        "bare": bare,
        "gloo": gloo_pair,
        "tree": tree,
    }
    print(json.dumps(parts[sys.argv[1]](*sys.argv[2:])), flush=True)
