"""Two inputs and two losses: which digit is the upper half of? Does the lower half belong to it?"""

import random

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset

from scaletrain import Data, Loss, Mean, Workload


class Pairs(Dataset):
    """Halves of pictures. Every other lower half, or so, is that of another digit.

    Which ones is drawn anew in each epoch. The generator is seeded by the sample's place, so the
    draw depends on neither workers, loader processes nor resumes.
    """

    def __init__(self, pictures: Tensor, digits: Tensor):
        self._pictures = pictures
        self._digits = digits

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        other = index
        belongs = random.random() < 0.5
        while not belongs and self._digits[other] == self._digits[index]:
            other = random.randrange(len(self))
        return {
            "upper": self._pictures[index, :4],
            "lower": self._pictures[other, 4:],
            "digit": self._digits[index],
            "belongs": torch.tensor(float(belongs)),
        }


class Network(nn.Module):
    """Two encoders, whose outputs two heads share."""

    def __init__(self, width: int):
        super().__init__()
        self.upper = nn.Sequential(nn.Flatten(), nn.Linear(32, width), nn.ReLU())
        self.lower = nn.Sequential(nn.Flatten(), nn.Linear(32, width), nn.ReLU())
        self.both = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU())
        self.digit = nn.Linear(width, 10)
        self.belongs = nn.Linear(width, 1)

    def forward(self, upper: Tensor, lower: Tensor) -> tuple[Tensor, Tensor]:
        """(n, 4, 8) twice -> (n, 10) and (n,) logits."""
        both = self.both(torch.cat([self.upper(upper), self.lower(lower)], dim=1))
        return self.digit(both), self.belongs(both).squeeze(1)


class Halves(Workload):
    """The loss is the sum of two, and records have both.

    Args:
        width: units of each layer.
    """

    def __init__(self, *, width: int = 64):
        self.model = Network(width)
        scanned = load_digits()
        pictures = torch.tensor(scanned.images, dtype=torch.float32) / 16
        digits = torch.tensor(scanned.target)
        cut = len(digits) * 4 // 5
        self.data = Data(Pairs(pictures[:cut], digits[:cut]), Pairs(pictures[cut:], digits[cut:]))

    def forward(self, batch: dict[str, Tensor]) -> Loss:
        digit, belongs = self.model(batch["upper"], batch["lower"])
        parts = {
            "digit": functional.cross_entropy(digit, batch["digit"], reduction="sum"),
            "belongs": functional.binary_cross_entropy_with_logits(
                belongs, batch["belongs"], reduction="sum"
            ),
        }
        return Loss(parts["digit"] + parts["belongs"], len(batch["digit"]), parts)

    def evaluate(self, batch: dict[str, Tensor]) -> dict[str, Mean]:
        """Return how often each of the two answers is right."""
        digit, belongs = self.model(batch["upper"], batch["lower"])
        right = (digit.argmax(1) == batch["digit"]).sum()
        judged_right = ((belongs > 0) == (batch["belongs"] > 0.5)).sum()
        count = len(batch["digit"])
        return {"accuracy": Mean(right, count), "belongs": Mean(judged_right, count)}
