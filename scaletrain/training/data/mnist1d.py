"""MNIST-1D: ten classes of 40 numbers each, made by its package: nothing is downloaded."""

from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge
from torch.utils.data import Dataset, TensorDataset

from scaletrain.needs import Needs

NEEDS = Needs(package="mnist1d", fix='pip install "scaletrain[data]"')


def data(*, samples: Annotated[int, Ge(50)] = 5000, seed: int = 42) -> tuple[Dataset, Dataset]:
    """Return (train, test): sequences (40, 1) float32, targets int64; a fifth is for testing.

    Source: S. Greydanus, "Scaling down deep learning", 2020 (arXiv 2011.14439). The defaults are
    those of the paper.

    Args:
        samples: of both sets together.
        seed: of the shifts, shears and noise.

    Raises:
        UserError: the package is not installed.
    """
    NEEDS.check_installed("data: mnist1d")
    from mnist1d.data import get_dataset_args, make_dataset

    options = get_dataset_args()
    options.num_samples = samples
    options.seed = seed
    # The package seeds numpy's global generator, and prints nothing. The generator is not its own.
    before = np.random.get_state()
    try:
        made = make_dataset(options)
    finally:
        np.random.set_state(before)
    parts = []
    for suffix in ("", "_test"):
        inputs = torch.from_numpy(np.asarray(made[f"x{suffix}"], dtype=np.float32))
        targets = torch.from_numpy(np.asarray(made[f"y{suffix}"], dtype=np.int64))
        parts.append(TensorDataset(inputs[..., None], targets))
    return parts[0], parts[1]
