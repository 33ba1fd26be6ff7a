"""Jobs that the tests of training share, and the rank that trains one of them."""

import contextlib
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import Dataset, TensorDataset, default_collate

from scaletrain import Data, Loss, Mean, Workload, config
from scaletrain.timeouts import Timeouts
from scaletrain.training import workload
from scaletrain.training.batches import GlobalBatches
from scaletrain.training.exchange import Setup
from scaletrain.training.trainer import Trainer
from scaletrain.world import World

PAD = -100


def train_rank(
    rank: int,
    size: int,
    tree: dict[str, Any],
    run_dir: Path,
    resume: bool = False,
    stop_at: int | None = None,
) -> dict[str, Any]:
    """Train a job as one rank; return its summary, weights and records."""
    run = config.check(tree | {"workers": size})
    store = dist.FileStore(str(run_dir / f"store-{resume}-{size}"), size)
    setup = Setup(store, torch.device("cpu"), Timeouts(20.0), run_dir)
    world = World(rank, size, rank, size)
    # Closed also by a job that is refused: other tests of this process join groups of their own.
    with contextlib.closing(run.load("exchange")(world, setup, **run.exchange.options)) as exchange:
        parts = workload.build(run, setup.device, world.group_number(run.groups))
        trainer = Trainer(run, world, parts, exchange, setup.device, run_dir, resume)
        summary = trainer.fit(lambda record: None, lambda step: step == stop_at)
    state = {name: value.detach().numpy() for name, value in trainer.module.state_dict().items()}
    return {"summary": summary, "state": state, "records": trainer.records}


def train_alone(
    tree: dict[str, Any],
    loss: Callable[[nn.Module, Any], torch.Tensor] | None = None,
    before_update: Callable[[nn.Module], None] = lambda model: None,
    left_out: Collection[int] = (),
    optimizer: tuple[nn.Module, torch.optim.Optimizer] | None = None,
    before_step: Callable[[torch.optim.Optimizer, int], None] = lambda optimizer, step: None,
) -> dict[str, torch.Tensor]:
    """Train a job by a loop of torch alone, on whole global batches; return the weights.

    Args:
        tree: the job, as a run's configuration.
        loss: (model, batch) -> the mean over the batch; default: cross entropy.
        before_update: acts on the gradients.
        left_out: steps that make no update.
        optimizer: a model and its optimizer, in place of those of the configuration.
        before_step: acts on the optimizer, such as on its rates.
    """
    run = config.check(tree)
    parts = workload.build(run, torch.device("cpu"))
    if optimizer is not None:
        parts.model, parts.optimizer = optimizer
    train = parts.data.train
    batches = GlobalBatches(len(train), run.batch_size, run.seed)  # type: ignore[arg-type]
    collate = parts.data.collate or default_collate
    for step in range(run.steps or 0):
        if step in left_out:
            continue
        batch = collate([train[index] for index in batches.indices(step).tolist()])
        parts.optimizer.zero_grad()
        if loss is not None:
            mean = loss(parts.model, batch)
        else:
            inputs, targets = batch
            mean = nn.functional.cross_entropy(parts.model(inputs), targets)
        mean.backward()
        before_update(parts.model)
        before_step(parts.optimizer, step)
        parts.optimizer.step()
    return {name: value.detach() for name, value in parts.model.state_dict().items()}


class Threads:
    """Ranks that are threads, each with an exchange that sums."""

    def __init__(self, size: int):
        self._barrier = threading.Barrier(size, timeout=20)
        self._values: list[Any] = [None] * size
        self._size = size

    def exchange(self, rank: int) -> Any:
        def add(own: torch.Tensor) -> torch.Tensor:
            self._values[rank] = own
            self._barrier.wait()
            total = torch.stack(self._values).sum(0)
            self._barrier.wait()
            return total

        return SimpleNamespace(world=SimpleNamespace(rank=rank, size=self._size), sum=add)

    def run(self, function: Callable[[int, Any], Any]) -> list[Any]:
        results: list[Any] = [None] * self._size

        def work(rank: int) -> None:
            results[rank] = function(rank, self.exchange(rank))

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self._size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return results


