"""Tests of training/batches.py.

The order of samples does not depend on the number of workers. Bugs it catches: a sample seen
twice, a rank-dependent shuffle, a batch that depends on which process reads it, an unreadable
sample that is not named.
"""

import multiprocessing
import random
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import Dataset, TensorDataset

from scaletrain.errors import UserError
from scaletrain.training import batches as reading
from scaletrain.training.batches import GlobalBatches, Share, UnreadableSample


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
    assert [batches.share_size(rank, size) for rank in range(size)] == list(map(len, shares))


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


@pytest.mark.parametrize("seed", [-1, 2**64, -(2**70), 10**300])
def test_seeds_of_any_size_have_orders_of_their_own(seed: int):
    order = GlobalBatches(50, 50, seed).indices(0)
    assert order.sort().values.tolist() == list(range(50))
    assert order.tolist() != GlobalBatches(50, 50, seed=0).indices(0).tolist()


@pytest.mark.parametrize("samples", [1, 2, 3])
def test_few_samples_have_orders_too(samples: int):
    batches = GlobalBatches(samples, samples, seed=0)
    orders = {tuple(batches.indices(epoch).tolist()) for epoch in range(60)}
    assert len(orders) == [1, 2, 6][samples - 1]


def test_steps_may_be_asked_for_in_any_order():
    batches = GlobalBatches(50, 7, seed=0)
    forwards = [batches.indices(step).tolist() for step in range(30)]
    assert [batches.indices(step).tolist() for step in reversed(range(30))] == forwards[::-1]
    assert [batches.epoch(step) for step in (0, 6, 7, 14)] == [0, 0, 1, 2]


def test_shares_of_a_run_name_epochs_and_samples():
    batches = GlobalBatches(10, 4, seed=0)
    shares = list(batches.shares(1, 5, rank=1, size=2))
    assert [share.epoch for share in shares] == [0, 1, 1, 2]
    for step, share in enumerate(shares, start=1):
        assert torch.equal(share.indices, batches.share(step, 1, 2))


