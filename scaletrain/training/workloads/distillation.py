"""A small network learns what a large one says about each sample (distillation)."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Subset

from scaletrain import plugins
from scaletrain.config.schema import InitFrom
from scaletrain.errors import UserError
from scaletrain.training import weights
from scaletrain.training.workload import Data, Loss, Mean, Workload


class Distillation(Workload):
    """A student whose loss is T^2 times that of soft targets, beside that of labels.

    Source: Hinton, Vinyals and Dean 2015 (arXiv 1503.02531), section 2. Soft targets are the
    teacher's chances at a temperature: gradients from them fall with 1 / T^2, which the factor
    makes up for. All ranks have the same teacher, so none exchanges anything of it.

    Its figures are ``accuracy`` and, with ``left_out``, ``left_out_accuracy``: on samples of the
    class that the student has never seen, with its logit shifted (section 3).

    Args:
        student: a model's name and options.
        teacher: likewise, with ``run``: the run directory that its weights come from.
        dataset: a data set's name and options, of (input, class) samples.
        temperature: of the soft targets.
        soft: share of the loss that soft targets have, from 0 to 1; labels have the rest.
        samples: of the training set, drawn at random; 0: all.
        left_out: ``class`` is left out of the training set, and ``shift`` is added to its logit in
            the evaluation; empty: none is.
    """

    def __init__(
        self,
        *,
        student: dict,
        teacher: dict,
        dataset: dict,
        temperature: float = 4.0,
        soft: float = 0.9,
        samples: int = 0,
        left_out: dict = {},  # noqa: B006 (never changed)
    ):
        if not 0 <= soft <= 1 or temperature <= 0:
            raise UserError(
                f"workload: soft: {soft} and temperature: {temperature} are not allowed"
                " (allowed: 0 to 1, and above 0)"
            )
        of_teacher = dict(teacher)
        run = of_teacher.pop("run")
        self.teacher = _made("model", of_teacher)
        weights.load(InitFrom(path=str(Path(run).absolute())), self.teacher)
        self.teacher.requires_grad_(False).eval()
        self.model = _made("model", student)
        train, test = _made("data", dataset)
        kept = torch.randperm(len(train)).tolist()  # by the run's seed, on every rank alike
        if left_out:
            kept = [index for index in kept if int(train[index][1]) != left_out["class"]]
        self.data = Data(Subset(train, kept[: samples or None]), test)
        self._temperature = temperature
        self._soft = soft
        self._left_out = left_out

    def forward(self, batch: Any) -> Loss:
        """Return the weighted sum of both cross entropies over the samples."""
        inputs, targets = batch
        logits = self.model(inputs)
        total = (1 - self._soft) * functional.cross_entropy(logits, targets, reduction="sum")
        if self._soft:
            total = total + self._soft * self._temperature**2 * self._soft_loss(logits, inputs)
        return Loss(total, len(targets))

    def evaluate(self, batch: Any) -> dict[str, Mean]:
        """Return ``accuracy``, and ``left_out_accuracy`` if a class is left out."""
        inputs, targets = batch
        logits = self.model(inputs)
        if not self._left_out:
            return {"accuracy": Mean((logits.argmax(1) == targets).sum(), len(targets))}
        logits[:, self._left_out["class"]] += self._left_out["shift"]
        is_right = logits.argmax(1) == targets
        is_left_out = targets == self._left_out["class"]
        return {
            "accuracy": Mean(is_right.sum(), len(targets)),
            "left_out_accuracy": Mean((is_right & is_left_out).sum(), is_left_out.sum()),
        }

    def _soft_loss(self, logits: Tensor, inputs: Tensor) -> Tensor:
        """Return the sum of the cross entropies against the teacher's chances."""
        with torch.no_grad():
            self.teacher.to(inputs.device)
            chances = (self.teacher(inputs) / self._temperature).softmax(1)
        return functional.cross_entropy(logits / self._temperature, chances, reduction="sum")


def _made(kind: str, named: dict[str, Any]) -> Any:
    """Return what a plugin makes of its options."""
    options = {key: value for key, value in named.items() if key != "name"}
    return plugins.load(kind, named["name"])(**options)
