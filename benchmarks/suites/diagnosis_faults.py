"""The faults of ``python -m benchmarks.lab diagnosis``, as a data set and a callback of the job.

A fault begins after a number of steps, on one rank. Nothing of it is told to the run: the job's
detector sees what it would see of a real one.
"""

import contextlib
import gc
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from scaletrain.run.records import StepRecord
from scaletrain.training.callbacks import Callback

_SO_MAX_PACING_RATE = 47  # asm-generic/socket.h; Python's socket has no name for it
_HOGS = 4  # processes that want the same core
_HOG = "import os; os.sched_setaffinity(0, {int(os.sys.argv[1])})\nwhile True: pass"
_GARBAGE = 400_000  # containers that each collection visits
_SPIN_S = 0.006  # of processor time in every forward, so that a stolen core is missed

# Set by the callback on its rank, read by the data set: each is in the same process.
_slow_input_s = 0.0


class Samples(torch.utils.data.Dataset):
    """Random samples. Reading the first one of a step takes as long as the fault says."""

    def __init__(self, count: int):
        self._inputs = torch.randn(count, 64, generator=torch.Generator().manual_seed(0))
        self._read_at = 0.0

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        now = time.monotonic()
        if _slow_input_s and now - self._read_at > 0.01:  # not the same batch
            time.sleep(_slow_input_s)
        self._read_at = time.monotonic()
        return self._inputs[index], index % 10


def data() -> tuple[Samples, Samples]:
    """Return a training set and a test set."""
    return Samples(4096), Samples(8)


def faults(
    trainer: Any, *, kind: str = "clean", rank: int = 0, at_step: int = 0, seconds: float = 0.0
) -> "Faults":
    """Return the callback. It does nothing but on ``rank``, from ``at_step`` on."""
    return Faults(trainer, kind, rank, at_step, seconds)


class Faults(Callback):
    """Plays one fault. Those of hosts and processes are played from outside."""

    def __init__(self, trainer: Any, kind: str, rank: int, at_step: int, seconds: float):
        self._kind = kind
        self._is_mine = trainer.world.rank == rank
        self._at_step = at_step
        self._seconds = seconds
        self._is_on = False
        self._hogs: list[subprocess.Popen] = []
        self._garbage: list[list[int]] = []
        trainer.module.register_forward_pre_hook(self._before_forward)
        # The gradient of the first parameter comes last: until then, backward computes.
        first = next(trainer.module.parameters())
        first.register_hook(self._in_backward)

    def _before_forward(self, module: Any, inputs: Any) -> None:
        if self._kind == "stolen cores":
            until = time.thread_time() + _SPIN_S
            while time.thread_time() < until:
                pass
        if self._is_on and self._kind == "forward":
            time.sleep(self._seconds)
        if self._is_on and self._kind == "garbage collection":
            gc.collect()

    def _in_backward(self, gradient: Tensor) -> None:
        if self._is_on and self._kind == "backward":
            # Busy, as computation is: on a core that others want, it takes longer.
            until = time.thread_time() + self._seconds
            while time.thread_time() < until:
                pass

    def after_backward(self) -> None:
        """Slow the update down."""
        if self._is_on and self._kind == "optimizer":
            time.sleep(self._seconds)

    def after_step(self, record: StepRecord) -> None:
        """Begin once it is time."""
        if self._is_mine and not self._is_on and record.step + 1 >= self._at_step:
            self._is_on = True
            self._begin()

    def _begin(self) -> None:
        global _slow_input_s
        if self._kind == "input":
            _slow_input_s = self._seconds
        elif self._kind == "garbage collection":
            self._garbage = [[number] for number in range(_GARBAGE)]
        elif self._kind == "stolen cores":
            core = max(os.sched_getaffinity(0))
            for thread in os.listdir("/proc/self/task"):
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(int(thread), {core})
            for _ in range(_HOGS):
                hog = subprocess.Popen([sys.executable, "-S", "-c", _HOG, str(core)])
                self._hogs.append(hog)
        elif self._kind == "slow link":
            _pace_connections(int(self._seconds))

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """End what steals cores."""
        for hog in self._hogs:
            hog.kill()
            hog.wait()


def _pace_connections(bytes_per_s: int) -> None:
    """Let this process's TCP connections send no faster than that (the kernel paces them)."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as copy:
            if copy.family in (socket.AF_INET, socket.AF_INET6):
                copy.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, bytes_per_s)
