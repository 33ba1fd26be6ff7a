"""Evaluation: the means over the test set, which all ranks share out."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from scaletrain.errors import UserError
from scaletrain.run import progress
from scaletrain.training.batches import Share, load, to_device
from scaletrain.training.exchange import Exchange
from scaletrain.training.finite import finite_or_none
from scaletrain.training.losses import checked_figures
from scaletrain.training.workload import Mean, Workload
from scaletrain.world import World

_BATCH = 256  # samples of one forward pass


class Evaluation:
    """One worker's part of each evaluation.

    Args:
        workload: judges batches of its test set.
        exchange: sums totals and counts over the ranks.
        world: this worker's place.
        device: where the model lies.
        autocast: returns the context in which forward runs.
        seed: of the run; samples are read under it.
    """

    def __init__(
        self,
        workload: Workload,
        exchange: Exchange,
        world: World,
        device: torch.device,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
        seed: int,
    ):
        self._workload = workload
        self._exchange = exchange
        self._world = world
        self._device = device
        self._autocast = autocast
        self._seed = seed

    def run(self) -> dict[str, float | None]:
        """Return the means over the test set (collective).

        It uses this rank's statistics of the model: make them the mean of all ranks' beforehand.

        Returns:
            ``test_<name>`` of each figure of ``Workload.evaluate``, and always ``test_loss`` and
            ``test_accuracy``; None where there is no such figure, or it is not finite.
        """
        num_samples = len(self._workload.data.test)  # type: ignore[arg-type]
        mine = torch.arange(num_samples)[self._world.rank :: self._world.size]
        # A rank without samples reads the first one, to learn which figures there are.
        reads_for_names = num_samples > 0 and len(mine) == 0
        if reads_for_names:
            mine = torch.zeros(1, dtype=torch.int64)
        sums: dict[str, list[float]] = {}  # total and count, of this rank
        module = self._workload.module
        was_training = module.training
        for means in self._judge(mine):
            progress.alive("evaluating")
            for name, mean in means.items():
                own = sums.setdefault(name, [0.0, 0.0])
                own[0] += float(mean.total)
                own[1] += float(mean.count)
        module.train(was_training)

        figures: dict[str, float | None] = {"test_loss": None, "test_accuracy": None}
        if sums:
            local = torch.tensor([*sums.values()], dtype=torch.float64)  # shape (figures, 2)
            if reads_for_names:
                local.zero_()
            totals = self._exchange.sum(local.flatten()).view(-1, 2).tolist()
            for name, (total, count) in zip(sums, totals, strict=True):
                figures[f"test_{name}"] = finite_or_none(total / count) if count else None
        return figures

    def rehearse(self, num_samples: int, needs_accuracy: bool) -> None:
        """Evaluate a few test samples on this rank alone, to find faults before training begins.

        Args:
            num_samples: at most so many.
            needs_accuracy: whether there must be a figure ``accuracy``.

        Raises:
            UserError: evaluation returns no means, or not the one that is needed.
        """
        there_are: int = len(self._workload.data.test)  # type: ignore[arg-type]
        for figures in self._judge(torch.arange(min(there_are, num_samples))):
            if needs_accuracy and "accuracy" not in figures:
                raise UserError(
                    "target_accuracy: evaluation has no figure accuracy, so it is never"
                    f" reached (there are: {', '.join(figures)})"
                )

    def _judge(self, samples: torch.Tensor) -> Iterator[dict[str, Mean]]:
        """Yield the figures of these test samples, batch by batch; leave the model evaluating."""
        self._workload.module.eval()
        data = self._workload.data
        shares = (Share("test", part) for part in samples.split(_BATCH))
        for batch in load(data.test, shares, 0, self._seed, data.collate):
            with self._autocast(), torch.inference_mode():
                figures = self._workload.evaluate(to_device(batch, self._device))
            yield checked_figures(figures)
