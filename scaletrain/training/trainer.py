"""The training loop. ``Trainer.step`` is one optimizer step, on one screen; ``fit`` repeats it; ``evaluate`` uses all ranks."""

import contextlib
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scaletrain.config import RunConfig, exchange_label
from scaletrain.run import progress
from scaletrain.run.records import (
    WARMUP_STEPS,
    RecordWriter,
    StepRecord,
    read_records,
    records_path,
)
from scaletrain.training import checkpoint
from scaletrain.training.batches import GlobalBatches, load
from scaletrain.training.exchange import Exchange
from scaletrain.training.learning_rate import learning_rate
from scaletrain.training.workload import Workload
from scaletrain.world import World


class Trainer:
    """One worker of a synchronous or asynchronous data-parallel job. Every rank makes one and calls the same methods.

    The gradient of a step is the mean over the global batch, however it is split: each rank's loss is weighted by its share, since
    exchanges average over ranks.
    """

    def __init__(
        self,
        config: RunConfig,
        world: World,
        workload: Workload,
        exchange: Exchange,
        device: torch.device,
        run_dir: Path,
        resume: bool = False,
    ):
        self.config, self.world, self.workload, self.exchange = config, world, workload, exchange
        self.device, self.run_dir = device, run_dir
        self.global_batch = config.batch_size * (world.size if config.batch_mode == "weak" else 1)
        self.batches = GlobalBatches(len(workload.train), self.global_batch, config.seed)  # type: ignore[arg-type]
        self.num_steps = config.steps or max(
            1, round((config.epochs or 0) * self.batches.steps_per_epoch)
        )
        self.base_lr = float(workload.optimizer.param_groups[0]["lr"])
        loaded = (
            checkpoint.load_latest(run_dir, workload.model, workload.optimizer) if resume else None
        )
        self.next_step = loaded or 0
        self.resumed = loaded is not None
        self.model = exchange.attach(workload.model, workload.optimizer)
        came_late = exchange.skip(self.num_steps - self.next_step)
        self.next_step += came_late
        self.records: list[StepRecord] = []
        self._before = _cut_records(run_dir, world.rank, self.next_step) if self.resumed else []
        self._writer = RecordWriter(run_dir, world.rank, append=self.resumed or came_late > 0)
        shares = (
            self.batches.share(i, world.rank, world.size)
            for i in range(self.next_step, self.num_steps)
        )
        self._loaded = load(workload.train, shares, config.loader_workers)

    @property
    def finished(self) -> bool:
        """Whether all steps are done; a resumed run may have been finished before."""
        return self.next_step >= self.num_steps

    def step(self) -> StepRecord:
        """One optimizer step: input, forward and backward (in ``accumulate`` parts), exchange, update."""
        began, clock = time.time(), _Clock(self.device)
        lr = learning_rate(self.config.lr_schedule, self.base_lr, self.next_step, self.num_steps)
        for group in self.workload.optimizer.param_groups:
            group["lr"] = (
                lr  # before backward: a parameter server gets gradients and rate while it runs
            )
        self.model.train()
        self.model.zero_grad()
        inputs, targets = (
            tensor.to(self.device, non_blocking=True) for tensor in next(self._loaded)
        )
        clock.lap("input")
        samples, losses = len(targets), torch.zeros((), device=self.device)
        parts = list(
            zip(
                inputs.tensor_split(self.config.accumulate),
                targets.tensor_split(self.config.accumulate),
                strict=True,
            )
        )
        for index, (x, y) in enumerate(parts):
            with self.exchange.accumulate() if index < len(parts) - 1 else contextlib.nullcontext():
                loss = self.workload.loss(self.model(x), y)
                clock.lap("forward")
                (loss * (len(y) * self.world.size / self.global_batch)).backward()
                losses += loss.detach() * len(y)
                clock.lap("backward")
        self.exchange.step(lr)
        clock.lap("update")
        spent = clock.stop()
        record = StepRecord(
            step=self.next_step, rank=self.world.rank, time=began, loss=losses.item() / samples, samples=samples, lr=lr,
            step_s=sum(spent.values()), input_s=spent["input"], forward_s=spent["forward"], backward_s=spent["backward"],
            update_s=spent["update"], exchange=self.exchange.record(),
        )  # fmt: skip
        self.next_step += 1
        return record

    def fit(
        self, on_step: Callable[[StepRecord], None], stop: Callable[[int], bool]
    ) -> dict[str, Any]:
        """Train to the last step, or until ``stop(step)`` is true (on all ranks at the same step); returns the summary.

        ``on_step`` hears of every step of this rank.
        """
        began = time.monotonic()
        evaluated: dict[str, Any] = {}

        def evaluate() -> None:
            evaluated.update(self.evaluate())
            target = self.config.target_accuracy
            if (
                target
                and "target_step" not in evaluated
                and (evaluated["test_accuracy"] or 0) >= target
            ):
                evaluated.update(target_step=self.next_step, target_s=time.monotonic() - began)

        while not self.finished and not stop(self.next_step):
            if not self._catch_up():
                record = self.step()
                self._writer.write(record)
                self.records.append(record)
                on_step(record)
            if not self.finished:  # after the last step both are done below
                if self._due(self.config.evaluate_every):
                    evaluate()
                if self._due(self.config.checkpoint.every_steps):
                    self.save()
        self.save()
        evaluate()
        self._writer.close()
        return self._summary(evaluated, time.monotonic() - began)

    def evaluate(self) -> dict[str, float | None]:
        """Mean loss and accuracy over the test set, shared out over all ranks; accuracy is None when targets are not classes."""
        module, was_training = self.workload.model, self.workload.model.training
        mine = torch.arange(self.world.rank, len(self.workload.test), self.world.size)  # type: ignore[arg-type]
        loss_sum, correct, judged, classes = 0.0, 0, 0, True
        module.eval()
        with torch.inference_mode():
            for x, y in load(self.workload.test, iter(mine.split(256)), 0):
                progress.alive("evaluating")
                x, y = x.to(self.device), y.to(self.device)
                output = module(x)
                loss_sum += self.workload.loss(output, y).item() * len(y)
                classes = classes and not y.is_floating_point() and output.ndim == y.ndim + 1
                if classes:
                    correct += int((output.argmax(1) == y).sum())
                    judged += y.numel()
        module.train(was_training)
        counts = torch.tensor(
            [loss_sum, len(mine), correct, judged, not classes], dtype=torch.float64
        )
        loss_sum, samples, correct, judged, unjudgeable = self.exchange.sum(counts).tolist()
        return {
            "test_loss": loss_sum / samples if samples else None,
            "test_accuracy": correct / judged if judged and not unjudgeable else None,
        }

    def save(self) -> None:
        """Rank 0 writes a checkpoint of the steps done so far."""
        if self.world.rank == 0:
            progress.alive("writing a checkpoint")
            checkpoint.save(
                self.run_dir,
                self.next_step,
                self.workload.model,
                self.workload.optimizer,
                self.config.checkpoint.keep,
            )

    def describe(self) -> list[str]:
        """The arithmetic of batch and learning rate, as lines for people."""
        n, config = self.world.size, self.config
        least, most = self.global_batch // n, math.ceil(self.global_batch / n)
        each = f"{least}" if least == most else f"{least} or {most}"
        split = f" in {config.accumulate} backward passes" if config.accumulate > 1 else ""
        mode = (
            "fixed global batch"
            if config.batch_mode == "strong"
            else f"{config.batch_size} a worker"
        )
        epochs = self.num_steps / self.batches.steps_per_epoch
        warmup = (
            f", {config.lr_schedule.warmup_steps} steps of warm-up"
            if config.lr_schedule.warmup_steps
            else ""
        )
        if config.lr_schedule.warmup_steps > self.num_steps:
            warmup += f" (longer than the run: the rate never reaches {self.base_lr:g})"
        samples = len(self.workload.train)  # type: ignore[arg-type]
        left_out = samples - self.batches.steps_per_epoch * self.global_batch
        uneven = f", {left_out} of them left out of each epoch's order" if left_out else ""
        return [
            f"batch: {self.global_batch} samples a step = {n} worker{'s' * (n > 1)} x {each}{split} ({mode}, {config.batch_mode} scaling)",
            f"learning rate: {self.base_lr:g} for {self.global_batch} samples ({self.base_lr * 256 / self.global_batch:.4g} per 256),"
            f" {config.lr_schedule.name}{warmup}; it does not change with the number of workers",
            f"steps: {self.num_steps} = {epochs:.4g} epoch{'s' * (epochs != 1)} of {self.batches.steps_per_epoch} steps"
            f" ({samples} samples{uneven})",
        ]

    def _catch_up(self) -> bool:
        """Leave out steps that the job has done without this rank, up to the next evaluation, where all ranks meet."""
        every = self.config.evaluate_every or self.num_steps
        meeting = min(self.num_steps, (self.next_step // every + 1) * every)
        skipped = self.exchange.skip(meeting - self.next_step)
        for _ in range(skipped):
            next(self._loaded)
        self.next_step += skipped
        return skipped > 0

    def _due(self, every: int | None) -> bool:
        return every is not None and self.next_step % every == 0

    def _summary(self, evaluated: dict[str, Any], wall_s: float) -> dict[str, Any]:
        """The run in numbers. Speed leaves out the first steps; it is the sum of all ranks' samples a second. All ranks must call it."""
        records = (
            self.records or self._before
        )  # ended after its last step, before its summary: those are what there is
        timed = records[min(WARMUP_STEPS, max(0, len(records) - 1)) :]
        seconds = [record.step_s for record in timed]
        last = records[-1] if records else None
        rate = sum(record.samples for record in timed) / sum(seconds) if seconds else 0.0
        totals = self.exchange.sum(
            torch.tensor(
                [rate, last.loss * last.samples if last else 0.0, last.samples if last else 0.0],
                dtype=torch.float64,
            )
        ).tolist()
        return {
            "name": self.config.name,
            "workers": self.world.size,
            "exchange": exchange_label(self.config.exchange),
            "chosen": self.exchange.chosen(),
            "device": self.device.type,
            "launcher": self.world.launcher,
            "batch_size": self.global_batch,
            "batch_mode": self.config.batch_mode,
            "steps": self.next_step,
            "finished": self.finished,
            "samples_per_s": totals[0],
            "step_s_p50": _percentile(seconds, 50),
            "step_s_p95": _percentile(seconds, 95),
            "final_loss": totals[1] / totals[2] if totals[2] else None,
            **evaluated,
            "wall_s": wall_s,
        }


class _Clock:
    """Splits a step into parts without slowing it: host time on CPU; events on the stream, read at the end, on CUDA."""

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = [("", self._now())]

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def lap(self, part: str) -> None:
        self._marks.append((part, self._now()))

    def stop(self) -> dict[str, float]:
        """Seconds spent in each part."""
        if self._cuda:
            torch.cuda.synchronize()
        spent: dict[str, float] = {}
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            seconds = before.elapsed_time(after) / 1000 if self._cuda else after - before
            spent[part] = spent.get(part, 0.0) + seconds
        return spent


def _percentile(values: list[float], percent: int) -> float | None:
    if len(values) < 2:
        return values[0] if values else None
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _cut_records(run_dir: Path, rank: int, step: int) -> list[StepRecord]:
    """Drop the records of steps that will be done again; returns the others. A rank that has none (more workers than before)
    starts afresh."""
    path = records_path(run_dir, rank)
    kept = [record for record in read_records(path) if record.step < step] if path.exists() else []
    writer = RecordWriter(run_dir, rank)
    for record in kept:
        writer.write(record)
    writer.close()
    return kept
