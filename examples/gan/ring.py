"""A GAN learns points on a ring: two models with an optimizer each, trained by turns."""

import math

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from torch.utils.data import Dataset, TensorDataset

from scaletrain import Data, Loss, Mean, Update, Workload

NOISE = 4  # numbers that the generator makes a point of
MODES = 8  # places on the ring


def network(inputs: int, outputs: int, width: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, width),
        nn.LeakyReLU(0.2),
        nn.Linear(width, outputs),
    )


def centres() -> torch.Tensor:
    angles = 2 * math.pi * torch.arange(MODES) / MODES
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def points(samples: int, seed: int) -> Dataset:
    random = torch.Generator().manual_seed(seed)
    mode = torch.arange(samples) % MODES
    noise = torch.randn(samples, 2, generator=random)
    return TensorDataset(centres()[mode] + 0.05 * noise)


class Ring(Workload):
    """The discriminator is updated first, then the generator, in every step."""

    def __init__(self, *, samples: int = 4096, width: int = 64, lr: float = 0.001):
        self.generator = network(NOISE, 2, width)
        self.discriminator = network(2, 1, width)
        self.data = Data(points(samples, seed=1), points(1024, seed=2))
        betas = (0.5, 0.9)
        judge = torch.optim.Adam(self.discriminator.parameters(), lr=lr, betas=betas)
        fool = torch.optim.Adam(self.generator.parameters(), lr=lr, betas=betas)
        self.updates = [
            Update("discriminator", judge, self.judge),
            Update("generator", fool, self.fool),
        ]

    def generate(self, count: int) -> torch.Tensor:
        device = next(self.generator.parameters()).device
        return self.generator(torch.randn(count, NOISE, device=device))

    def judge(self, batch: list[torch.Tensor]) -> Loss:
        (real,) = batch
        with torch.no_grad():
            made = self.generate(len(real))
        # Both in one forward pass, as DDP wants it.
        verdicts = self.discriminator(torch.cat([real, made])).squeeze(1)
        truth = torch.cat([torch.ones(len(real)), torch.zeros(len(made))]).to(verdicts)
        return Loss(cross_entropy(verdicts, truth, reduction="sum"), len(real))

    def fool(self, batch: list[torch.Tensor]) -> Loss:
        (real,) = batch
        verdicts = self.discriminator(self.generate(len(real))).squeeze(1)
        return Loss(cross_entropy(verdicts, torch.ones_like(verdicts), reduction="sum"), len(real))

    def evaluate(self, batch: list[torch.Tensor]) -> dict[str, Mean]:
        """Return how near to a place the made points lie, and which share of places they reach."""
        (real,) = batch
        distances = torch.cdist(self.generate(len(real)), centres().to(real))
        nearest, place = distances.min(dim=1)
        is_near = nearest < 0.25
        reached = place[is_near].unique().numel()
        return {
            "near": Mean(is_near.sum(), len(real)),
            "reached": Mean(reached * len(real), MODES * len(real)),
        }
