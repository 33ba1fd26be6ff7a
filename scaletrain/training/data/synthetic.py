"""Random images of any shape, with labels from a fixed random linear teacher: for measuring."""

from typing import Annotated

import torch
from annotated_types import Ge, MinLen
from torch.utils.data import Dataset, TensorDataset

from scaletrain.needs import CountsSamples


def data(
    *,
    samples: Annotated[int, Ge(1), CountsSamples()] = 4096,
    shape: Annotated[list[Annotated[int, Ge(1)]], MinLen(1)] = [3, 32, 32],  # noqa: B006 (never changed)
    classes: Annotated[int, Ge(1)] = 10,
    test_samples: Annotated[int, Ge(1)] = 512,
    seed: int = 0,
) -> tuple[Dataset, Dataset]:
    """Return (train, test): inputs float32 standard normal, targets int64.

    Args:
        samples: of the training set.
        shape: of one input.
        classes: a target is the index of the teacher's largest output.
        test_samples: of the test set.
        seed: of inputs and teacher.
    """
    random = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples + test_samples, *shape, generator=random)
    teacher = torch.randn(inputs[0].numel(), classes, generator=random)
    targets = (inputs.flatten(1) @ teacher).argmax(1)
    return TensorDataset(inputs[:samples], targets[:samples]), TensorDataset(
        inputs[samples:], targets[samples:]
    )
