"""The training loop: ``step`` is one optimizer step, ``fit`` repeats it, ``evaluate`` tests."""

import contextlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from scaletrain import plugins
from scaletrain.config import RunConfig, exchange_label
from scaletrain.config.checks import check_min_lr
from scaletrain.config.schema import Named
from scaletrain.errors import Diverged, UserError
from scaletrain.run.layout import RunDir
from scaletrain.run.records import WARMUP_STEPS, RecordWriter, StepRecord, cut_lines, read_records
from scaletrain.training import batch_norm, finite, learning_rate, optimizer, statistics
from scaletrain.training.batches import Batch, to_device
from scaletrain.training.callbacks import Callback
from scaletrain.training.checkpoint import State
from scaletrain.training.evaluation import Evaluation
from scaletrain.training.exchange import Exchange
from scaletrain.training.feed import DataEnded, EvaluationFeed, open_feed
from scaletrain.training.finite import finite_or_none
from scaletrain.training.losses import GlobalMean, StepLoss, checked
from scaletrain.training.precision import Precision
from scaletrain.training.randomness import seed_forward
from scaletrain.training.resume import resume_lines, training_facts
from scaletrain.training.saving import Saving
from scaletrain.training.step_clock import StepClock
from scaletrain.training.vitals import VitalSigns
from scaletrain.training.workload import Update, Workload
from scaletrain.units import plural
from scaletrain.world import World