class Sentences(Dataset):
    """Sentences of 1 to 12 words: each is (words, the next word of each), neither padded."""

    def __init__(self, samples: int, words: int = 11):
        random = torch.Generator().manual_seed(7)
        self._sentences = []
        for _ in range(samples):
            length = int(torch.randint(2, 14, (1,), generator=random))
            self._sentences.append(torch.randint(words, (length,), generator=random))

    def __len__(self) -> int:
        return len(self._sentences)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sentence = self._sentences[index]
        return {"source": sentence[:-1], "target": sentence[1:]}


def pad(samples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Collate ragged sentences into two matrices."""
    batch = {}
    for key, filler in (("source", 0), ("target", PAD)):
        rows = [sample[key] for sample in samples]
        batch[key] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)
    return batch


def token_loss(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum over the tokens that count."""
    output = model(batch["source"]).transpose(1, 2)
    return nn.functional.cross_entropy(output, batch["target"], reduction="sum")


class Tokens(Workload):
    """Next-word prediction, a mean over tokens. ``lies`` miscounts them."""

    def __init__(self, *, samples: int = 60, test_samples: int = 7, lies: bool = False):
        self.model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))
        self.data = Data(Sentences(samples), Sentences(test_samples), pad)
        self._lies = lies

    def count(self, batch: Any) -> torch.Tensor:
        return (batch["target"] != PAD).sum()

    def forward(self, batch: Any) -> Loss:
        total = token_loss(self.model, batch)
        count = self.count(batch) + self._lies
        return Loss(total, count, {"twice": 2 * total})

    def evaluate(self, batch: Any) -> dict[str, Mean]:
        figures = super().evaluate(batch)
        is_odd = (batch["target"] % 2 == 1) & (batch["target"] != PAD)
        return figures | {"odd": Mean(is_odd.sum(), self.count(batch))}


def ignoring(*, samples: int = 64, test_samples: int = 24) -> tuple[Dataset, Dataset]:
    """Classes of places: (n, 8) floats, (n, 3) targets, of which many are to be ignored."""
    random = torch.Generator().manual_seed(3)
    inputs = torch.randn(samples + test_samples, 8, generator=random)
    targets = torch.randint(4, (samples + test_samples, 3), generator=random)
    # More and more are ignored, so the ranks have very different counts.
    keep = torch.rand(targets.shape, generator=random) > torch.linspace(0, 0.9, 3)
    targets[~keep] = PAD
    train = TensorDataset(inputs[:samples], targets[:samples])
    return train, TensorDataset(inputs[samples:], targets[samples:])


class Places(nn.Module):
    """(n, 8) -> (n, 4 classes, 3 places)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 12)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.linear(inputs).view(-1, 4, 3)


def normalised(*, width: int = 6) -> nn.Module:
    """A net whose batch statistics depend on the samples that a rank sees."""
    return nn.Sequential(nn.Linear(8, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 4))


def vectors(
    *, samples: int = 64, test_samples: int = 24, bad: int | None = None
) -> tuple[Dataset, Dataset]:
    """(n, 8) floats of rising scale with 4 classes. Sample ``bad`` overflows in ``Exp``."""
    random = torch.Generator().manual_seed(5)
    inputs = torch.randn(samples + test_samples, 8, generator=random)
    inputs *= torch.linspace(0.1, 3, samples + test_samples)[:, None]
    targets = torch.randint(4, (samples + test_samples,), generator=random)
    if bad is not None:
        inputs[bad] = 1e3
    train = TensorDataset(inputs[:samples], targets[:samples])
    return train, TensorDataset(inputs[samples:], targets[samples:])


class Exp(nn.Module):
    """A layer that overflows for large inputs."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (inputs / 4).exp()


def exponential() -> nn.Module:
    """A net that begins with ``Exp``."""
    return nn.Sequential(Exp(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


class Branches(nn.Module):
    """Two branches, of which every other step uses one: the other gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(8, 4), nn.Linear(8, 4)])
        self.calls = 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        branch = self.branches[self.calls % 2]
        if self.training:
            self.calls += 1
        return branch(inputs)


class Groups(Workload):
    """Two parameter groups with rates of their own."""

    def __init__(self) -> None:
        self.model = nn.Linear(8, 4)
        self.data = Data(*vectors())
        groups = [{"params": [self.model.weight]}, {"params": [self.model.bias], "lr": 0.4}]
        self.optimizer = torch.optim.SGD(groups, lr=0.1)

    def forward(self, batch: Any) -> Loss:
        inputs, targets = batch
        output = self.model(inputs)
        return Loss(nn.functional.cross_entropy(output, targets, reduction="sum"), len(targets))
