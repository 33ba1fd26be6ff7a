"""One rank of ``scaletrain bench collectives``.

It reads FOLDER/task.json, measures every contender, and writes FOLDER/<rank>.json.
"""

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

programs.begin(__name__)  # before torch is imported

import torch
import torch.distributed as dist

from scaletrain.config.grammar import split_spec
from scaletrain.engine import backend
from scaletrain.engine.backend import calls_of
from scaletrain.engine.choice import Options
from scaletrain.host import cores

_TIMEOUT = timedelta(seconds=300)
_REFERENCES = ("gloo", "nccl")  # torch's own backends; the other contenders are ours
_COPY_S = 0.05  # for measuring how fast this rank copies


def main(folder: Path) -> None:
    """Measure all contenders at all sizes. Every rank runs it."""
    backend.register()
    programs.done()
    task = json.loads(folder.joinpath("task.json").read_text(encoding="utf-8"))
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    usable = cores.usable()
    if task["bind"] and len(usable) >= size:
        # Before any thread is started: threads inherit it.
        os.sched_setaffinity(0, {usable[rank]})
    # A file, since all ranks see the folder: also those on emulated hosts, which share the files.
    store = dist.FileStore(str(folder / "store"), size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    device = _device(task, rank, size)
    # Collective: all ranks make the groups in the order of the task.
    groups = {name: _group(name) for name in task["contenders"]}
    results = []
    # Contenders at one size run right after one another, so that a slow minute hits all alike.
    for num_bytes in task["sizes"]:
        for name, group in groups.items():
            tensor = torch.empty(max(1, num_bytes // 4), device=device)
            results.append(_measure_contender(name, group, tensor, num_bytes, task["seconds"]))
    folder.joinpath(f"{rank}.json").write_text(json.dumps(results), encoding="utf-8")
    # A rank that left early would close connections that others still use.
    dist.barrier()
    dist.destroy_process_group()


def _device(task: dict[str, Any], rank: int, size: int) -> torch.device:
    if task["device"] != "cuda":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    device = torch.device("cuda", rank % max(1, count))
    torch.cuda.set_device(device)
    if "nccl" in task["contenders"] and count < size:
        raise RuntimeError(
            f"NCCL refuses workers that share a GPU, and there is not one for each of {size}"
        )
    return device


def _group(contender: str) -> Any:
    """Return the process group of a contender: a backend, or ``WIRE:COLLECTIVE`` of ours."""
    if contender in _REFERENCES:
        return dist.new_group(backend=contender, timeout=_TIMEOUT)
    spec = split_spec(contender)
    options = Options(collective=spec.rest, transport=spec.name)
    return dist.new_group(backend="scaletrain", timeout=_TIMEOUT, pg_options=options)


def _measure_contender(
    name: str, group: Any, tensor: torch.Tensor, num_bytes: int, seconds: float
) -> dict[str, Any]:
    """Check a contender's sums, then time it; return the facts that the benchmark reads."""

    def allreduce() -> None:
        dist.all_reduce(tensor, group=group)
        _finish(tensor)

    # The checks also open connections, and let `auto` calibrate.
    wrong = _wrong_elements(tensor, allreduce) + _wrong_elements(tensor, allreduce)
    # Each allreduce sums into the tensor. Zeros stay zeros; other values would overflow.
    tensor.zero_()
    times = measure(allreduce, dist.barrier, seconds, _largest)
    algorithm = ""
    copy_bytes_per_s = None
    if name not in _REFERENCES:
        # Of a single size there is a single choice.
        calls = calls_of(group)
        assert calls is not None
        [choice] = calls.record(tensor.nbytes)["chosen"].values()
        algorithm = choice["collective"]
        if choice["segments"] > 1:
            algorithm += f" in {choice['segments']} parts"
        copy = functools.partial(_copy, tensor, torch.empty_like(tensor))
        # All ranks copy at once, as they do in an allreduce: they share the memory's bandwidth.
        copies = measure(copy, dist.barrier, _COPY_S, _largest)
        copy_bytes_per_s = num_bytes / sorted(copies)[len(copies) // 2]
    return {
        "contender": name,
        "size_bytes": num_bytes,
        "times_s": times,
        "wrong": wrong,
        "copy_bytes_per_s": copy_bytes_per_s,
        "ran": algorithm,
        "device": torch.cuda.get_device_name(tensor.device) if tensor.is_cuda else "cpu",
    }


def _wrong_elements(tensor: torch.Tensor, allreduce: Callable[[], None]) -> int:
    """Sum values that differ between the ranks, and return how many elements came out wrong."""
    rank, size = dist.get_rank(), dist.get_world_size()
    # 251 is prime: chunks whose lengths are powers of two begin with different values, so one that
    # lands in a wrong place shows. The sums are small enough to be exact in float32.
    pattern = torch.arange(tensor.numel()) % 251
    tensor.copy_((pattern + rank).float())
    allreduce()
    expected = size * pattern + size * (size - 1) // 2
    return int((tensor.cpu() != expected).sum())


def _copy(target: torch.Tensor, source: torch.Tensor) -> None:
    target.copy_(source)
    _finish(target)


def _finish(tensor: torch.Tensor) -> None:
    """Wait until the device has made a tensor."""
    if tensor.is_cuda:
        torch.cuda.synchronize()


def _largest(seconds: float) -> float:
    """Return the largest of all ranks' values (collective)."""
    value = torch.tensor([seconds], dtype=torch.float64)
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return value.item()


def measure(
    run: Callable[[], Any],
    barrier: Callable[[], Any],
    seconds: float,
    largest: Callable[[float], float],
) -> list[float]:
    """Return the seconds of single runs (collective).

    Args:
        run: is timed.
        barrier: waits for all ranks.
        seconds: as many runs as fit into it, 3 to 400, the same number on every rank.
        largest: returns the largest of all ranks' values.
    """
    barrier()
    began = time.perf_counter()
    run()
    # All ranks must agree on the number of runs, or some would wait for ever. It follows from the
    # slowest rank's first run.
    first_s = largest(time.perf_counter() - began)
    times = []
    barrier()
    # No barrier between runs: in training, exchanges follow one another as well.
    for _ in range(max(3, min(400, int(seconds / first_s)))):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return times


if __name__ == "__main__":
    main(Path(sys.argv[1]))
