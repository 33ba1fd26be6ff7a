"""A small job with parameter servers, and faults at random moments of its life.

Servers and workers are forked from this process, which has loaded torch and not used it: a process
starts in milliseconds, so that hundreds of faults are affordable.
"""

import contextlib
import gc
import mmap
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch._dynamo  # torch's optimizers import it: once here, instead of in every process
import torch.distributed as dist
from torch import nn

from scaletrain.host.processes import die_with_parent
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.worker.exchange import ParameterServerExchange
from scaletrain.programs import parameter_server
from scaletrain.world import World

KINDS = ("server killed", "server told to end", "server stopped", "worker killed", "worker stopped")
TIMEOUT_S = 10.0  # of the job
RECOVERY_S = 40.0  # a fault is survived if all workers have gone on within this time
_MEETING_STEPS = 10  # between two sums of all workers
_STEPS_MORE = 3  # that all workers do after a fault
_LAST_STEPS = 12  # that they do after the last one; more than synchronous workers are apart
_ROUND_STEPS = 4  # of local steps; a job in one of the local modes must have these
_LONGEST_PAUSE_S = 0.15  # between a recovery and the next fault
_LONGEST_START_S = 0.6  # from the start to the first fault
_LONGEST_STOP_S = 0.4  # from SIGSTOP to SIGCONT
_NEVER = 1 << 40


class Survived(NamedTuple):
    """A fault, and what became of the job."""

    kind: str
    recovery_s: float
    trouble: str  # empty: the job went on


def run(
    settings: Settings,
    run_dir: Path,
    num_faults: int,
    kinds: tuple[str, ...],
    seed: int,
    norm: float | None = None,
) -> list[Survived]:
    """Run one job, and do it ``num_faults`` faults; return those that were done.

    Every fault hits a moment drawn at random: the first one within the job's start.

    Args:
        settings: of the job.
        run_dir: of the job; empty.
        num_faults: how many, one after the other. A job that does not survive one ends with it.
        kinds: of ``KINDS``, drawn from.
        seed: of what is drawn.
        norm: to which the servers clip gradients; None: any.
    """
    draw = random.Random(seed)
    faults: list[Survived] = []
    with _started(settings, run_dir, norm) as crew:
        for number in range(num_faults):
            longest_s = _LONGEST_PAUSE_S if number else _LONGEST_START_S
            time.sleep(draw.uniform(0.0, longest_s))
            kind = draw.choice(kinds)
            began = time.monotonic()
            crew.fault(kind, draw)
            trouble = crew.wait_for(crew.furthest() + _STEPS_MORE)
            faults.append(Survived(kind, time.monotonic() - began, trouble))
            if trouble:
                return faults
        trouble = crew.finish()
        if trouble:
            faults[-1] = faults[-1]._replace(trouble=f"at the end: {trouble}")
    return faults


class _Board:
    """Numbers that all processes of a job see.

    Each worker writes its own steps and, at its end, its result. This process writes the last step.
    """

    def __init__(self, workers: int):
        self._memory = mmap.mmap(-1, 8 * (1 + 2 * workers))
        numbers = np.frombuffer(self._memory, np.int64)
        self.steps = numbers[1 : 1 + workers]
        self.digests = numbers[1 + workers :].view(np.float64)
        self._last = numbers[:1]
        self.last_step = _NEVER

    @property
    def last_step(self) -> int:
        """The step after which all workers end."""
        return int(self._last[0])

    @last_step.setter
    def last_step(self, step: int) -> None:
        self._last[0] = step