_MOST_LEFT_OUT = 20  # steps in a row


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
        self.module = workload.model  # without the exchange's wrapper
        workload.module = self.module
        self.exchange = exchange
        self.device = device
        self.run_dir = run_dir

        # Weak scaling: ``batch_size`` is one worker's. Strong scaling: it is the whole job's.
        sharing = world.size if config.batch_mode == "weak" else 1
        self.global_batch = config.batch_size * sharing  # samples a step, of all workers
        self._feed = open_feed(config, world, workload.data, self.global_batch)
        self.num_steps = self._feed.num_steps
        self._base_lrs = self._scaled_rates()
        # By model: updates in a row whose gradient was not finite.
        self._left_out: Counter[str] = Counter()
        self._rollbacks = 0
        self._on_evaluation: Callable[[int, dict[str, float | None]], None] | None = None

        self._updates = workload.updates or [Update("model", workload.optimizer, workload.forward)]
        self._precision = Precision(
            config.precision, device, [update.model for update in self._updates]
        )
        # Each group evaluates its model on the whole test set: figures are means over the groups.
        test = EvaluationFeed(config, exchange.group.world, workload.data)
        self.num_test_samples = test.num_samples
        self._evaluation = Evaluation(workload, exchange, test, device, self._precision.autocast)
        facts = training_facts(
            config, workload.optimizer, self._feed.num_samples, self.global_batch, self.num_steps
        )
        state = State(self.module, workload.optimizer, facts, self._feed.position)
        self.saving = Saving(config.checkpoint, run_dir, world, exchange, state)
        # Those of evaluations; None if it is not known before the first of them.
        self.figure_names: list[str] | None = None
        # A fault in the first evaluation would come after hours: try it now.
        if not config.compute:  # an emulated accelerator would take its time
            most = math.ceil(self.global_batch / world.size)
            self.figure_names = self._evaluation.rehearse(most, config.target_accuracy is not None)
        # The checkpoint is loaded before ``attach``, which makes every rank's weights those of rank
        # 0.
        loaded = self.saving.load() if resume else None
        self.resumed = loaded is not None
        self.next_step = loaded.step if loaded else 0
        # Lines for people: damaged checkpoints, and differences from the run before.
        self.resume_lines = resume_lines(loaded, facts) if loaded else []
        # By name: the modules that forward calls while training, and on this rank alone.
        self._attached: dict[str, nn.Module] = {}
        self._modules: dict[str, nn.Module] = {}
        self._parameters = [*self.module.parameters()]
        self.saving.add("gradient order", exchange)  # before it has a model
        self._attach()
        missed = self._join_running_job()
        # Whether this rank writes what one rank writes for all: checkpoints, the summary.
        self.leads = world.rank == 0

        self.records: list[StepRecord] = []
        # Of the part before a resume.
        self._records_before = self._earlier_records() if self.resumed else []
        # A late worker may be the successor of one that died: the records of that one stay.
        self._writer = RecordWriter(run_dir, world.rank, append=self.resumed or missed > 0)
        self._vitals: VitalSigns | None = None  # made by the first step, ended by ``fit``
        self._feed.start(self.next_step, loaded.position if loaded else {}, missed)
        self._callbacks: list[Callback] = []
        for named in config.callbacks:
            self._add_callback(named)
        if self._precision.scale is not None:
            self.saving.add("loss_scales", self._precision)
        self.resume_lines += self.saving.begin(self.figure_names)
        self._evaluated_at: int | None = None  # steps done at the last evaluation

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or a callback has ended the training.

        A resumed run may have been finished before.
        """
        return self.next_step >= self.num_steps or bool(self.stop_reason)

    @property
    def stop_reason(self) -> str:
        """Why a callback has ended the training, the same on all ranks; empty if none has."""
        reasons = [callback.stop_reason for callback in self._callbacks]
        return next(filter(None, reasons), "")

    def step(self) -> StepRecord:
        """Do one optimizer step: input, forward and backward (in passes), exchange, update.

        Raises:
            Diverged: a loss is not finite, or gradients have not been for many steps.
            DataEnded: no rank has a sample any more.
        """
        if self._vitals is None:  # here, since it counts for the thread that it is made on
            self._vitals = VitalSigns(self.run_dir, self.world.rank)
        began = time.time()
        self._vitals.begin()
        clock = StepClock(self.device, self._vitals.lap)
        # The rates are set before backward: a parameter server gets gradients while backward runs.
        self._set_rates()
        if not self.module.training:  # it visits every layer, and is needed after evaluation alone
            self.module.train()
        step_input = self._feed.next()
        passes = []
        for batch in step_input.batches:
            passes.append(batch._replace(content=to_device(batch.content, self.device)))
        clock.lap("input")

        # After the input: reading samples in line seeds the same generators.
        seed_forward(self.device, self.config.seed, self.next_step, self.world.rank)
        # Made before forward: the counts travel to the other ranks while that runs.
        mean = GlobalMean(self.workload, self.exchange, passes, step_input)
        losses: dict[str, StepLoss] = {}
        is_skipped = False
        for update in self._updates:  # one, unless several models train together
            with self._updating(update) as model:
                loss = self._backward(update, model, passes, mean, clock)
                losses[update.model] = StepLoss() if step_input.is_stand_in else loss
                # From here on gradients are the mean over all ranks, where the exchange makes one.
                self.exchange.synchronise(model)
                if self._leaves_out(update):
                    is_skipped = True
                else:
                    for callback in self._callbacks:
                        callback.after_backward()
                    self.exchange.step(model)
            clock.lap("update")

        spent = clock.stop()
        vitals = self._vitals.end()
        for loss in losses.values():
            mean.check(loss.count)
        self._feed.count_left_out(mean.left_out)
        step_loss = StepLoss.of_updates(losses)
        record = StepRecord(
            step=self.next_step,
            rank=self.world.rank,
            time=began,
            loss=finite_or_none(step_loss.mean),
            samples=step_input.num_samples,
            lr=self.workload.optimizer.param_groups[0]["lr"],
            step_s=sum(spent.values()),
            input_s=spent["input"],
            forward_s=spent["forward"],
            backward_s=spent["backward"],
            update_s=spent["update"],
            exchange=_with_waits(self.exchange.record(), mean),
            count=step_loss.count,
            parts=step_loss.parts(),
            skipped=is_skipped,
            loss_scale=self._precision.scale,
            bad_samples=step_input.left_out,
            gc_s=vitals.gc_s,
            stolen_s=vitals.stolen_s,
            taken_s=vitals.by_part,
        )
        self.next_step += 1
        for callback in self._callbacks:
            callback.after_step(record)
        return record

    def fit(
        self,
        on_step: Callable[[StepRecord], None],
        stop: Callable[[int], bool],
        on_evaluation: Callable[[int, dict[str, float | None]], None] | None = None,
        snapshot: Callable[[int], bool] | None = None,
    ) -> dict[str, Any]:
        """Train to the last step, and return the summary. Every rank calls it.

        Args:
            on_step: called after each step of this rank.
            stop: called before each step with its number; True ends the training, and must come on
                all ranks at the same step.
            on_evaluation: called on every rank after each evaluation, with the number of steps done
                and the figures of ``evaluate``.
            snapshot: called with the number of steps done; True lets all ranks save now, and must
                come on all of them at the same step.
        """
        self._on_evaluation = on_evaluation
        summary = None
        try:
            summary = self._train(on_step, stop, snapshot)
        finally:
            # The stack closes all of them, also when one raises.
            with contextlib.ExitStack() as stack:
                if self._vitals is not None:
                    stack.callback(self._vitals.close)
                    self._vitals = None
                for callback in self._callbacks:
                    stack.callback(callback.close, summary)
        return summary

    def _train(
        self,
        on_step: Callable[[StepRecord], None],
        stop: Callable[[int], bool],
        snapshot: Callable[[int], bool] | None,
    ) -> dict[str, Any]:
        """Train to the last step, and return the summary."""
        began = time.monotonic()
        evaluation: dict[str, Any] = {}
        while not self.finished and not stop(self.next_step):
            # A rank that left out steps still takes part in the evaluation where all ranks meet.
            if not self._catch_up():
                try:
                    record = self.step()
                except DataEnded:
                    self.num_steps = self.next_step  # on all ranks alike
                    break
                self._writer.write(record)
                self.records.append(record)
                on_step(record)
                self._feed.check_left_out()
                if record.skipped and self.config.nonfinite == "roll_back":
                    self._rollbacks += self.saving.roll_back(self.next_step)
            if self.next_step >= self.num_steps:
                break  # the last step's evaluation and checkpoint come below
            evaluates = self._is_due(self.config.evaluate_every)
            is_planned = self.saving.is_due(self.next_step)
            is_asked = snapshot is not None and snapshot(self.next_step)
            saves = is_planned or is_asked
            # Ranks meet at planned steps under every exchange. Where they may be at different steps
            # they cannot meet when somebody asks: one rank's statistics count then.
            if evaluates or is_planned or (is_asked and self.exchange.averages):
                self._meet()
            if evaluates:
                self._choose_leader()
            figures = self._evaluate_into(evaluation, began) if evaluates else None
            if saves:
                self.saving.save(self.next_step)
            else:
                self.saving.save_put_off(self.next_step)
            if figures:
                self.saving.save_best(self.next_step, figures)
        self._choose_leader()
        if self._evaluated_at == self.next_step:
            self.saving.save(self.next_step)
        else:
            self._meet()
            self.saving.save(self.next_step)
            figures = self._evaluate_into(evaluation, began)
            self.saving.save_best(self.next_step, figures)
        self._writer.close()
        summary = self._summary(evaluation, time.monotonic() - began)
        self.saving.finish(self.next_step)
        return summary

    def evaluate(self) -> dict[str, float | None]:
        """Return the means over the test set, which all ranks share out (collective).

        Returns:
            as ``Evaluation.run``.
        """
        self._meet()
        return self._evaluate()

    def describe(self) -> list[str]:
        """Return the arithmetic of batch and learning rate, as lines for people."""
        config = self.config
        # ``batches.cut`` gives each rank one of these two numbers of samples.
        least = self.global_batch // self.world.size
        most = math.ceil(self.global_batch / self.world.size)
        each = f"{least}" if least == most else f"{least} or {most}"
        split = f" in {config.accumulate} backward passes" if config.accumulate > 1 else ""
        mode = f"{config.batch_size} a worker"
        if config.batch_mode == "strong":
            mode = "fixed global batch"
        groups = []
        learnt_from = self.global_batch // self.exchange.groups  # by each model
        if self.exchange.groups > 1:
            size = self.exchange.group.world.size
            groups.append(
                f"groups: {self.exchange.groups} of {plural(size, 'worker')}, each with a model of"
                f" its own and {learnt_from} samples a step"
            )
        return [
            f"batch: {self.global_batch} samples a step = {plural(self.world.size, 'worker')} x"
            f" {each}{split} ({mode}, {config.batch_mode} scaling)",
            *groups,
            *learning_rate.describe(
                config.lr_schedule, self._base_lrs, learnt_from, self.num_steps
            ),
            *optimizer.describe(config.optimizer, self.workload.optimizer),
            self._feed.describe(),
            *self.exchange.describe(),
        ]

    def _attach(self) -> None:
        """Put the exchange under the model of each update (collective)."""
        if self.config.sync_batchnorm and self.exchange.averages:
            batch_norm.share_statistics(self.module, self.exchange.group.sum)
        for update in self._updates:
            module = getattr(self.workload, update.model)
            self._modules[update.model] = module
            self._attached[update.model] = self.exchange.attach(module, update.optimizer)

    def _join_running_job(self) -> int:
        """Begin where the job is; return the steps that it has done without this worker.

        They are 0 unless the worker came late, such as one that was started again.
        """
        missed = self.exchange.skip(self.num_steps - self.next_step)
        self.next_step += missed
        # It may land where the others are about to meet.
        self._owes_meeting = missed > 0 and self.exchange.owes_meeting()
        return missed

    def _earlier_records(self) -> list[StepRecord]:
        """Return this rank's records of the part before; cut off steps that are done anew.

        A rank without records (there are more workers than before) starts afresh.
        """
        path = RunDir(self.run_dir).records(self.world.rank)
        cut_lines(path, lambda record: record["step"] < self.next_step)
        return [*read_records(path)] if path.exists() else []

    def _meet(self) -> None:
        """Make the statistics that each rank has of its own the mean of all (collective)."""
        statistics.average(self.module, self.exchange.group)
        for callback in self._callbacks:
            callback.meet()

    def _choose_leader(self) -> None:
        """Let the first rank that lives lead (collective).

        Only where a job may go on without rank 0.
        """
        if self.exchange.averages or self.world.size == 1:
            return
        present = torch.zeros(self.world.size, dtype=torch.float64)
        present[self.world.rank] = 1.0
        living = self.exchange.sum(present).nonzero()
        self.leads = int(living[0]) == self.world.rank
        self.saving.lead(self.leads)

    def _evaluate(self) -> dict[str, float | None]:
        with contextlib.ExitStack() as weights:
            for callback in self._callbacks:
                weights.enter_context(callback.evaluating())
            return self._evaluation.run()

    def _add_callback(self, named: Named) -> None:
        """Make a callback, and restore its state.

        Raises:
            UserError: it changes gradients, and the exchange has none to change.
        """
        factory = plugins.load("callback", named.name, self.config.search_path)
        made: Callback = factory(self, **named.options)
        if made.changes_gradients:
            try:
                self.exchange.hold_gradients()
            except UserError as mistake:
                raise UserError(f"callbacks: {named.name} changes gradients: {mistake}") from None
        self._callbacks.append(made)
        self.saving.add(f"callbacks.{named.name}", made)

    def _scaled_rates(self) -> list[float]:
        """Scale the rate of each parameter group to the batch, if that is wanted; return them.

        They are set in the groups: the servers of an exchange look there for the first rates.

        Raises:
            UserError: the floor of the schedule lies above the rate.
        """
        schedule = self.config.lr_schedule
        rates = []
        for group in self.workload.optimizer.param_groups:
            if schedule.scaling is not None:
                batch = self.global_batch // self.exchange.groups  # that a model learns from
                group["lr"] *= learning_rate.scale(schedule.scaling, batch)
            rates.append(float(group["lr"]))
        check_min_lr(schedule, rates[0])
        return rates

    def _backward(
        self,
        update: Update,
        model: nn.Module,
        passes: list[Batch],
        mean: GlobalMean,
        clock: StepClock,
    ) -> StepLoss:
        """Run forward and backward of an update, pass by pass; return this rank's loss."""
        step_loss = StepLoss()
        for index, batch in enumerate(passes):
            is_last = index == len(passes) - 1
            # Only the last pass exchanges; the others add to the gradients of this rank.
            with contextlib.nullcontext() if is_last else self.exchange.accumulate(model):
                with self._precision.autocast():
                    loss = checked(update.forward(batch.content))
                clock.lap("forward")
                step_loss.add(loss)
                if self.device.type == "cpu" or is_last:  # reading it stalls a GPU's stream
                    self._check_finite(update, step_loss, passes)
                # Backward of ``total * weight``, without the product.
                weight = torch.full_like(loss.total, mean.weight())
                self._precision.scaled(update.model, loss.total).backward(weight)
                clock.lap("backward")
        return step_loss

    @contextlib.contextmanager
    def _updating(self, update: Update) -> Iterator[nn.Module]:
        """Put the exchange's module in the place of a model, and freeze the others.

        Gradients flow through frozen models, but none arrives in them for an exchange to send.
        """
        model = self._attached[update.model]
        frozen = []
        for name, module in self._modules.items():
            if name != update.model:
                frozen += [each for each in module.parameters() if each.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        for parameter in self._parameters:  # `zero_grad` would look all of them up again
            parameter.grad = None
        setattr(self.workload, update.model, model)
        try:
            yield model
        finally:
            # Outside, forward runs on this rank alone, as evaluation does: DDP's broadcasts
            # buffers, and ranks may have different numbers of batches then.
            setattr(self.workload, update.model, self._modules[update.model])
            for parameter in frozen:
                parameter.requires_grad_(True)

    def _set_rates(self) -> None:
        """Set the learning rate of each parameter group: its own, by the schedule."""
        rates = learning_rate.learning_rates(
            self.config.lr_schedule, self._base_lrs, self.next_step, self.num_steps
        )
        for group, rate in zip(self.workload.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _check_finite(self, update: Update, loss: StepLoss, passes: list[Batch]) -> None:
        """Raise ``Diverged`` if the loss so far is not finite, and that ends the run."""
        if self.config.nonfinite != "stop" or math.isfinite(loss.total):
            return
        reasons = []
        # The other ranks do not run forward once more.
        setattr(self.workload, update.model, self._modules[update.model])
        with self._precision.autocast():
            seed_forward(self.device, self.config.seed, self.next_step, self.world.rank)
            for batch in passes:
                reasons.append(finite.explain(self.workload, batch.content, batch.samples))
        found = next(filter(None, reasons), "every layer is finite, the loss alone is not")
        raise Diverged(
            f"step {self.next_step}, rank {self.world.rank}: the loss is {loss.total:g}: {found}"
            f" (scaletrain replay {self.run_dir} --step {self.next_step} --rank {self.world.rank}"
            " runs it once more; checkpoints are from before it; nonfinite: skip leaves such steps"
            " out)"
        )

    def _leaves_out(self, update: Update) -> bool:
        """Return True if this update's gradient is not finite, and such updates are left out.

        They are under fp16, since its gradients overflow now and then, and by the policy ``skip``.
        The gradient is the mean over all ranks, so all of them decide alike.

        Raises:
            Diverged: too many steps in a row were left out: the weights will not recover.
        """
        is_finite = self._precision.unscale(update.model, update.optimizer)
        if is_finite and self.config.nonfinite != "stop":
            is_finite = finite.all_finite(each.grad for each in self.module.parameters())
        if is_finite:
            self._left_out[update.model] = 0
            return False
        self._left_out[update.model] += 1
        if self._left_out[update.model] == _MOST_LEFT_OUT:
            raise Diverged(
                f"step {self.next_step}: the gradients of {_MOST_LEFT_OUT} steps in a row are not"
                " finite (a smaller learning rate may help; nonfinite: stop says where it begins)"
            )
        return True

    def _catch_up(self) -> bool:
        """Leave out steps that the job has done without this rank; return True if there were any.

        At most up to the next evaluation or planned checkpoint, where all ranks meet.
        """
        if self._owes_meeting:
            self._owes_meeting = False
            return True
        # A rank that ran past a meeting would leave the others waiting in its ``sum``.
        next_meeting = self.num_steps
        for every in (self.config.evaluate_every, self.config.checkpoint.every_steps):
            if every is not None:
                next_meeting = min(next_meeting, (self.next_step // every + 1) * every)
        skipped = self.exchange.skip(next_meeting - self.next_step)
        for _ in range(skipped):
            self._feed.next()  # and drop it
        self.next_step += skipped
        return skipped > 0

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.next_step % every == 0

    def _evaluate_into(self, evaluation: dict[str, Any], began: float) -> dict[str, float | None]:
        """Evaluate, and note when the target accuracy was first reached; return the figures."""
        figures = self._evaluate()
        self._evaluated_at = self.next_step
        for callback in self._callbacks:
            callback.after_evaluation(self.next_step, figures)
        if self._on_evaluation:
            self._on_evaluation(self.next_step, figures)
        evaluation.update(figures)
        target = self.config.target_accuracy
        # Only the first time counts, even if a later evaluation falls below the target.
        if target and "target_step" not in evaluation:
            if (evaluation["test_accuracy"] or 0) >= target:
                evaluation["target_step"] = self.next_step
                evaluation["target_s"] = time.monotonic() - began
        return figures

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
        last_total, last_count = 0.0, 0.0
        if records:
            last = records[-1]
            last_count = last.count
            last_total = math.nan if last.loss is None else last.loss * last_count
        # Weighted by the losses' counts: the shares of the ranks differ.
        num_bad = sum(len(record.bad_samples) for record in self._records_before + self.records)
        local = torch.tensor([samples_per_s, last_total, last_count, num_bad], dtype=torch.float64)
        samples_per_s, last_total, last_count, bad_samples = self.exchange.sum(local).tolist()
        return {
            "name": self.config.name,
            "workers": self.world.size,
            "exchange": exchange_label(self.config.exchange),
            "groups": self.exchange.groups,
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
            "final_loss": finite_or_none(last_total / last_count) if last_count else None,
            "skipped_steps": sum(record.skipped for record in records),
            "rollbacks": self._rollbacks,
            "bad_samples": int(bad_samples),
            **evaluation,
            **self._ends(),
            "wall_s": wall_s,
        }

    def _ends(self) -> dict[str, Any]:
        """Return the summary's facts on the best checkpoint and on a callback's stop."""
        ends: dict[str, Any] = {}
        best = self.saving.best
        if best is not None and best.value is not None:
            ends["best"] = {"figure": best.figure, "value": best.value, "step": best.step}
        if self.stop_reason:
            ends["stopped"] = self.stop_reason
        return ends


def _with_waits(record: dict[str, float], mean: GlobalMean) -> dict[str, float]:
    """Return the exchange's numbers of a step, with the waits for the other ranks' counts."""
    for key in ("wait_in_forward_s", "wait_in_backward_s"):
        waited_s = getattr(mean, key)
        if waited_s:
            record[key] = record.get(key, 0.0) + waited_s
    return record
