"""Tests of training/randomness.py and training/batches.py in whole runs, by their effects.

A run with dropout and random augmentation is the same run however its samples are read and
however often it is interrupted. Bugs it catches: equal masks on all ranks, augmentation that
depends on loader processes or workers, a random stream that begins again after a resume.
"""

import multiprocessing
import os
import random
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset

from scaletrain import config
from scaletrain.run.records import StepRecord
from scaletrain.training.exchange import Setup
from scaletrain.training.randomness import seed_generators
from scaletrain.training.trainer import Trainer
from scaletrain.training.workload import Data, Supervised
from scaletrain.world import World
from tests.ranks import run_ranks

# Only seed, batch and steps matter: the workload below takes the place of what is named. Five
# steps an epoch, so that loader processes read ahead across its end.
JOB = {
    "model": "mlp",
    "data": "digits",
    "batch_size": 8,
    "steps": 12,
    "checkpoint": {"every_steps": 2},
}
SAMPLES = 40

pytestmark = pytest.mark.slow


class Augmented(Dataset):
    """Samples with noise from each of the three global generators."""

    def __init__(self, length: int):
        self._length = length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        noise = [torch.randn(()).item(), random.gauss(0, 1), np.random.randn()]
        return torch.tensor([index / SAMPLES, *noise]), torch.tensor([float(index % 3)])


class Network(nn.Module):
    """A network with dropout that keeps what it saw and which masks it drew."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 64)
        self.dropout = nn.Dropout(0.5)
        self.last = nn.Linear(64, 1)
        self.seen: list[np.ndarray] = []
        self.masks: list[np.ndarray] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        mask = self.dropout(torch.ones(len(inputs), 64))
        if self.training:
            self.seen.append(inputs.numpy().copy())
            self.masks.append(mask.numpy().copy())
        return self.last(torch.relu(self.first(inputs)) * mask)


class Run(NamedTuple):
    """What one rank saw and learned."""

    weights: np.ndarray
    test_loss: float
    seen: list[np.ndarray]  # of each forward pass: (samples, 4)
    masks: list[np.ndarray]  # of each forward pass: (samples, 64)


def train(
    rank: int,
    size: int,
    run_dir: Path,
    options: dict[str, Any],
    resume: bool = False,
    killed_at: int | None = None,
) -> Run:
    # A daemon may not start loader processes. They end by themselves when their parent is gone.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    # As in a worker's process. A rank of ``run_ranks`` has "forkserver", whose server would load
    # torch once more for every rank, and outlive a rank that is killed.
    multiprocessing.set_start_method("fork", force=True)
    seed_generators(100 * resume + rank)  # what was drawn before must not matter
    run = config.check(JOB | {"workers": size, "exchange": "native"} | options)
    world = World(rank, size, rank, size)
    store = dist.FileStore(str(run_dir / f"store-{resume}"), size)
    setup = Setup(store, torch.device("cpu"), timedelta(seconds=20), run_dir)
    exchange = run.load("exchange")(world, setup, **run.exchange.options)
    torch.manual_seed(0)
    model = Network()
    data = Data(Augmented(SAMPLES), Augmented(10))
    workload = Supervised(model, nn.functional.mse_loss, data)
    workload.optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    trainer = Trainer(run, world, workload, exchange, setup.device, run_dir, resume)

    def on_step(record: StepRecord) -> None:
        if record.step == killed_at:
            os.kill(os.getpid(), signal.SIGKILL)

    summary = trainer.fit(on_step, lambda step: False)
    exchange.close()
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return Run(weights.numpy(), summary["test_loss"], model.seen, model.masks)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Run]]:
    """The ranks of a run without loader processes, by the number of workers."""
    runs = {}
    for size in (1, 2):
        runs[size] = run_ranks(train, size, tmp_path_factory.mktemp(f"{size}-workers"), {})
    return runs


def samples_of(ranks: list[Run]) -> set[bytes]:
    """What all ranks saw, bit by bit, sample by sample."""
    seen = set()
    for rank in ranks:
        for batch in rank.seen:
            seen |= {row.tobytes() for row in batch}
    return seen


def test_ranks_draw_masks_of_their_own(undisturbed: dict[int, list[Run]]):
    first, second = undisturbed[2]
    assert len(first.masks) == len(second.masks) == 12
    drawn = {mask.tobytes() for mask in first.masks + second.masks}
    assert len(drawn) == 24, "no two steps or ranks share a mask"
    agree = np.mean(np.concatenate(first.masks) == np.concatenate(second.masks))
    assert 0.44 < agree < 0.56


def test_augmentations_differ_by_sample_and_epoch(undisturbed: dict[int, list[Run]]):
    for ranks in undisturbed.values():
        rows = np.concatenate([batch for rank in ranks for batch in rank.seen])
        assert rows.shape == (12 * 8, 4)
        for noise in rows[:, 1:].T:
            assert len(np.unique(noise)) == 12 * 8


def test_augmentation_does_not_depend_on_the_number_of_workers(undisturbed: dict[int, list[Run]]):
    assert samples_of(undisturbed[1]) == samples_of(undisturbed[2])


@pytest.mark.parametrize("loaders", [1, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_loader_processes_change_no_bit(
    size: int, loaders: int, undisturbed: dict[int, list[Run]], tmp_path: Path
):
    runs = run_ranks(train, size, tmp_path, {"loader_workers": loaders})
    for run, alone in zip(runs, undisturbed[size], strict=True):
        assert run.weights.tobytes() == alone.weights.tobytes()
        assert run.test_loss == alone.test_loss


@pytest.mark.parametrize("loaders", [0, 2])
@pytest.mark.parametrize("size", [1, 2])
def test_a_killed_and_resumed_run_is_the_undisturbed_one_bit_by_bit(
    size: int, loaders: int, undisturbed: dict[int, list[Run]], tmp_path: Path
):
    # Killed in the second epoch after six steps; the newest checkpoint has four or six.
    options = {"loader_workers": loaders}
    with pytest.raises(AssertionError, match=r"died|raised"):
        run_ranks(train, size, tmp_path, options, False, 6)
    runs = run_ranks(train, size, tmp_path, options, True)
    for run, alone in zip(runs, undisturbed[size], strict=True):
        assert 0 < len(run.masks) < 12, "it went on from a checkpoint"
        assert run.weights.tobytes() == alone.weights.tobytes()
        assert run.test_loss == alone.test_loss


def test_another_seed_is_another_run(undisturbed: dict[int, list[Run]], tmp_path: Path):
    # The weights begin the same, so the order, masks and augmentations make the difference.
    other = run_ranks(train, 1, tmp_path, {"seed": 2**70})
    assert samples_of(other).isdisjoint(samples_of(undisturbed[1]))
    assert other[0].weights.tobytes() != undisturbed[1][0].weights.tobytes()