class _Crew:
    """The processes of one job. Worker r is process r; server k is process workers + k."""

    def __init__(self, settings: Settings, run_dir: Path, norm: float | None):
        self._settings = settings
        self._run_dir = run_dir
        self._norm = norm
        self._board = _Board(settings.workers)
        self._pids: dict[int, int] = {}  # of the processes that run
        self._number_of_log = 0
        for number in range(settings.workers + settings.servers):
            self._start(number)

    def fault(self, kind: str, draw: random.Random) -> None:
        """Do one fault to a server or a worker that is drawn."""
        workers = self._settings.workers
        if kind.startswith("server"):
            number = workers + draw.randrange(self._settings.servers)
        else:
            number = draw.randrange(workers)
        pid = self._pids[number]
        if kind.endswith("stopped"):
            os.kill(pid, signal.SIGSTOP)
            time.sleep(draw.uniform(0.0, _LONGEST_STOP_S))
            os.kill(pid, signal.SIGCONT)
            return
        os.kill(pid, signal.SIGTERM if kind.endswith("end") else signal.SIGKILL)
        os.waitpid(pid, 0)
        del self._pids[number]
        if kind.startswith("worker"):
            # The others may notice before somebody comes in its place, or after.
            time.sleep(draw.uniform(0.0, _LONGEST_PAUSE_S))
            self._board.steps[number] = 0
        self._start(number)

    def furthest(self) -> int:
        """Return the steps of the fastest worker."""
        return int(self._board.steps.max())

    def wait_for(self, step: int) -> str:
        """Wait until all workers have done so many steps; return the trouble, if there is any."""
        deadline = time.monotonic() + RECOVERY_S
        while self._board.steps.min() < step:
            ended = self._ended()
            if ended:
                return ended
            if time.monotonic() > deadline:
                steps = ", ".join(str(count) for count in self._board.steps)
                return f"no progress for {RECOVERY_S:.0f} s (steps: {steps})"
            time.sleep(0.005)
        return ""

    def finish(self) -> str:
        """Let all workers end, and compare their results; return the trouble, if there is any."""
        last_step = self.furthest() + _LAST_STEPS
        # In the local modes, weights are equal at the end of a round.
        self._board.last_step = -(-last_step // _ROUND_STEPS) * _ROUND_STEPS
        deadline = time.monotonic() + RECOVERY_S
        waiting = set(range(self._settings.workers))
        while waiting:
            for rank in sorted(waiting):
                pid, status = os.waitpid(self._pids[rank], os.WNOHANG)
                if pid:
                    waiting.discard(rank)
                    del self._pids[rank]
                    if status:
                        return self._last_words(rank)
            if time.monotonic() > deadline:
                ranks = ", ".join(str(rank) for rank in sorted(waiting))
                return f"ranks {ranks} do not end within {RECOVERY_S:.0f} s"
            time.sleep(0.005)
        digests = self._board.digests
        if not np.isfinite(digests).all():
            return "weights are not finite"
        if not self._settings.is_asynchronous and (digests != digests[0]).any():
            return "the workers' weights differ"
        return ""

    def end(self) -> None:
        """Kill everything that still runs."""
        for pid in self._pids.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)

    def _start(self, number: int) -> None:
        workers = self._settings.workers
        if number < workers:
            self._fork(
                number,
                lambda: _work(self._settings, self._run_dir, number, self._board, self._norm),
            )
        else:
            index = number - workers
            self._fork(number, lambda: parameter_server.main(self._run_dir, index, self._settings))

    def _fork(self, number: int, body: Callable[[], None]) -> None:
        pid = os.fork()
        if pid:
            self._pids[number] = pid
            return
        status = 1
        gc.freeze()  # all that this process has loaded is no garbage
        try:
            die_with_parent(signal.SIGKILL)
            log = os.open(self._log(number), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            os.dup2(log, 1)
            os.dup2(log, 2)
            torch.set_num_threads(1)
            body()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _log(self, number: int) -> Path:
        return self._run_dir / f"log-{number}"

    def _ended(self) -> str:
        """Return the last words of a process that has ended by itself; empty if none has."""
        for number, known in list(self._pids.items()):
            pid, _ = os.waitpid(known, os.WNOHANG)
            if pid:
                del self._pids[number]
                return self._last_words(number)
        return ""

    def _last_words(self, number: int) -> str:
        workers = self._settings.workers
        name = f"worker {number}" if number < workers else f"server {number - workers}"
        lines = self._log(number).read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{name} ended: {lines[-1] if lines else 'without a word'}"


@contextlib.contextmanager
def _started(settings: Settings, run_dir: Path, norm: float | None) -> Iterator[_Crew]:
    crew = _Crew(settings, run_dir, norm)
    try:
        yield crew
    finally:
        crew.end()


def _work(settings: Settings, run_dir: Path, rank: int, board: _Board, norm: float | None) -> None:
    """Train as one worker until the board's last step, and meet the others as a trainer does."""
    net = _model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    store = dist.FileStore(str(run_dir / "store"), settings.workers)
    world = World(rank, settings.workers, rank, settings.workers, launcher="local")
    exchange = ParameterServerExchange(settings, world, run_dir, store)
    exchange.attach(net, optimizer)
    if norm is not None:
        exchange.clip(norm)
    step = exchange.skip(_NEVER)
    owes_meeting = exchange.owes_meeting()
    while step < board.last_step:
        next_meeting = (step // _MEETING_STEPS + 1) * _MEETING_STEPS
        skipped = exchange.skip(next_meeting - step)
        if skipped:
            step += skipped
        elif not owes_meeting:
            optimizer.zero_grad()
            _loss(net, step, rank).backward()
            exchange.step()
            step += 1
        owes_meeting = False
        if step % _MEETING_STEPS == 0:
            exchange.sum(torch.ones(2))
        board.steps[rank] = step
    exchange.sum(torch.ones(1))
    weights = [parameter.detach().double().sum() for parameter in net.parameters()]
    board.digests[rank] = torch.stack(weights).sum().item()
    exchange.close()


def _model() -> nn.Module:
    torch.manual_seed(7)
    return nn.Sequential(nn.Linear(12, 40), nn.BatchNorm1d(40), nn.Tanh(), nn.Linear(40, 4))


def _loss(net: nn.Module, step: int, rank: int) -> torch.Tensor:
    """Return the loss of a batch that only this rank has in this step."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    inputs = torch.randn(8, 12, generator=generator) * (1 + rank)
    return (net(inputs) - inputs[:, :4].sin()).square().mean()
