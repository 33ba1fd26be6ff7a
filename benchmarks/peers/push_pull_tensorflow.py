"""TensorFlow's ParameterServerStrategy, for ``push_pull.py``.

python push_pull_tensorflow.py WORKERS BYTES STEPS PORT. A step of a worker adds a gradient to the
variables on the server and reads them; the coordinator gives each worker one a step.
"""

import itertools
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time

WARMUP = 2


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


def serve(cluster: dict, job: str, index: int) -> None:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    server = tf.distribute.Server(
        tf.train.ClusterSpec(cluster), job_name=job, task_index=index, protocol="grpc"
    )
    server.join()


def main() -> None:
    workers, num_bytes, steps = map(int, sys.argv[1:4])
    cluster = {
        "worker": [f"127.0.0.1:{free_port()}" for _ in range(workers)],
        "ps": [f"127.0.0.1:{free_port()}"],
    }
    context = multiprocessing.get_context("spawn")
    tasks = [("ps", 0), *(("worker", index) for index in range(workers))]
    processes = [
        context.Process(target=serve, args=(cluster, *task), daemon=True) for task in tasks
    ]
    for process in processes:
        process.start()

    import tensorflow as tf

    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
        tf.train.ClusterSpec(cluster), rpc_layer="grpc"
    )
    # One variable for each block of 8 MiB, as large models have several.
    block = 2 << 20
    numel = num_bytes // 4
    sizes = [min(block, numel - start) for start in range(0, numel, block)]
    strategy = tf.distribute.ParameterServerStrategy(resolver)
    with strategy.scope():
        variables = [tf.Variable(tf.zeros([size])) for size in sizes]
    coordinator = tf.distribute.coordinator.ClusterCoordinator(strategy)

    @tf.function
    def step():
        # Each block's gradient has a value of its own, which is known when the step runs: equal
        # tensors would travel once, and constants could be made on the server.
        value = tf.random.uniform([])
        total = tf.constant(0.0)
        for number, (variable, size) in enumerate(zip(variables, sizes, strict=True)):
            variable.assign_sub(tf.fill([size], value + number))
            total += tf.reduce_max(variable.read_value())
        return total

    ends = [time.perf_counter()]
    for _ in range(steps + WARMUP):
        for _ in range(workers):
            coordinator.schedule(step)
        coordinator.join()
        ends.append(time.perf_counter())
    gaps = [after - before for before, after in itertools.pairwise(ends)]
    print(json.dumps({"step_s": statistics.median(gaps[WARMUP:])}), flush=True)
    for process in processes:
        process.kill()
    os._exit(0)


if __name__ == "__main__":
    main()
