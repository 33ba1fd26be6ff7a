"""Predict the next symbols of endless Reber strings; a stream is solved without any error."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from scaletrain.training.data import reber
from scaletrain.training.models import lstm
from scaletrain.training.workload import Data, Loss, Mean, Workload


class Reber(Workload):
    """A long short-term memory that says which symbols may come next.

    Its figures are ``wrong``, the share of steps at which it is wrong about some symbol, and
    ``unsolved``, the share of test streams with such a step.

    Args:
        hidden: memory cells.
        forget: with forget gates.
        peepholes: gates see the cells.
        streams: for training.
        length: symbols of each of them.
        test_streams: for testing.
        test_length: symbols of each of them.
    """

    def __init__(
        self,
        *,
        hidden: int = 16,
        forget: bool = True,
        peepholes: bool = False,
        streams: int = 1000,
        length: int = 200,
        test_streams: int = 50,
        test_length: int = 2000,
    ):
        symbols = len(reber.SYMBOLS)
        self.model = lstm.model(
            inputs=symbols,
            hidden=hidden,
            classes=symbols,
            every_step=True,
            forget=forget,
            peepholes=peepholes,
        )
        train, test = reber.data(
            streams=streams, length=length, test_streams=test_streams, test_length=test_length
        )
        self.data = Data(train, test)

    def forward(self, batch: Any) -> Loss:
        """Return the cross entropy of each symbol's chance to come next, over streams."""
        inputs, targets = batch
        return self._loss(self.model(inputs), targets)

    def evaluate(self, batch: Any) -> dict[str, Mean]:
        """Return ``loss``, ``wrong`` and ``unsolved``."""
        inputs, targets = batch
        logits = self.model(inputs)
        is_wrong = ((logits.transpose(1, 2) > 0) != (targets > 0.5)).any(2)
        loss = self._loss(logits, targets)
        return {
            "loss": Mean(loss.total, loss.count),
            "wrong": Mean(is_wrong.sum(), is_wrong.numel()),
            "unsolved": Mean(is_wrong.any(1).sum(), len(is_wrong)),
        }

    def _loss(self, logits: Tensor, targets: Tensor) -> Loss:
        losses = functional.binary_cross_entropy_with_logits(
            logits.transpose(1, 2), targets, reduction="none"
        )
        return Loss(torch.sum(losses.mean((1, 2))), len(targets))
