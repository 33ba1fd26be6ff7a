"""Tests of whole runs, by their effects: order, randomness, checkpoints and exchange together.

A run with dropout, random augmentation, Adam, a schedule, averaged weights and bf16 is the same run
bit by bit however its samples are read and however often it is killed. Bugs it catches: equal masks
on all ranks, augmentation that depends on loader processes or workers, a random stream, a moment of
the optimizer or an average that begins again, gradients that a resumed run adds in another order.
"""

import multiprocessing
import os
import random
import signal
import threading
import time
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
from scaletrain.timeouts import Timeouts
from scaletrain.training import tensor_file
from scaletrain.training.checkpoint_writer import CheckpointWriter
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
    "batch_size": 12,
    "steps": 12,
    "optimizer": {"name": "adam", "lr": 0.01},
    "lr_schedule": {"name": "cosine", "warmup_steps": 4},
    "precision": "bf16",
    "callbacks": [{"name": "ema", "decay": 0.8}],
    "evaluate_every": 5,
    "checkpoint": {"every_steps": 2},
    # Several buckets: three ranks add an element in an order that depends on its place in one.
    "exchange": {"name": "native", "bucket_mb": 0.0005},
}
SAMPLES = 60

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
        self.middle = nn.Linear(64, 64)
        self.last = nn.Linear(64, 1)
        self.seen: list[np.ndarray] = []
        self.masks: list[np.ndarray] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        mask = self.dropout(torch.ones(len(inputs), 64))
        if self.training:
            self.seen.append(inputs.numpy().copy())
            self.masks.append(mask.numpy().copy())
        return self.last(self.middle(torch.relu(self.first(inputs)) * mask))


class Run(NamedTuple):
    """What one rank saw and learned."""

    weights: np.ndarray
    test_loss: float
    seen: list[np.ndarray]  # of each forward pass: (samples, 4)
    masks: list[np.ndarray]  # of each forward pass: (samples, 64)


class Kill(NamedTuple):
    """When a run is killed."""

    step: int  # in the next moment after this step
    in_write: bool = False  # while the next checkpoint is being written


def train(
    rank: int,
    size: int,
    run_dir: Path,
    options: dict[str, Any],
    part: int = 0,
    kill: Kill | None = None,
) -> Run:
    """Train; the part after ``part`` kills."""
    # A daemon may not start loader processes. They end by themselves when their parent is gone.
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    # As in a worker's process. A rank of ``run_ranks`` has "forkserver", whose server would load
    # torch once more for every rank, and outlive a rank that is killed.
    multiprocessing.set_start_method("fork", force=True)
    # No checkpoint is put off.
    is_writing = CheckpointWriter.is_writing
    CheckpointWriter.is_writing = lambda self, patience_s=0.0: is_writing(self, 30.0)  # type: ignore[method-assign]
    if kill and kill.in_write:
        kill_in_write(kill.step)
    seed_generators(100 * part + rank)  # what was drawn before must not matter
    run = config.check(JOB | {"workers": size} | options)
    world = World(rank, size, rank, size)
    store = dist.FileStore(str(run_dir / f"store-{part}"), size)
    setup = Setup(store, torch.device("cpu"), Timeouts(20.0), run_dir)
    exchange = run.load("exchange")(world, setup, **run.exchange.options)
    torch.manual_seed(0)
    model = Network()
    data = Data(Augmented(SAMPLES), Augmented(10))
    workload = Supervised(model, nn.functional.mse_loss, data)
    workload.optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    trainer = Trainer(run, world, workload, exchange, setup.device, run_dir, part > 0)

    def on_step(record: StepRecord) -> None:
        if kill and not kill.in_write and record.step == kill.step:
            threading.Thread(target=kill_soon, daemon=True).start()

    summary = trainer.fit(on_step, lambda step: False)
    if kill:
        time.sleep(10)
    exchange.close()
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    return Run(weights.numpy(), summary["test_loss"], model.seen, model.masks)


def kill_soon() -> None:
    time.sleep(random.SystemRandom().uniform(0, 0.005))
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_write(step: int) -> None:
    """Let the first checkpoint after a step be cut off by a kill."""
    write = tensor_file.write

    def cut_off(path: Path, kind: str, content: tensor_file.Content) -> None:
        write(path, kind, content)
        if content.state["step"] > step:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    tensor_file.write = cut_off


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[Run]]:
    """The ranks of a run without loader processes, by the number of workers."""
    runs = {}
    for size in (1, 2, 3):
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
        assert rows.shape == (12 * 12, 4)
        for noise in rows[:, 1:].T:
            assert len(np.unique(noise)) == 12 * 12


def test_augmentation_does_not_depend_on_the_number_of_workers(undisturbed: dict[int, list[Run]]):
    assert samples_of(undisturbed[1]) == samples_of(undisturbed[2])


def test_loader_processes_change_no_bit(undisturbed: dict[int, list[Run]], tmp_path: Path):
    for run, alone in zip(
        run_ranks(train, 2, tmp_path, {"loader_workers": 2}), undisturbed[2], strict=True
    ):
        assert run.weights.tobytes() == alone.weights.tobytes()
        assert run.test_loss == alone.test_loss


@pytest.mark.parametrize(("size", "loaders"), [(1, 2), (2, 0), (3, 1)])
def test_a_killed_and_resumed_run_is_the_undisturbed_one_bit_by_bit(
    size: int, loaders: int, undisturbed: dict[int, list[Run]], tmp_path: Path
):
    # At some moment of the first epoch, and while a later checkpoint is being written.
    step = random.SystemRandom().randrange(2, 4)
    options = {"loader_workers": loaders}
    for part, kill in enumerate((Kill(step), Kill(step + 3, in_write=True))):
        with pytest.raises(AssertionError, match=r"died|raised"):
            run_ranks(train, size, tmp_path, options, part, kill)
    runs = run_ranks(train, size, tmp_path, options, 2)
    for run, alone in zip(runs, undisturbed[size], strict=True):
        assert 0 < len(run.masks) < 12, "it went on from a checkpoint"
        assert run.weights.tobytes() == alone.weights.tobytes(), f"killed after step {step}"
        assert run.test_loss == alone.test_loss


def test_another_seed_is_another_run(undisturbed: dict[int, list[Run]], tmp_path: Path):
    # The weights begin the same, so the order, masks and augmentations make the difference.
    other = run_ranks(train, 1, tmp_path, {"seed": 2**70})
    assert samples_of(other).isdisjoint(samples_of(undisturbed[1]))
    assert other[0].weights.tobytes() != undisturbed[1][0].weights.tobytes()
