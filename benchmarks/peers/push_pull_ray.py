"""A Ray actor as a parameter server, for ``push_pull.py``.

python push_pull_ray.py WORKERS BYTES STEPS PORT
"""

import asyncio
import itertools
import json
import statistics
import sys
import time

import numpy as np
import ray

WARMUP = 2


@ray.remote(num_cpus=0)
class Server:
    """Adds the gradients of all workers, then answers all of them with the weights."""

    def __init__(self, workers: int, numel: int):
        self.workers = workers
        self.weights = np.zeros(numel, np.float32)
        self.total = np.zeros(numel, np.float32)
        self.arrived = 0
        self.updated = asyncio.Event()

    async def push_pull(self, gradient):
        updated = self.updated
        if self.arrived == 0:
            np.copyto(self.total, gradient)
        else:
            self.total += gradient
        self.arrived += 1
        if self.arrived < self.workers:
            await updated.wait()
        else:
            self.weights -= 0.0 * self.total
            self.arrived = 0
            self.updated = asyncio.Event()
            self.weights_now = ray.put(self.weights)  # once for all workers
            updated.set()
        return [self.weights_now]


@ray.remote(num_cpus=0)
class Worker:
    def run(self, server, numel: int, steps: int) -> float:
        source = np.ones(numel, np.float32)
        weights = np.empty(numel, np.float32)
        ends = [time.perf_counter()]
        for _ in range(steps + WARMUP):
            [reference] = ray.get(server.push_pull.remote(ray.put(source)))
            np.copyto(weights, ray.get(reference))
            ends.append(time.perf_counter())
        gaps = [after - before for before, after in itertools.pairwise(ends)]
        return statistics.median(gaps[WARMUP:])


def main() -> None:
    workers, num_bytes, steps = map(int, sys.argv[1:4])
    ray.init(
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=max(1 << 30, 10 * num_bytes),
        _node_ip_address="127.0.0.1",
    )
    server = Server.remote(workers, num_bytes // 4)
    crew = [Worker.remote() for _ in range(workers)]
    times = ray.get([worker.run.remote(server, num_bytes // 4, steps) for worker in crew])
    ray.shutdown()
    print(json.dumps({"step_s": max(times)}))


if __name__ == "__main__":
    main()
