"""The training loop: ``step`` is one optimizer step, ``fit`` repeats it, ``evaluate`` tests."""

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scaletrain.config import RunConfig, exchange_label
from scaletrain.run import progress
from scaletrain.run.layout import RunDir
from scaletrain.run.records import WARMUP_STEPS, RecordWriter, StepRecord, read_records
from scaletrain.training import checkpoint
from scaletrain.training.batches import GlobalBatches, load
from scaletrain.training.checkpoint_writer import CheckpointWriter
from scaletrain.training.exchange import Exchange
from scaletrain.training.learning_rate import learning_rate
from scaletrain.training.resume import resume_lines, training_facts
from scaletrain.training.step_clock import StepClock
from scaletrain.training.workload import Workload
from scaletrain.units import plural
from scaletrain.world import World

_TEST_BATCH = 256  # samples of one forward pass in evaluation


class Trainer:
    """One worker of a data-parallel job. Every rank makes one and calls the same methods.

    The gradient of a step is the mean over the global batch, however the batch is split. Exchanges
    average over ranks, so each rank's loss is weighted by its share.

    Args:
        config: the run.
        world: this worker's place.
        workload: model, loss, optimizer and data, the same on every rank.
        exchange: this worker's end of the exchange.
        device: where the model lies.
        run_dir: where records and checkpoints go.
        resume: go on from the newest checkpoint, if there is one.
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
        self.config = config
        self.world = world
        self.workload = workload
        self.exchange = exchange
        self.device = device
        self.run_dir = run_dir

        # Weak scaling: ``batch_size`` is one worker's. Strong scaling: it is the whole job's.
        sharing = world.size if config.batch_mode == "weak" else 1
        self.global_batch = config.batch_size * sharing  # samples a step, of all workers
        self.batches = GlobalBatches(len(workload.train), self.global_batch, config.seed)  # type: ignore[arg-type]
        self.num_steps = config.steps or self._steps_of(config.epochs or 0)
        self.base_lr = float(workload.optimizer.param_groups[0]["lr"])

        # A fault in the first save would come after hours: try it now.
        checkpoint.check_saveable(workload.model, workload.optimizer)
        self._facts = training_facts(
            config,
            workload.optimizer,
            len(workload.train),  # type: ignore[arg-type]
            self.global_batch,
        )
        # The checkpoint is loaded before ``attach``, which makes every rank's weights those of rank
        # 0.
        loaded = None
        if resume:
            loaded = checkpoint.load_latest(run_dir, workload.model, workload.optimizer)
        self.resumed = loaded is not None
        self.next_step = loaded.step if loaded else 0
        # Lines for people: damaged checkpoints, and what differs from the run before.
        self.resume_lines = resume_lines(loaded, self._facts) if loaded else []
        self._checkpoints: CheckpointWriter | None = None
        if world.rank == 0:
            self._checkpoints = CheckpointWriter(run_dir, config.checkpoint.keep, progress.alive)
        self._save_put_off = False  # on rank 0, while the checkpoint before is being written
        self.model = exchange.attach(workload.model, workload.optimizer)
        # A worker that joins a running job, such as one that was started again, begins where it is.
        missed = exchange.skip(self.num_steps - self.next_step)
        self.next_step += missed

        self.records: list[StepRecord] = []
        self._records_before: list[StepRecord] = []  # of the part before a resume
        if self.resumed:
            self._records_before = _cut_records(run_dir, world.rank, self.next_step)
        # A late worker may be the successor of one that died: the records of that one stay.
        self._writer = RecordWriter(run_dir, world.rank, append=self.resumed or missed > 0)
        self._loaded = load(workload.train, self._shares(), config.loader_workers)

    @property
    def finished(self) -> bool:
        """Whether all steps are done. A resumed run may have been finished before."""
        return self.next_step >= self.num_steps

    def step(self) -> StepRecord:
        """Do one optimizer step: input, forward and backward (in parts), exchange, update."""
        began = time.time()
        clock = StepClock(self.device)
        # The rate is set before backward: a parameter server gets gradients while backward runs.
        lr = learning_rate(self.config.lr_schedule, self.base_lr, self.next_step, self.num_steps)
        for group in self.workload.optimizer.param_groups:
            group["lr"] = lr
        self.model.train()
        self.model.zero_grad()
        inputs, targets = next(self._loaded)
        inputs = inputs.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        clock.lap("input")

        samples = len(targets)
        # It stays on the device: reading it after every part would stall the stream.
        loss_sum = torch.zeros((), device=self.device)  # over this rank's samples
        parts = [*zip(*self._split(inputs, targets), strict=True)]
        for index, (part_inputs, part_targets) in enumerate(parts):
            is_last = index == len(parts) - 1
            # Only the last part exchanges; the others add to the gradients of this rank.
            with contextlib.nullcontext() if is_last else self.exchange.accumulate():
                loss = self.workload.loss(self.model(part_inputs), part_targets)
                clock.lap("forward")
                # The loss is a mean over the part, and the exchange divides by the number of ranks:
                # weighted so, the sum over parts and ranks is the mean over the global batch.
                weight = len(part_targets) * self.world.size / self.global_batch
                (loss * weight).backward()
                loss_sum += loss.detach() * len(part_targets)
                clock.lap("backward")
        self.exchange.step()
        clock.lap("update")

        # Before ``item`` below: on CUDA this waits for the device, inside the measured time.
        spent = clock.stop()
        record = StepRecord(
            step=self.next_step,
            rank=self.world.rank,
            time=began,
            loss=loss_sum.item() / samples,
            samples=samples,
            lr=lr,
            step_s=sum(spent.values()),
            input_s=spent["input"],
            forward_s=spent["forward"],
            backward_s=spent["backward"],
            update_s=spent["update"],
            exchange=self.exchange.record(),
        )
        self.next_step += 1
        return record

    def fit(
        self, on_step: Callable[[StepRecord], None], stop: Callable[[int], bool]
    ) -> dict[str, Any]:
        """Train to the last step, and return the summary. Every rank calls it.

        Args:
            on_step: called after each step of this rank.
            stop: called before each step with its number; True ends the training, and must come on
                all ranks at the same step.
        """
        began = time.monotonic()
        evaluation: dict[str, Any] = {}
        while not self.finished and not stop(self.next_step):
            # A rank that left out steps still takes part in the evaluation where all ranks meet.
            if not self._catch_up():
                record = self.step()
                self._writer.write(record)
                self.records.append(record)
                on_step(record)
            if self.finished:
                break  # the last step's evaluation and checkpoint come below
            if self._is_due(self.config.evaluate_every):
                self._evaluate_into(evaluation, began)
            if self._save_put_off or self._is_due(self.config.checkpoint.every_steps):
                self.save()
        self.save()
        self._evaluate_into(evaluation, began)
        self._writer.close()
        summary = self._summary(evaluation, time.monotonic() - began)
        self._finish_checkpoints()
        return summary

    def evaluate(self) -> dict[str, float | None]:
        """Return mean loss and accuracy over the test set, which all ranks share out (collective).

        The accuracy is None if the targets are not classes.
        """
        # Not DDP's module: its forward broadcasts buffers, and ranks may have different numbers
        # of batches here.
        module = self.workload.model
        was_training = module.training
        mine = torch.arange(self.world.rank, len(self.workload.test), self.world.size)  # type: ignore[arg-type]
        loss_sum = 0.0
        correct = 0  # right predictions
        judged = 0  # predictions that can be right or wrong
        has_classes = True
        module.eval()
        with torch.inference_mode():
            for inputs, targets in load(self.workload.test, iter(mine.split(_TEST_BATCH)), 0):
                progress.alive("evaluating")
                inputs, targets = inputs.to(self.device), targets.to(self.device)
                output = module(inputs)
                loss_sum += self.workload.loss(output, targets).item() * len(targets)
                # Classes are whole numbers, and the output has one more dimension: their scores.
                if targets.is_floating_point() or output.ndim != targets.ndim + 1:
                    has_classes = False
                if has_classes:
                    correct += int((output.argmax(1) == targets).sum())
                    judged += targets.numel()
        module.train(was_training)
        # Sums of counts stay exact in float64; float32 is exact up to 2^24 only.
        counts = [loss_sum, len(mine), correct, judged, not has_classes]
        totals = self.exchange.sum(torch.tensor(counts, dtype=torch.float64)).tolist()
        total_loss, samples, correct, judged, ranks_without_classes = totals
        # A rank without test samples cannot tell, so only one that has seen other targets objects.
        can_judge = judged and not ranks_without_classes
        return {
            "test_loss": total_loss / samples if samples else None,
            "test_accuracy": correct / judged if can_judge else None,
        }

    def save(self) -> None:
        """Write a checkpoint of the steps done so far, on rank 0, while training goes on.

        While the one before is still being written, it is put off: waiting here for a slow disk
        would let the other ranks' collectives time out.
        """
        if not self._checkpoints:
            return
        self._save_put_off = self._checkpoints.is_writing()
        if not self._save_put_off:
            self._checkpoints.save(
                self.next_step, self.workload.model, self.workload.optimizer, self._facts
            )

    def _finish_checkpoints(self) -> None:
        """Wait until the last checkpoint is durable (collective).

        All ranks wait together, and meet once a second: no collective times out, and each gives
        signs of life, however long the disk takes.
        """
        while True:
            is_writing = False
            if self._checkpoints:
                is_writing = self._checkpoints.is_writing(patience_s=1.0)
                if self._save_put_off and not is_writing:
                    self.save()
                    is_writing = True
            progress.alive("writing a checkpoint")
            if not self.exchange.sum(torch.tensor([float(is_writing)])).item():
                return

    def describe(self) -> list[str]:
        """Return the arithmetic of batch and learning rate, as lines for people."""
        config = self.config
        # ``GlobalBatches.share`` gives each rank one of these two numbers of samples.
        least = self.global_batch // self.world.size
        most = math.ceil(self.global_batch / self.world.size)
        each = f"{least}" if least == most else f"{least} or {most}"
        split = f" in {config.accumulate} backward passes" if config.accumulate > 1 else ""
        mode = f"{config.batch_size} a worker"
        if config.batch_mode == "strong":
            mode = "fixed global batch"
        samples = len(self.workload.train)  # type: ignore[arg-type]
        epochs = self.num_steps / self.batches.steps_per_epoch
        num_epochs = f"{epochs:.4g} epoch" if epochs == 1 else f"{epochs:.4g} epochs"
        left_out = samples - self.batches.steps_per_epoch * self.global_batch
        uneven = f", {left_out} of them left out of each epoch's order" if left_out else ""
        return [
            f"batch: {self.global_batch} samples a step = {plural(self.world.size, 'worker')} x"
            f" {each}{split} ({mode}, {config.batch_mode} scaling)",
            f"learning rate: {self.base_lr:g} for {self.global_batch} samples"
            f" ({self.base_lr * 256 / self.global_batch:.4g} per 256),"
            f" {config.lr_schedule.name}{self._describe_warmup()};"
            " it does not change with the number of workers",
            f"steps: {self.num_steps} = {num_epochs} of {self.batches.steps_per_epoch} steps"
            f" ({samples} samples{uneven})",
        ]

    def _describe_warmup(self) -> str:
        steps = self.config.lr_schedule.warmup_steps
        if not steps:
            return ""
        text = f", {steps} steps of warm-up"
        if steps > self.num_steps:
            text += f" (longer than the run: the rate never reaches {self.base_lr:g})"
        return text

    def _steps_of(self, epochs: float) -> int:
        return max(1, round(epochs * self.batches.steps_per_epoch))

    def _shares(self) -> Iterator[torch.Tensor]:
        """Yield the indices of this rank's samples, step by step."""
        for step in range(self.next_step, self.num_steps):
            yield self.batches.share(step, self.world.rank, self.world.size)

    def _split(
        self, inputs: torch.Tensor, targets: torch.Tensor
    ) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
        """Return the batch in as many parts as there are backward passes."""
        passes = self.config.accumulate
        return inputs.tensor_split(passes), targets.tensor_split(passes)

    def _catch_up(self) -> bool:
        """Leave out steps that the job has done without this rank; return True if there were any.

        At most up to the next evaluation, where all ranks meet.
        """
        # A rank that ran past an evaluation would leave the others waiting in its ``sum``.
        every = self.config.evaluate_every or self.num_steps
        next_meeting = (self.next_step // every + 1) * every
        skipped = self.exchange.skip(min(self.num_steps, next_meeting) - self.next_step)
        # The loader yields every step's batch in turn, so those of skipped steps are dropped.
        # ``next_step`` changes afterwards: ``_shares`` may read it only at the first batch.
        for _ in range(skipped):
            next(self._loaded)
        self.next_step += skipped
        return skipped > 0

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.next_step % every == 0

    def _evaluate_into(self, evaluation: dict[str, Any], began: float) -> None:
        """Evaluate, and note when the target accuracy was first reached."""
        evaluation.update(self.evaluate())
        target = self.config.target_accuracy
        # Only the first time counts, even if a later evaluation falls below the target.
        if not target or "target_step" in evaluation:
            return
        if (evaluation["test_accuracy"] or 0) >= target:
            evaluation["target_step"] = self.next_step
            evaluation["target_s"] = time.monotonic() - began

    def _summary(self, evaluation: dict[str, Any], wall_s: float) -> dict[str, Any]:
        """Return the run in numbers (collective).

        Speed leaves out the first steps. It is the sum of all ranks' samples a second.
        """
        # A run that ended after its last step and before its summary has only earlier records.
        records = self.records or self._records_before
        # One record stays, however short the run was.
        num_warmup = min(WARMUP_STEPS, max(0, len(records) - 1))
        timed = records[num_warmup:]
        seconds = [record.step_s for record in timed]
        samples_per_s = 0.0
        if seconds:
            samples_per_s = sum(record.samples for record in timed) / sum(seconds)
        last_loss, last_samples = 0.0, 0
        if records:
            last_samples = records[-1].samples
            last_loss = records[-1].loss * last_samples
        # Weighted by samples, since the shares of the ranks differ by up to one.
        local = torch.tensor([samples_per_s, last_loss, last_samples], dtype=torch.float64)
        samples_per_s, last_loss, last_samples = self.exchange.sum(local).tolist()
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
            "samples_per_s": samples_per_s,
            "step_s_p50": float(np.percentile(seconds, 50)) if seconds else None,
            "step_s_p95": float(np.percentile(seconds, 95)) if seconds else None,
            "final_loss": last_loss / last_samples if last_samples else None,
            **evaluation,
            "wall_s": wall_s,
        }


def _cut_records(run_dir: Path, rank: int, step: int) -> list[StepRecord]:
    """Drop the records of steps that will be done again, and return the others.

    A rank that has no records (there are more workers than before) starts afresh.
    """
    path = RunDir(run_dir).records(rank)
    kept = []
    if path.exists():
        # Read to the end first: the writer below empties the file.
        kept = [record for record in read_records(path) if record.step < step]
    writer = RecordWriter(run_dir, rank)
    for record in kept:
        writer.write(record)
    writer.close()
    return kept
