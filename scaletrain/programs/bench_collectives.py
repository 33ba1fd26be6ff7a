"""One rank of ``scaletrain bench collectives``: reads FOLDER/task.json, measures every contender, writes FOLDER/<rank>.json."""

import functools
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
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
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
        if name in ("gloo", "nccl"):
            groups[name] = dist.new_group(backend=name, timeout=timeout)
        else:
            transport, _, collective = name.partition(":")
            options = process_group.Options(collective, transport)
            groups[name] = dist.new_group(backend="scaletrain", timeout=timeout, pg_options=options)
    results = []
    for num_bytes in task["sizes"]:
        for name, group in groups.items():
            tensor = torch.empty(max(1, num_bytes // 4), device=device)

            def allreduce(tensor: torch.Tensor = tensor, group: Any = group) -> None:
                dist.all_reduce(tensor, group=group)
                finish(tensor)

            wrong = 0
            for _ in range(2):  # also opens connections, and lets `auto` calibrate
                tensor.copy_((torch.arange(tensor.numel()) % 251 + rank).float())
                allreduce()
                expected = size * (torch.arange(tensor.numel()) % 251) + size * (size - 1) // 2
                wrong += int((tensor.cpu() != expected).sum())
            tensor.zero_()
            times = measure(allreduce, dist.barrier, task["seconds"], _agree(size))
            copy, ran = None, ""
            if name not in ("gloo", "nccl"):
                [choice] = group.record(tensor.nbytes)["chosen"].values()
                ran = choice["collective"] + (
                    f" in {choice['segments']} parts" if choice["segments"] > 1 else ""
                )
                source = torch.empty_like(tensor)
                copy_once = functools.partial(_copy, tensor, source)
                copies = measure(copy_once, dist.barrier, 0.05, _agree(size))
                copy = num_bytes / sorted(copies)[len(copies) // 2]
            result = {"contender": name, "size_bytes": num_bytes, "times_s": times, "wrong": wrong}
            kind = torch.cuda.get_device_name(device) if tensor.is_cuda else "cpu"
            results.append({**result, "copy_bytes_per_s": copy, "ran": ran, "device": kind})
    folder.joinpath(f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def _copy(target: Any, source: Any) -> None:
    target.copy_(source)
    finish(target)


def finish(tensor: Any) -> None:
    """Wait until the device has made it."""
    import torch

    if tensor.is_cuda:
        torch.cuda.synchronize()


def _agree(size: int) -> Callable[[float], float]:
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
    """Times of single runs, as many as fit (3 to 400) into ``seconds``, the same number on every rank (collective)."""
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
