"""Handwritten digits, some for training and others for fine-tuning, and a network with a head."""

import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from scaletrain.training.data import digits as all_digits


class Network(nn.Module):
    """Features of an image, and a head that tells classes by them."""

    def __init__(self, classes: int):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.head = nn.Linear(32 * 4 * 4, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))


def network(*, classes: int) -> nn.Module:
    return Network(classes)


def digits(*, first: int, last: int) -> tuple[Dataset, Dataset]:
    """Return (train, test): images of the digits from first to last, as classes from 0 on."""
    chosen = []
    for dataset in all_digits.data():
        images, targets = dataset[:]
        among = (targets >= first) & (targets <= last)
        chosen.append(TensorDataset(images[among], targets[among] - first))
    train, test = chosen
    return train, test
