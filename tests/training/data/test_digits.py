"""Tests of training/data/digits.py.

The digits are read from scikit-learn's wheel without importing it; they must be what it would
have read.
"""

import torch
from sklearn.datasets import load_digits

from scaletrain.training.data import digits


def test_the_images_are_those_of_scikit_learn():
    train, test = digits.data()
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(1797))
    assert (len(train), len(test)) == (1437, 360)
    assert torch.equal(
        torch.cat([test.tensors[1], train.tensors[1]]), torch.from_numpy(labels).long()[order]
    )
    images = torch.cat([test.tensors[0], train.tensors[0]]).view(-1, 64).double()
    expected = torch.from_numpy(pixels)[order]
    scaled = (expected - expected[360:].mean()) / expected[360:].std()
    assert torch.allclose(images, scaled, atol=1e-5)
