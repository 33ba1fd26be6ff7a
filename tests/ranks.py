"""Run a function as N ranks in processes, with a hard timeout: ``results = run_ranks(function, 3, argument)``.

Processes are forked from a server that has torch loaded but has never used it, so a rank starts in milliseconds.
"""

import multiprocessing
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "torch.distributed", "scaletrain.training.trainer", "torch._dynamo", "sklearn.datasets", "pytest"]
)


def run_ranks(function: Callable[..., Any], size: int, *arguments: Any, timeout_s: float = 60.0) -> list[Any]:
    """``[function(rank, size, *arguments) for each rank]``, run at the same time. ``function`` is defined at a module's top.

    Raises:
        AssertionError: a rank raised (its traceback is in the message), died, or was not done in time. No rank lives on.
    """
    pipes, processes = [], []
    for rank in range(size):
        mine, theirs = _context.Pipe(duplex=False)
        process = _context.Process(target=_rank, args=(theirs, function, rank, size, arguments), daemon=True)
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    try:
        while len(results) < size:
            waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
            ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            assert ready, f"ranks {[r for r in range(size) if r not in results]} were not done within {timeout_s} s"
            for pipe in ready:
                rank = pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    ok, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    raise AssertionError(f"rank {rank} died") from None
                assert ok, f"rank {rank} raised\n{value}"
                results[rank] = value
    finally:
        for process in processes:
            process.join(0.5 if len(results) == size else 0)
            if process.is_alive():
                process.kill()
            process.join()
    return [results[rank] for rank in range(size)]


def _rank(pipe: Any, function: Callable[..., Any], rank: int, size: int, arguments: tuple) -> None:
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send((True, function(rank, size, *arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
