"""A person's own model and data: which of three spirals does a point belong to?"""

import torch
from torch import nn
from torch.utils.data import TensorDataset


def network(*, hidden: int = 32) -> nn.Module:
    return nn.Sequential(
        nn.Linear(2, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), nn.Linear(hidden, 3)
    )


def dataset(*, samples: int = 1500, noise: float = 0.1) -> tuple[TensorDataset, TensorDataset]:
    random = torch.Generator().manual_seed(0)  # every worker draws the same points
    arm = torch.arange(samples) % 3
    radius = torch.rand(samples, generator=random)
    angle = 4 * radius + arm * 2.094 + noise * torch.randn(samples, generator=random)
    points = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)
    cut = samples * 4 // 5
    return TensorDataset(points[:cut], arm[:cut]), TensorDataset(points[cut:], arm[cut:])
