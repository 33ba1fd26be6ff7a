"""One rank of ``python -m benchmarks.lab overhead``: our step beside a bare DDP loop, in turns.

Both train the same model on the same batches in the same process. After each block of our steps the
same number of bare steps runs, so that a machine whose speed drifts slows both alike. What computes
in our step (clipping, half precision) the bare loop does, too; it keeps no records, checks nothing
and writes no checkpoints.

Usage: ``scaletrain launch -n WORKERS -- benchmarks/suites/overhead_rank.py CONFIG OUT``
"""

import json
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from scaletrain import World
from scaletrain import config as configuration
from scaletrain.engine import rendezvous
from scaletrain.run import progress
from scaletrain.run.records import StepRecord
from scaletrain.timeouts import Timeouts
from scaletrain.training import workload
from scaletrain.training.exchange import Setup
from scaletrain.training.precision import Precision
from scaletrain.training.stopping import StopTogether
from scaletrain.training.trainer import Trainer

BLOCK = 20  # steps of one kind in a row
WARMUP = 2  # blocks left out


class Bare:
    """The loop that a person writes: shuffled indices, forward, backward, step."""

    def __init__(self, parts: workload.Supervised, run: configuration.RunConfig, world: World):
        self._autocast = Precision(run.precision, torch.device("cpu"), []).autocast
        self._norm = None
        for callback in run.callbacks:
            if callback.name == "clip":
                self._norm = callback.options["norm"]
        self._model = DistributedDataParallel(parts.model, gradient_as_bucket_view=True)
        self._optimizer = parts.optimizer
        self._train = parts.data.train
        self._batch = run.batch_size // world.size
        self._random = torch.Generator().manual_seed(world.rank)
        self._order = torch.empty(0, dtype=torch.int64)

    def step(self) -> float:
        """Train on the next batch, and return its loss."""
        if len(self._order) < self._batch:
            self._order = torch.randperm(len(self._train), generator=self._random)  # type: ignore[arg-type]
        indices, self._order = self._order[: self._batch], self._order[self._batch :]
        inputs, targets = self._train[indices]
        self._optimizer.zero_grad()
        with self._autocast():
            outputs = self._model(inputs)
        loss = nn.functional.cross_entropy(outputs.float(), targets)
        loss.backward()
        if self._norm is not None:
            nn.utils.clip_grad_norm_(self._model.parameters(), self._norm)
        self._optimizer.step()
        return loss.item()


def main(config: Path, out: Path) -> None:
    """Run both in turns; every rank writes ``OUT/<rank>.json``: seconds a step of each block."""
    run = configuration.load(config)
    torch.set_num_threads(1)
    world = World.from_env()
    out.mkdir(parents=True, exist_ok=True)
    timeouts = Timeouts()
    store = rendezvous.join(world, out, timeouts.join)
    world = rendezvous.place(world, store)
    setup = Setup(store, torch.device("cpu"), timeouts, out / f"run-{world.size}-{config.stem}")
    setup.run_dir.mkdir(exist_ok=True)
    exchange = run.load("exchange")(world, setup, **run.exchange.options)
    trainer = Trainer(
        run, world, workload.build(run, setup.device), exchange, setup.device, setup.run_dir
    )
    parts = workload.build(run, setup.device)
    assert isinstance(parts, workload.Supervised)
    bare = Bare(parts, run, world)
    ours: list[float] = []
    theirs: list[float] = []
    began = time.perf_counter()

    def on_step(record: StepRecord) -> None:
        nonlocal began
        progress.step(record.step + 1)
        if (record.step + 1) % BLOCK:
            return
        # From the end of the last bare block to here: everything that our loop does in 20 steps.
        middle = time.perf_counter()
        ours.append((middle - began) / BLOCK)
        for _ in range(BLOCK):
            bare.step()
        began = time.perf_counter()
        theirs.append((began - middle) / BLOCK)

    trainer.fit(on_step, StopTogether(store, run.log_every))
    exchange.close()
    measured = {"ours_s": ours[WARMUP:], "bare_s": theirs[WARMUP:]}
    (out / f"{world.rank}.json").write_text(json.dumps(measured), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
