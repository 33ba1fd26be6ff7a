"""One rank of ``scaletrain bench collectives``.

It reads FOLDER/task.json, measures every contender, and writes FOLDER/<rank>.json.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from scaletrain import programs


def main(folder: Path) -> None:
    programs.begin(__name__)
    import torch
    import torch.distributed as dist

    from scaletrain.engine import backend, process_group

    backend.register()
    programs.done()
    task = json.loads(folder.joinpath("task.json").read_text(encoding="utf-8"))
    rank = int(os.environ["RANK"])
    size = int(os.environ["WORLD_SIZE"])
    cores = sorted(os.sched_getaffinity(0))
    if task["bind"] and len(cores) >= size:
        os.sched_setaffinity(0, {cores[rank]})  # before any thread is started: they inherit it
    timeout = timedelta(seconds=300)
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
    device = torch.device("cpu")
    if task["device"] == "cuda":
        device = torch.device("cuda", rank % max(1, torch.cuda.device_count()))
        torch.cuda.set_device(device)
        if "nccl" in task["contenders"] and torch.cuda.device_count() < size:
            raise RuntimeError(
                f"NCCL refuses workers that share a GPU, and there is not one for each of {size}"
            )
    groups: dict[str, Any] = {}
    for name in task["contenders"]:
        if name in PEERS:
            groups[name] = dist.new_group(backend=name, timeout=timeout)
        else:
            transport, _, collective = name.partition(":")
            options = process_group.Options(collective, transport)
            groups[name] = dist.new_group(backend="scaletrain", timeout=timeout, pg_options=options)
    results = []
    for num_bytes in task["sizes"]:
        for name, group in groups.items():
            tensor = torch.empty(max(1, num_bytes // 4), device=device)
            result = {"contender": name, "size_bytes": num_bytes}
            results.append(result | _measure_group(name, group, tensor, task["seconds"]))
    folder.joinpath(f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


PEERS = ("gloo", "nccl")  # backends of torch; the other contenders are ours


def _measure_group(name: str, group: Any, tensor: Any, seconds: float) -> dict[str, Any]:
    """Measure the allreduce of a tensor in one group (collective).

    Args:
        name: of the contender.
        group: its process group.
        tensor: float32, of the size to measure; overwritten.
        seconds: that the measurement may take.
    """
    import torch
    import torch.distributed as dist

    rank = dist.get_rank()
    size = dist.get_world_size()
    largest = _agree()

    def allreduce() -> None:
        dist.all_reduce(tensor, group=group)
        finish(tensor)

    wrong = 0  # elements
    for _ in range(2):  # also opens connections, and lets `auto` calibrate
        values = torch.arange(tensor.numel()) % 251
        tensor.copy_((values + rank).float())
        allreduce()
        expected = size * values + size * (size - 1) // 2
        wrong += int((tensor.cpu() != expected).sum())
    tensor.zero_()
    times = measure(allreduce, dist.barrier, seconds, largest)
    copy_bytes_per_s = None
    ran = ""
    if name not in PEERS:
        ran = _chosen(group, tensor)
        source = torch.empty_like(tensor)

        def copy() -> None:
            finish(tensor.copy_(source))

        copies = measure(copy, dist.barrier, 0.05, largest)
        copy_bytes_per_s = tensor.nbytes / sorted(copies)[len(copies) // 2]
    device = torch.cuda.get_device_name(tensor.device) if tensor.is_cuda else "cpu"
    return {
        "times_s": times,
        "wrong": wrong,
        "copy_bytes_per_s": copy_bytes_per_s,
        "ran": ran,
        "device": device,
    }


def _chosen(group: Any, tensor: Any) -> str:
    """Return the algorithm that a group of ours runs for a tensor, in words."""
    [choice] = group.record(tensor.nbytes)["chosen"].values()
    collective: str = choice["collective"]
    if choice["segments"] > 1:
        return f"{collective} in {choice['segments']} parts"
    return collective


def finish(tensor: Any) -> None:
    """Wait until the device has computed the tensor."""
    import torch

    if tensor.is_cuda:
        torch.cuda.synchronize()


def _agree() -> Callable[[float], float]:
    """Return a function that returns the largest of all ranks' values (collective)."""
    import torch
    import torch.distributed as dist

    def largest(seconds: float) -> float:
        value = torch.tensor([seconds], dtype=torch.float64)
        dist.all_reduce(value, dist.ReduceOp.MAX)
        return value.item()

    return largest


def measure(
    run: Callable[[], Any],
    barrier: Callable[[], Any],
    seconds: float,
    largest: Callable[[float], float],
) -> list[float]:
    """Return the seconds of single runs (collective).

    As many as fit into ``seconds`` are measured, 3 to 400, the same number on every rank.

    Args:
        run: what is measured.
        barrier: returns when every rank has called it.
        seconds: that all runs may take together.
        largest: returns the largest of all ranks' values.
    """
    barrier()
    began = time.perf_counter()
    run()
    once = largest(time.perf_counter() - began)
    times = []
    barrier()
    for _ in range(max(3, min(400, int(seconds / once)))):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return times


if __name__ == "__main__":
    main(Path(sys.argv[1]))
