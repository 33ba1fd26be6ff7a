"""Run a function as N ranks in processes, with a hard timeout: ``results = run_ranks(function, 3,
argument)``; or a program of ours.

Processes are forked from a server that has torch loaded but has never used it, so they start in
milliseconds.
"""

import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    [
        "torch",
        "torch.distributed",
        "scaletrain.training.trainer",
        "torch._dynamo",
        "sklearn.datasets",
        "pytest",
    ]
)


def run_ranks(
    function: Callable[..., Any], size: int, *arguments: Any, timeout_s: float = 60.0
) -> list[Any]:
    """``[function(rank, size, *arguments) for each rank]``, run at the same time. ``function`` is
    defined at a module's top.

    Raises:
        AssertionError: a rank raised (its traceback is in the message), died, or was not done in
        time. No rank lives on.
    """
    pipes, processes = [], []
    for rank in range(size):
        mine, theirs = _context.Pipe(duplex=False)
        process = _context.Process(
            target=_rank, args=(theirs, function, rank, size, arguments), daemon=True
        )
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
            assert ready, (
                f"ranks {[r for r in range(size) if r not in results]} were not done within {timeout_s} s"
            )
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


class Program:
    """``python -m MODULE ARGUMENTS`` as ``subprocess.Popen`` would start it.

    Args:
        piped: what it writes on both streams can be read from ``output``, and has to be: the pipe
        fills up. Else it is shown.
    """

    def __init__(self, module: str, *arguments: str, piped: bool = False):
        reader, writer = _context.Pipe(duplex=False) if piped else (None, None)
        self._process = _context.Process(target=_program, args=(writer, module, arguments))
        self._process.start()
        self.pid = self._process.pid
        if reader and writer:
            writer.close()
            self.output = open(os.dup(reader.fileno()), encoding="utf-8", errors="replace")  # noqa: SIM115
            reader.close()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout_s: float | None = None) -> int:
        self._process.join(timeout_s)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout_s or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _program(output: Any, module: str, arguments: tuple[str, ...]) -> None:
    _begin()
    if output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
        output.close()
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _rank(pipe: Any, function: Callable[..., Any], rank: int, size: int, arguments: tuple) -> None:
    _begin()
    try:
        pipe.send((True, function(rank, size, *arguments)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))


def _begin() -> None:
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # what the server has loaded is no garbage
