"""torch RPC as a parameter server, for ``push_pull.py``: torch's way of batched updates.

python push_pull_rpc.py WORKERS BYTES STEPS PORT {tcp,auto}: ``auto`` takes the fastest channel.
"""

import itertools
import json
import os
import statistics
import sys
import threading
import time

import torch
import torch.distributed.rpc as rpc
import torch.multiprocessing as mp

WARMUP = 2


class Server:
    """Adds the gradients of all workers, then answers all of them with the weights."""

    def __init__(self, workers: int, numel: int):
        self.workers = workers
        self.weights = torch.zeros(numel)
        self.total = torch.zeros(numel)
        self.lock = threading.Lock()
        self.arrived = 0
        self.future: torch.futures.Future = torch.futures.Future()

    def push_pull(self, gradient: torch.Tensor) -> torch.futures.Future:
        with self.lock:
            future = self.future
            if self.arrived == 0:
                self.total.copy_(gradient)
            else:
                self.total.add_(gradient)
            self.arrived += 1
            if self.arrived == self.workers:
                self.weights.add_(self.total, alpha=0.0)  # the rate of the other subjects
                self.arrived = 0
                self.future = torch.futures.Future()
                future.set_result(self.weights)
        return future


SERVER: list[Server] = []  # in the server's process


@rpc.functions.async_execution
def push_pull(gradient: torch.Tensor) -> torch.futures.Future:
    return SERVER[0].push_pull(gradient)


def run(rank: int, workers: int, num_bytes: int, steps: int, port: int, how: str, times) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.update(TP_SOCKET_IFNAME="lo", GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    numel = num_bytes // 4
    if rank == workers:
        SERVER.append(Server(workers, numel))
    options = rpc.TensorPipeRpcBackendOptions(rpc_timeout=120)
    if how == "tcp":
        options = rpc.TensorPipeRpcBackendOptions(
            rpc_timeout=120, _transports=["uv"], _channels=["basic"]
        )
    name = "server" if rank == workers else f"worker{rank}"
    rpc.init_rpc(name, rank=rank, world_size=workers + 1, rpc_backend_options=options)
    if rank < workers:
        source = torch.ones(numel)
        gradient = torch.empty(numel)
        weights = torch.empty(numel)
        ends = [time.perf_counter()]
        for _ in range(steps + WARMUP):
            # All subjects copy a gradient to where it leaves from, and weights to the model.
            gradient.copy_(source)
            weights.copy_(rpc.rpc_sync("server", push_pull, args=(gradient,)))
            ends.append(time.perf_counter())
        gaps = [after - before for before, after in itertools.pairwise(ends)]
        times.put(statistics.median(gaps[WARMUP:]))
    rpc.shutdown()


def main() -> None:
    workers, num_bytes, steps, port = map(int, sys.argv[1:5])
    context = mp.get_context("spawn")
    times = context.SimpleQueue()
    arguments = (workers, num_bytes, steps, port, sys.argv[5], times)
    processes = [context.Process(target=run, args=(r, *arguments)) for r in range(workers + 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            for other in processes:
                other.kill()
            sys.exit(process.exitcode)
    print(json.dumps({"step_s": max(times.get() for _ in range(workers))}))


if __name__ == "__main__":
    main()
