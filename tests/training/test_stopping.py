"""Tests of training/stopping.py: all ranks stop or save before the same step, and soon.

Time is made up: ranks take steps together, as synchronous training does, with a clock each.
"""

import os
import random
import signal
from pathlib import Path

import pytest
import torch.distributed as dist

from scaletrain.host.processes import handles_signal
from scaletrain.run import progress
from scaletrain.run.layout import RunDir
from scaletrain.training import stopping
from scaletrain.training.stopping import SaveTogether, StopTogether
from scaletrain.world import World


@pytest.fixture(autouse=True)
def _handlers():
    """Give the test process its own handlers back."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


class Clock:
    """The clock of the rank whose turn it is."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


def play(
    monkeypatch: pytest.MonkeyPatch, size: int, every: int, step_s: float, chance: random.Random
) -> tuple[list[int], float]:
    """Let ranks step together; one gets a signal. Return where each stops, and how long it took."""
    clock = Clock()
    monkeypatch.setattr(stopping, "time", clock)
    store = dist.HashStore()
    ranks = [StopTogether(store, every) for _ in range(size)]
    signalled = chance.randrange(size)
    signal_at = chance.uniform(3, 6)
    done = [0] * size  # steps begun by each
    ready = [chance.uniform(0, 0.1) for _ in range(size)]  # when a rank begins its next step
    stopped: dict[int, int] = {}
    finished: dict[int, dict[int, float]] = {}  # when each rank was done with its part of a step
    last = 0.0
    while len(stopped) < size:
        waiting = [rank for rank in range(size) if rank not in stopped and ready[rank] < 1e9]
        assert waiting, f"ranks wait for one that has stopped: {stopped}, {done}"
        rank = min(waiting, key=ready.__getitem__)
        clock.now = last = ready[rank]
        if rank == signalled and clock.now >= signal_at:
            ranks[rank].signal = signal.SIGINT
        step = done[rank]
        if ranks[rank](step):
            stopped[rank] = step
            continue
        # A step ends when all ranks have taken part in it.
        done[rank] += 1
        parts = finished.setdefault(step, {})
        parts[rank] = clock.now + step_s * chance.uniform(0.5, 1.5)
        ready[rank] = 2e9
        if len(parts) == size:
            for other in range(size):
                ready[other] = max(parts.values()) + step_s * chance.uniform(0, 0.2)
    return [stopped[rank] for rank in range(size)], last - signal_at


@pytest.mark.parametrize("every", [1, 10])
def test_all_ranks_save_after_the_same_step_each_time_it_is_asked(
    monkeypatch: pytest.MonkeyPatch, every: int, tmp_path: Path
):
    """Rank 1 is a step ahead of rank 0; each of them asks once, the second time by the file."""
    clock = Clock()
    monkeypatch.setattr(stopping, "time", clock)
    store, files = dist.HashStore(), RunDir(tmp_path)
    ranks = [SaveTogether(store, every, files, rank) for rank in range(2)]
    saved: list[list[int]] = [[], []]
    for step in range(200):
        clock.now += 0.1
        if step == 33:
            ranks[1].is_asked = True
        if step == 120:
            files.save_request.touch()
        for rank in (1, 0):
            if ranks[rank](step + rank):
                saved[rank].append(step + rank)
    assert saved[0] == saved[1] and len(saved[0]) == 2
    assert 34 <= saved[0][0] <= 54 and 120 <= saved[0][1] <= 150
    assert not files.save_request.exists()


def test_asking_for_stacks_asks_for_no_checkpoint(tmp_path: Path):
    files = RunDir(tmp_path)
    with progress.reporting(tmp_path, World(0, 1, 0, 1)):
        stop = StopTogether(dist.HashStore(), 1)
        save = SaveTogether(dist.HashStore(), 1, files, 0)
        assert handles_signal(os.getpid(), progress.STACKS_SIGNAL)
        os.kill(os.getpid(), progress.STACKS_SIGNAL)
        stacks = files.stacks(0).read_text()
    assert "test_asking_for_stacks" in stacks, "the supervisor cannot see where a worker hangs"
    assert not save.is_asked and not stop.signal


@pytest.mark.parametrize("step_s", [0.001, 0.05, 0.4, 2.4, 7.0])
@pytest.mark.parametrize("every", [1, 10, 1000])
def test_all_ranks_stop_before_the_same_step_and_soon(
    monkeypatch: pytest.MonkeyPatch, every: int, step_s: float
):
    for seed in range(10):
        chance = random.Random(seed)
        steps, took_s = play(monkeypatch, chance.randint(1, 5), every, step_s, chance)
        assert len(set(steps)) == 1, (seed, steps)
        # Two looks, two seconds, and the steps under way; more only by steps that are slower.
        assert took_s < 4 + 7 * 1.7 * step_s, (seed, took_s)
