"""Evaluation: the means over the test set, which all ranks share out."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from scaletrain.errors import UserError
from scaletrain.run import progress
from scaletrain.training import metrics
from scaletrain.training.batches import Batch, to_device
from scaletrain.training.exchange import Exchange
from scaletrain.training.feed import EvaluationFeed
from scaletrain.training.finite import finite_or_none
from scaletrain.training.losses import check_is_sum, checked_figures
from scaletrain.training.workload import Loss, Mean, Supervised, Workload


class Evaluation:
    """One worker's part of each evaluation.

    Args:
        workload: judges batches of its test set.
        exchange: sums totals and counts over the ranks.
        feed: this worker's share of the test set.
        device: where the model lies.
        autocast: returns the context in which forward runs.
    """

    def __init__(
        self,
        workload: Workload,
        exchange: Exchange,
        feed: EvaluationFeed,
        device: torch.device,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    ):
        self._workload = workload
        self._exchange = exchange
        self._feed = feed
        self._device = device
        self._autocast = autocast
        metrics.prepare(workload.metrics, device)

    def run(self) -> dict[str, float | None]:
        """Return the means over the test set (collective).

        It uses this rank's statistics of the model: make them the mean of all ranks' beforehand.

        Returns:
            ``test_<name>`` of each figure of ``Workload.evaluate`` and of its metrics, and always
            ``test_loss`` and ``test_accuracy``; None where there is no such figure, or it is not
            finite.
        """
        sums: dict[str, list[float]] = {}  # total and count, of this rank
        num_left_out = 0
        has_samples = False
        metrics.reset(self._workload.metrics)
        module = self._workload.module
        was_training = module.training
        for batch, counts in self._feed.batches():
            progress.alive("evaluating")
            num_left_out += len(batch.left_out)
            has_samples = has_samples or (counts and len(batch.samples) > 0)
            for name, mean in self._judge(batch).items():
                own = sums.setdefault(name, [0.0, 0.0])
                if counts:
                    own[0] += float(mean.total)
                    own[1] += float(mean.count)
        module.train(was_training)

        figures: dict[str, float | None] = {"test_loss": None, "test_accuracy": None}
        if sums:
            local = [*sums.values(), [num_left_out, 0]]
            values = torch.tensor(local, dtype=torch.float64)  # shape (figures + 1, 2)
            *totals, (left_out, _) = self._exchange.sum(values.flatten()).view(-1, 2).tolist()
            for name, (total, count) in zip(sums, totals, strict=True):
                figures[f"test_{name}"] = finite_or_none(total / count) if count else None
            if left_out:
                figures["test_bad_samples"] = left_out
        figures |= {f"test_{name}": None for name in self._workload.metrics}
        with torch.inference_mode():
            joined = metrics.joined(self._workload.metrics, self._exchange, has_samples)
        for name, value in joined.items():
            figures[f"test_{name}"] = finite_or_none(value)
        return figures

    def rehearse(self, num_samples: int, needs_accuracy: bool) -> list[str] | None:
        """Evaluate a few test samples on this rank alone, to find faults before training begins.

        Args:
            num_samples: at most so many.
            needs_accuracy: whether there must be a figure ``accuracy``.

        Returns:
            The names of the figures that ``run`` will return; None if there is no test sample.

        Raises:
            UserError: evaluation returns no means, or not the one that is needed; or the total of
                the loss is a mean.
        """
        known: list[str] | None = None
        for batch in self._feed.first(num_samples):
            if not batch.samples:
                continue
            figures = self._judge(batch)
            own = self._workload.metrics
            for name in own.keys() & figures.keys():
                raise UserError(
                    f"metrics.{name}: there is a figure {name} already (allowed: another name)"
                )
            names = [*figures, *own]
            metrics.reset(own)
            if needs_accuracy and "accuracy" not in names:
                raise UserError(
                    "target_accuracy: evaluation has no figure accuracy, so it is never"
                    f" reached (there are: {', '.join(names)})"
                )
            known = [f"test_{name}" for name in names]
        if known is not None and not isinstance(self._workload, Supervised):
            self._check_total(num_samples)
        return known

    def _check_total(self, num_samples: int) -> None:
        """Raise ``UserError`` if the total of a person's own loss is a mean over the batch."""
        half = min(num_samples, self._feed.num_samples or num_samples) // 2
        if not half:
            return
        whole, halves = self._feed.first(2 * half)[:1], self._feed.first(half, 2)
        if [len(batch.samples) for batch in [*whole, *halves]] != [2 * half, half, half]:
            return  # some cannot be read
        with self._autocast(), torch.inference_mode():
            losses = []
            for batch in [*whole, *halves]:
                loss = self._workload.forward(to_device(batch.content, self._device))
                if not isinstance(loss, Loss):
                    return  # ``checked`` says why it is wrong
                losses.append(loss)
        check_is_sum(losses[0], losses[1:])

    def _judge(self, batch: Batch) -> dict[str, Mean]:
        """Return the figures of a test batch; leave the model evaluating."""
        self._workload.module.eval()
        if not batch.samples:
            return {}
        with self._autocast(), torch.inference_mode():
            figures = self._workload.evaluate(to_device(batch.content, self._device))
        return checked_figures(figures)
