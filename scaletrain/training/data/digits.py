"""1,797 handwritten digits, 8 x 8 grey, from the UCI repository (in scikit-learn's wheel; nothing is downloaded)."""

import torch
from torch.utils.data import Dataset, TensorDataset


def data(*, test_samples: int = 360) -> tuple[Dataset, Dataset]:
    """(train, test): images (1, 8, 8) float32, zero mean and unit variance over the training images; targets int64.

    The split is a fixed permutation, the same for every run and every seed.
    """
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1797))
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8)[order]
    targets = torch.from_numpy(labels).long()[order]
    train = images[test_samples:]
    images = (images - train.mean()) / train.std()
    return (
        TensorDataset(images[test_samples:], targets[test_samples:]),
        TensorDataset(images[:test_samples], targets[:test_samples]),
    )
