"""The loss of a step over all ranks: the weight of this rank's part, and its record."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from scaletrain.errors import UserError
from scaletrain.training.batches import Batch
from scaletrain.training.exchange import Exchange
from scaletrain.training.feed import DataEnded, StepInput
from scaletrain.training.workload import Loss, Mean, Workload


def checked(loss: Any) -> Loss:
    """Return the loss that a workload's ``forward`` returned, if one can train with it.

    Raises:
        UserError: it is no ``Loss`` of a scalar with a gradient and a number.
    """
    if not isinstance(loss, Loss):
        raise UserError(
            f"workload: forward returned a {type(loss).__name__} (allowed: scaletrain.Loss(total,"
            " count))"
        )
    total = loss.total
    if not isinstance(total, torch.Tensor) or total.numel() != 1 or not total.requires_grad:
        described = f"a {type(total).__name__}"
        if isinstance(total, torch.Tensor):
            gradient = "with" if total.requires_grad else "without"
            described = f"a tensor of shape {tuple(total.shape)} {gradient} a gradient"
        raise UserError(
            f"workload: the total of forward's loss is {described} (allowed: a scalar tensor with a"
            " gradient, the sum over the batch)"
        )
    _check_number(loss.count, "the count of forward's loss")
    return loss


# A sum over a batch is at least the larger half's plus this part of it, unless the other half is
# smaller still; a mean, or a sum of several means, lies between the halves' or close by.
_SMALLER_HALF = 0.25
_CLOSE_BY = 1.1


def check_is_sum(whole: Loss, halves: Sequence[Loss]) -> None:
    """Raise ``UserError`` if a loss's total is a mean over its batch.

    Weighted by shares and counts, a mean would train at a wrong rate and give a wrong mean.

    Args:
        whole: of a batch.
        halves: of its two halves, with the same weights.
    """
    counts = [float(half.count) for half in halves]
    if not all(counts) or not math.isclose(float(whole.count), sum(counts), rel_tol=1e-6):
        return
    total = abs(float(whole.total))
    totals = [float(half.total) for half in halves]
    smaller, larger = sorted(abs(each) for each in totals)
    if min(totals) < 0 < max(totals) or smaller < _SMALLER_HALF * larger:
        return  # they tell nothing
    if 0 < total <= _CLOSE_BY * larger:
        raise UserError(
            f"workload: the total of forward's loss looks like a mean: {float(whole.total):.4g} for a batch,"
            f" {totals[0]:.4g} and {totals[1]:.4g} for its halves (allowed: the sum over the batch,"
            " such as reduction='sum')"
        )


def checked_figures(figures: Any) -> dict[str, Mean]:
    """Return the figures that a workload's ``evaluate`` returned.

    Raises:
        UserError: it is no dict of ``Mean`` by name.
    """
    is_dict = isinstance(figures, dict)
    if is_dict and all(isinstance(figure, Mean) for figure in figures.values()):
        return figures
    raise UserError(
        'workload: evaluate returned something else than a dict of means, such as {"loss":'
        " scaletrain.Mean(total, count)}"
    )


def _check_number(count: Any, name: str) -> None:
    """Raise ``UserError`` if a count is no number. Does not wait for the device."""
    is_scalar = isinstance(count, torch.Tensor) and count.numel() == 1
    if is_scalar or isinstance(count, int | float):
        return
    described = f"a {type(count).__name__}"
    if isinstance(count, torch.Tensor):
        described = f"a tensor of shape {tuple(count.shape)}"
    raise UserError(f"workload: {name} is {described} (allowed: a number or a scalar tensor)")


class GlobalMean:
    """Weighs this rank's totals, so that the exchange yields the global mean's gradient.

    A step follows the gradient of (sum of all totals) / (sum of all counts), over ranks and
    backward passes. An exchange averages over ranks, so each total is multiplied by
    ``size / (sum of all counts)``.

    Where the mean is over samples and their number is fixed, every rank knows that sum. Otherwise
    this rank's count leaves for the others when the object is made, and ``weight`` waits for
    theirs: make it before forward. An exchange that does not average all ranks
    (``Exchange.averages``) gets each rank's own mean.

    Args:
        workload: counts the samples or tokens of a batch.
        exchange: carries the counts. With groups, the means are over each group, and the
            number of samples of a step is the same for all groups.
        batches: of this rank's backward passes, on the device.
        step_input: of this rank.

    Raises:
        DataEnded: this rank has no more samples, and does not meet the others.
    """

    def __init__(
        self,
        workload: Workload,
        exchange: Exchange,
        batches: Sequence[Batch],
        step_input: StepInput,
    ):
        group = exchange.group
        self._size = group.world.size
        self._weight: float | None = None  # once it is known
        self._finish: Callable[[], torch.Tensor] | None = None
        self._own: float = step_input.num_samples
        self._is_stand_in = step_input.is_stand_in
        # Seconds of waiting for the other ranks' counts: in this constructor, and in ``weight``.
        self.wait_in_forward_s = 0.0
        self.wait_in_backward_s = 0.0
        # Samples that could not be read, of all ranks once ``weight`` has waited for them.
        self.left_out = len(step_input.left_out)
        if not workload.counts_samples and not step_input.is_stand_in:
            self._own = 0.0
            for batch in batches:
                count = workload.count(batch.content)
                _check_number(count, "count(batch)")
                self._own += float(count)
        is_known = workload.counts_samples and step_input.global_batch is not None
        if exchange.averages and (step_input.may_end or not is_known):
            facts = [self._own, not step_input.has_ended, self.left_out]
            began = time.perf_counter()
            self._finish = group.begin_sum(torch.tensor(facts, dtype=torch.float64))
            self.wait_in_forward_s = time.perf_counter() - began
        elif step_input.has_ended:
            raise DataEnded
        elif is_known:
            # Each group has an equal part of the batch, as it has of the ranks.
            self._weight = exchange.world.size / step_input.global_batch  # type: ignore[operator]
        else:
            self._weight = 1 / self._own if self._own else 0.0

    def weight(self) -> float:
        """Return the factor of a total; wait for the other ranks' counts at first.

        Raises:
            DataEnded: no rank has a sample any more.
        """
        if self._weight is None:
            assert self._finish is not None
            began = time.perf_counter()
            count, num_ranks, left_out = self._finish().tolist()
            self.wait_in_backward_s = time.perf_counter() - began
            if not num_ranks:
                raise DataEnded
            self.left_out = int(left_out)
            self._weight = self._size / count if count else 0.0  # no rank has anything to learn
        return 0.0 if self._is_stand_in else self._weight

    def check(self, count: float) -> None:
        """Raise ``UserError`` if forward's count differs from the one that was announced.

        Otherwise the gradient would be scaled wrongly without a sign of it.
        """
        if not math.isclose(count, self._own, rel_tol=1e-6):
            raise UserError(
                f"workload: forward counted {count:g} where count(batch) and the number of samples"
                f" say {self._own:g}: let count(batch) return what the loss is a mean over"
            )


class StepLoss:
    """This rank's loss of one update: the sum over its backward passes.

    Totals stay on the device. Reading one after each pass would stall the stream.
    """

    def __init__(self) -> None:
        self._total: torch.Tensor | float = 0.0
        self._count: torch.Tensor | float = 0.0
        self._parts: dict[str, torch.Tensor | float] = {}

    @classmethod
    def of_updates(cls, losses: "Mapping[str, StepLoss]") -> "StepLoss":
        """Return the loss of a step from the losses of its updates.

        With several it is their sum, and each of them is a part: they are over the same count.
        """
        if len(losses) == 1:
            return next(iter(losses.values()))
        joined = cls()
        for name, loss in losses.items():
            joined._total = joined._total + loss._total
            joined._count = loss._count
            joined._parts[name] = loss._total
            joined._parts |= loss._parts
        return joined

    def add(self, loss: Loss) -> None:
        """Add the loss of one backward pass."""
        total = loss.total.detach()
        is_first = isinstance(self._total, float)  # then there is nothing to add it to
        self._total = total if is_first else self._total + total
        self._count = self._count + loss.count
        for name, total in loss.parts.items():
            self._parts[name] = self._parts.get(name, 0.0) + total.detach()

    @property
    def total(self) -> float:
        """The sum so far. Waits for the device."""
        return float(self._total)

    @property
    def count(self) -> float:
        """Number of samples, tokens, ... of the mean. Waits for the device."""
        return float(self._count)

    @property
    def mean(self) -> float:
        """The mean over this rank's samples, tokens or whatever it counts; 0 without any."""
        return self.total / self.count if self.count else 0.0

    def parts(self) -> dict[str, float]:
        """Return the means of the loss's parts, those that are finite."""
        means = {}
        for name, total in self._parts.items():
            mean = float(total) / self.count if self.count else 0.0
            if math.isfinite(mean):
                means[name] = mean
        return means