def test_thirty_million_samples_cost_a_step_milliseconds_and_no_memory():
    batches = GlobalBatches(30_000_000, 1024, seed=0)

    def seconds(step: int) -> float:
        began = time.perf_counter()
        batches.share(step, 1, 4)
        return time.perf_counter() - began

    # Each of them begins an epoch. The least of some tries: other processes run beside this one.
    first_steps = [epoch * batches.steps_per_epoch for epoch in range(1, 11)]
    assert min(map(seconds, first_steps)) < 0.005
    tracemalloc.start()
    batches.share(0, 1, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6  # bytes; the whole order has 240e6


def load(*arguments: Any, **options: Any) -> Iterator[Any]:
    """What ``collate`` made of each batch."""
    return (batch.content for batch in reading.load(*arguments, **options))


class Squares(Dataset):
    """A person's map-style data set, not a TensorDataset."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return torch.tensor([float(index)]), index * index


def named(batches: list[torch.Tensor]) -> Any:
    return (Share(0, indices) for indices in batches)


@pytest.mark.parametrize("workers", [0, 2])
def test_any_map_style_data_set_loads_the_named_samples_in_order(workers: int):
    batches = GlobalBatches(20, 6, seed=5)
    shares = [batches.share(step, 1, 2) for step in range(5)]
    loaded = list(load(Squares(), named(shares), workers, seed=0))
    assert [y.tolist() for _, y in loaded] == [(share**2).tolist() for share in shares]
    tensors = TensorDataset(torch.arange(20.0)[:, None], torch.arange(20) ** 2)
    for (x, y), (tx, ty) in zip(loaded, load(tensors, named(shares), workers, 0), strict=True):
        assert torch.equal(x, tx) and torch.equal(y, ty)


class Noisy(Dataset):
    """Nested samples with numbers from the three global generators."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict[str, Any]:
        drawn = (random.random(), np.random.rand())
        return {"index": index, "noise": {"torch": torch.rand(2), "others": drawn}}


def rows(batches: Any) -> set[tuple[float, ...]]:
    """Everything in the batches, sample by sample."""
    seen = set()
    for batch in batches:
        noise = batch["noise"]
        columns = (batch["index"], *noise["torch"].T, *noise["others"])
        seen |= set(zip(*[column.tolist() for column in columns], strict=True))
    return seen


def read(workers: int, size: int, epochs: int = 3, seed: int = 0) -> set[tuple[float, ...]]:
    batches = GlobalBatches(20, 5, seed=0)
    seen: set[tuple[float, ...]] = set()
    for rank in range(size):
        shares = batches.shares(0, 4 * epochs, rank, size)
        seen |= rows(load(Noisy(), shares, workers, seed))
    return seen


@pytest.mark.parametrize(("workers", "size"), [(1, 1), (2, 1), (0, 2), (2, 3), (0, 5)])
def test_a_sample_is_the_same_whoever_reads_it(workers: int, size: int):
    alone = read(0, 1)
    assert len({row[1:] for row in alone}) == 60, "each sample of each epoch draws its own"
    assert read(workers, size) == alone
    assert read(workers, size, epochs=1, seed=1).isdisjoint(alone)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_an_empty_share_has_no_batch(workers: int):
    empty = torch.arange(0)
    shares = [torch.tensor([1, 2]), empty, torch.tensor([3])]
    for dataset in (Squares(), TensorDataset(torch.arange(20), torch.arange(20) ** 2)):
        loaded = list(load(dataset, named(shares), workers, 0))
        assert [y.tolist() for _, y in loaded] == [[1, 4], [9]]
        assert list(load(dataset, named([empty]), workers, 0)) == []


def joined(samples: list[Any]) -> str:
    return " ".join(str(sample[1]) for sample in samples)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_collate_of_ones_own_makes_the_batches(workers: int):
    share = torch.tensor([3, 1])
    assert list(load(Squares(), named([share]), workers, 0, collate=joined)) == ["9 1"]
    tensors = TensorDataset(torch.arange(20), torch.arange(20))
    assert next(load(tensors, named([share]), workers, 0, collate=len)) == 2  # type: ignore[arg-type]


class Doubled(TensorDataset):
    """Derived from TensorDataset, and augments each sample."""

    def __getitem__(self, index: int) -> Any:
        return self.tensors[0][index] * 2 + 0 * random.random() + torch.rand(())


def test_a_subclass_of_tensor_dataset_reads_its_samples_itself():
    share = torch.arange(4)
    batch = next(load(Doubled(torch.arange(20.0)), named([share]), 0, 0))
    assert (batch // 2).tolist() == [0.0, 1.0, 2.0, 3.0]
    assert len(set((batch % 2).tolist())) == 4


class Unsendable(Exception):
    """Cannot be made of what pickle keeps of it."""

    def __init__(self, file: str, line: int):
        super().__init__(f"{file}, line {line}")


class Closed(Exception):
    """Cannot be pickled."""

    def __init__(self) -> None:
        super().__init__("no way", lambda: None)


def raise_value_error() -> None:
    raise ValueError("no image\nin two lines")


def raise_unsendable() -> None:
    raise Unsendable("a.png", 3)


def raise_closed() -> None:
    raise Closed


def raise_connection_error() -> None:
    raise ConnectionResetError


class Broken(Squares):
    def __init__(self, fail: Callable[[], None]):
        self.fail = fail

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == 7:
            self.fail()
        return super().__getitem__(index)


MISHAPS: list[tuple[Callable[[], None], str, type[Exception]]] = [
    (raise_value_error, "ValueError: no image", ValueError),
    (raise_unsendable, "Unsendable: a.png, line 3", Unsendable),
    (raise_closed, "Closed: ('no way', <function Closed", Closed),
    (raise_connection_error, "ConnectionResetError", ConnectionResetError),
]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(("fail", "text", "kind"), MISHAPS)
def test_an_unreadable_sample_is_named_in_one_line(
    fail: Callable[[], None], text: str, kind: type[Exception], workers: int
):
    shares = [torch.arange(5), torch.arange(5, 10), torch.arange(10, 15)]
    loaded = load(Broken(fail), named(shares), workers, 0)
    assert len(next(loaded)[0]) == 5, "the batch before is whole"
    with pytest.raises(UnreadableSample) as raised:
        next(loaded)
    assert isinstance(raised.value, UserError)
    message = str(raised.value)
    assert message.startswith(f"data: sample 7 cannot be read: {text}")
    assert message.endswith("(bad_samples: {skip: 10} leaves up to ten such samples out)")
    assert "\n" not in message
    cause = raised.value.__cause__
    if kind in (Unsendable, Closed) and workers:
        assert isinstance(cause, RuntimeError) and kind.__name__ in str(cause)
    else:
        assert isinstance(cause, kind)
    if workers:
        assert fail.__name__ in cause.__notes__[0], "where it happened"
    assert multiprocessing.active_children() == [], "the loader processes have ended"


def _never(samples: list[Any]) -> Any:
    raise ValueError("cannot pad")


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_cannot_be_collated_are_named(workers: int):
    loaded = load(Squares(), named([torch.tensor([3, 1])]), workers, 0, collate=_never)
    with pytest.raises(UserError, match=r"samples 3, 1 cannot be collated: ValueError: cannot pad"):
        next(loaded)


def _short(samples: list[Any]) -> Any:
    """Collate all samples but those of odd numbers, which it cannot."""
    if any(target % 2 for _, target in samples):
        raise ValueError("odd")
    return [target for _, target in samples]


@pytest.mark.parametrize("workers", [0, 1])
def test_samples_that_cannot_be_read_are_left_out_and_named(workers: int):
    shares = [torch.tensor([6, 7, 8]), torch.tensor([7])]
    dataset = Broken(raise_value_error)
    found = list(reading.load(dataset, named(shares), workers, 0, leaves_out=True))
    assert [batch.samples for batch in found] == [[6, 8], []]
    assert found[0].content[1].tolist() == [36, 64] and found[1].content is None
    expected = ["data: sample 7 cannot be read: ValueError: no image"]
    assert [batch.left_out for batch in found] == [expected, expected]


def test_samples_that_cannot_be_collated_are_found_one_by_one():
    share = torch.tensor([2, 3, 4, 5])
    (found,) = reading.load(Squares(), named([share]), 0, 0, collate=_short, leaves_out=True)
    assert found.content == [4, 16] and found.samples == [2, 4]
    assert found.left_out == [
        "data: sample 3 cannot be collated: ValueError: odd",
        "data: sample 5 cannot be collated: ValueError: odd",
    ]
