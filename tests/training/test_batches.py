"""Tests of training/batches.py.

The order of samples does not depend on the number of workers. Bugs it catches: a sample seen
twice, a rank-dependent shuffle.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

from scaletrain.errors import UserError
from scaletrain.training.batches import GlobalBatches, load


@given(
    samples=st.integers(1, 300),
    batch=st.integers(1, 60),
    size=st.integers(1, 70),
    step=st.integers(0, 50),
)
def test_shares_are_the_global_batch(samples: int, batch: int, size: int, step: int):
    batch = min(batch, samples)
    batches = GlobalBatches(samples, batch, seed=3)
    shares = [batches.share(step, rank, size) for rank in range(size)]
    assert torch.equal(torch.cat(shares), GlobalBatches(samples, batch, seed=3).indices(step))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_an_epoch_sees_each_sample_at_most_once_and_epochs_differ():
    batches = GlobalBatches(50, 7, seed=0)
    assert batches.steps_per_epoch == 7
    epochs = [torch.cat([batches.indices(epoch * 7 + i) for i in range(7)]) for epoch in range(3)]
    for seen in epochs:
        assert len(seen.unique()) == 49
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(
        epochs[0], torch.cat([GlobalBatches(50, 7, seed=1).indices(i) for i in range(7)])
    )


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match="9 is more than the 8 training samples"):
        GlobalBatches(8, 9, seed=0)


class Squares(Dataset):
    """A person's map-style data set, not a TensorDataset."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([float(index)]), index * index


@pytest.mark.parametrize("workers", [0, 2])
def test_any_map_style_data_set_loads_the_named_samples_in_order(workers: int):
    batches = GlobalBatches(20, 6, seed=5)
    shares = [batches.share(step, 1, 2) for step in range(5)]
    loaded = list(load(Squares(), iter(shares), workers))
    assert [y.tolist() for _, y in loaded] == [(share**2).tolist() for share in shares]
    tensors = TensorDataset(torch.arange(20.0)[:, None], torch.arange(20) ** 2)
    for (x, y), (tx, ty) in zip(loaded, load(tensors, iter(shares), workers), strict=True):
        assert torch.equal(x, tx) and torch.equal(y, ty)
