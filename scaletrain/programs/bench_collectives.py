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
from scaletrain.programs import bench_cases

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
    for collective in task["collectives"]:
        # A barrier has one size: none.
        for num_bytes in task["sizes"] if collective != "barrier" else (0,):
            for name, group in groups.items():
                case = bench_cases.CASES[collective](group, num_bytes, device)
                results.append(_measure_case(name, case, num_bytes, task["seconds"]))
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


def _measure_case(
    name: str, case: bench_cases.Case, num_bytes: int, seconds: float
) -> dict[str, Any]:
    """Check a contender's results, then time it; return the facts that the benchmark reads."""
    # The checks also open connections, and let `auto` calibrate.
    wrong = case.wrong_elements() + case.wrong_elements()
    case.rest()
    device = case.tensor.device

    def run() -> None:
        case.run()
        _finish(case.tensor)

    times = measure(run, dist.barrier, seconds, _largest)
    # As training meets it: ranks arrive apart, and the caches hold other things.
    after_s = measure(run, dist.barrier, seconds, _largest, barrier_before_each=True)
    algorithm = ""
    copy_bytes_per_s = None
    if name not in _REFERENCES:
        algorithm = _algorithm(case)
        if num_bytes:
            copy = functools.partial(_copy, case.tensor, torch.empty_like(case.tensor))
            # All ranks copy at once, as they do in a collective: they share the memory's bandwidth.
            copies = measure(copy, dist.barrier, _COPY_S, _largest)
            copy_bytes_per_s = num_bytes / sorted(copies)[len(copies) // 2]
    return {
        "contender": name,
        "collective": case.collective,
        "size_bytes": num_bytes,
        "times_s": times,
        "after_s": after_s,
        "wrong": wrong,
        "copy_bytes_per_s": copy_bytes_per_s,
        "ran": algorithm,
        "device": torch.cuda.get_device_name(device) if case.tensor.is_cuda else "cpu",
    }


def _algorithm(case: bench_cases.Case) -> str:
    """Return what our backend ran."""
    calls = calls_of(case.group)
    assert calls is not None
    if case.collective != "all_reduce":
        if not calls.runs_one_hop or case.tensor.is_cuda:
            return "torch's"
        return "messages" if case.collective == "send_recv" else "one hop"
    # Of a single size there is a single choice.
    [choice] = calls.record(case.tensor.nbytes)["chosen"].values()
    algorithm = str(choice["collective"])
    if choice["segments"] > 1:
        algorithm += f" in {choice['segments']} parts"
    return algorithm


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
    *,
    barrier_before_each: bool = False,
) -> list[float]:
    """Return the seconds of single runs (collective).

    Args:
        run: is timed.
        barrier: waits for all ranks.
        seconds: as many runs as fit into it, 3 to 400, the same number on every rank.
        largest: returns the largest of all ranks' values.
        barrier_before_each: the ranks wait for one another before each run, which is not timed.
    """
    barrier()
    began = time.perf_counter()
    run()
    # All ranks must agree on the number of runs, or some would wait for ever. It follows from the
    # slowest rank's first run.
    first_s = largest(time.perf_counter() - began)
    times = []
    barrier()
    for _ in range(max(3, min(400, int(seconds / first_s)))):
        if barrier_before_each:
            barrier()
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return times


if __name__ == "__main__":
    main(Path(sys.argv[1]))
