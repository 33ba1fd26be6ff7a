"""Tests of training/stream.py.

Ranks and loader processes share a stream out without loss or doubling, and it goes on from any
place bit by bit. Bugs it catches: a sample that is lost at the end of a pass or in the other loader
process, randomness that depends on who reads, a state that belongs to samples read ahead.
"""

import itertools
import multiprocessing
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, get_worker_info

from scaletrain.errors import UserError
from scaletrain.run import progress
from scaletrain.training import stream
from scaletrain.training.batches import Assembler, UnreadableSample, cut
from scaletrain.training.stream import Place, Reader, Stream, StreamStep, StreamSteps, is_stream

LENGTH = 13


class Plain(IterableDataset):
    """Numbers with noise of two global generators, in another order in each pass."""

    def __iter__(self) -> Iterator[tuple[int, float, torch.Tensor]]:
        order = list(range(LENGTH))
        random.shuffle(order)
        for number in order:
            yield number, random.random(), torch.rand(())


class Counter:
    """A stream that is its own iterator, and can go to any place."""

    def __init__(self) -> None:
        self.number = 0
        self.loaded: list[int] = []

    def __iter__(self) -> "Counter":
        return self

    def __next__(self) -> tuple[int, float, torch.Tensor]:
        if self.number == LENGTH:
            raise StopIteration
        self.number += 1
        return self.number - 1, random.random(), torch.rand(())

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number = state["number"]
        self.loaded.append(self.number)


class Generated(Counter):
    """The same, by a generator over the data set's own state."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        while self.number < LENGTH:
            yield self.__next__()


class Apart:
    """The same, with the state in the iterator."""

    def __iter__(self) -> Counter:
        return Counter()


class Splitting(Plain):
    """Leaves samples to other loader processes, as torch's documentation has it."""

    def __iter__(self) -> Iterator[tuple[int, float, torch.Tensor]]:
        info = get_worker_info()
        for number, sample in enumerate(super().__iter__()):
            if info is None or number % info.num_workers == info.id:
                yield sample


def steps(
    dataset: Any,
    rank: int = 0,
    size: int = 1,
    loaders: int = 0,
    place: Place = Place(),  # noqa: B008 (never changed)
    count: int = 9,
    passes: int = 1,
    batch_size: int = 5,
) -> list[StreamStep]:
    share = cut(batch_size, rank, size)
    assembler = Assembler(lambda samples: samples, leaves_out=False)
    reading = StreamSteps(Stream(dataset, 3), place, batch_size, share, passes, assembler)
    loaded = reading.load(loaders)
    return [step for step, _ in zip(loaded, range(count), strict=False)]


def rows(found: list[StreamStep]) -> list[list[tuple]]:
    """The samples of each step."""
    return [
        [
            (number, noise, other.item())
            for batch in step.batches
            for number, noise, other in batch.content
        ]
        for step in found
    ]


@pytest.mark.parametrize("dataset", [Plain, Counter, Generated, Apart, Splitting])
@pytest.mark.parametrize(("size", "loaders"), [(1, 2), (2, 0), (3, 1), (7, 0)])
def test_shares_of_a_stream_are_the_stream(dataset: type, size: int, loaders: int):
    alone = rows(steps(dataset()))
    # Nine steps of five are three passes and a half: each number comes as often.
    numbers = [number for step in alone for number, _, _ in step]
    for first in range(0, 39, LENGTH):
        assert sorted(numbers[first : first + LENGTH]) == list(range(LENGTH))
    assert len({noise for step in alone for _, noise, _ in step}) == 45
    ranks = [rows(steps(dataset(), rank, size, loaders)) for rank in range(size)]
    assert [[*itertools.chain(*parts)] for parts in zip(*ranks, strict=True)] == alone
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("dataset", [Plain, Counter, Generated, Apart])
@pytest.mark.parametrize("done", [1, 3, 6])
def test_a_stream_goes_on_from_any_place(dataset: type, done: int):
    undisturbed = steps(dataset())
    place = steps(dataset(), 1, 2, loaders=2)[done - 1].place
    assert place == undisturbed[done - 1].place, "of the step, not of what was read ahead"
    went_on = steps(dataset(), 0, 1, place=place, count=9 - done)
    assert rows(went_on) == rows(undisturbed)[done:]


@pytest.mark.parametrize("loaders", [0, 1, 2])
def test_signs_of_life_on_the_way_to_a_place_change_no_order(
    loaders: int, monkeypatch: pytest.MonkeyPatch
):
    alive: list[str] = []
    monkeypatch.setattr(progress, "alive", alive.append)
    monkeypatch.setattr(stream, "_ALIVE_S", 0)
    undisturbed = steps(Plain())
    found = steps(Plain(), loaders=loaders, place=undisturbed[1].place, count=7)
    assert rows(found) == rows(undisturbed)[2:]
    assert len(alive) >= 10 * max(1, loaders), "each process read ten samples again"


def test_a_stream_with_a_state_is_not_read_to_its_place():
    counter = Counter()
    place = Place(0, 10, {"number": 10})
    ((found,),) = rows(steps(counter, place=place, count=1, batch_size=1))
    assert found[0] == 10 and counter.loaded == [10]


def test_passes_of_a_step_share_it_out():
    (first,) = steps(Counter(), count=1, passes=2)
    assert [batch.samples for batch in first.batches] == [[0, 1], [2, 3, 4]]
    assert first.global_batch == 5


class Once:
    """Cannot begin anew."""

    def __init__(self) -> None:
        self.passes = 0

    def __iter__(self) -> Iterator[int]:
        self.passes += 1
        yield from range(7 if self.passes == 1 else 0)


@pytest.mark.parametrize("loaders", [0, 2])
def test_a_stream_that_does_not_begin_anew_ends_with_its_last_sample(loaders: int):
    found = steps(Once(), 1, 2, loaders)
    assert [step.global_batch for step in found] == [5, 2]
    assert [[batch.content for batch in step.batches] for step in found] == [[[2, 3, 4]], []]


class Torn(Counter):
    def __next__(self) -> Any:
        sample = super().__next__()
        if sample[0] == 3:
            raise ValueError("torn")
        return sample


class TornGenerator(Plain):
    def __iter__(self) -> Iterator[Any]:
        yield 0
        raise ValueError("torn")


@pytest.mark.parametrize("loaders", [0, 1])
def test_an_unreadable_sample_is_named_on_every_rank(loaders: int):
    for rank in range(2):
        with pytest.raises(UnreadableSample, match="sample 3 of the stream cannot be read: Val"):
            steps(Torn(), rank, 2, loaders)


def test_an_unreadable_sample_is_left_out_by_the_rank_that_has_it():
    found = []
    for rank in range(2):
        torn = Stream(Torn(), 3, leaves_out=True)
        assembler = Assembler(len, leaves_out=True)
        reading = StreamSteps(torn, Place(), 5, cut(5, rank, 2), 1, assembler)
        found += next(reading.load(0)).batches
    assert [batch.samples for batch in found] == [[0, 1], [2, 4]]
    assert [len(batch.left_out) for batch in found] == [0, 1]
    assert "sample 3 of the stream cannot be read: ValueError: torn" in found[1].left_out[0]
    reader = Reader(Stream(TornGenerator(), 0, leaves_out=True), Place())
    with pytest.raises(UnreadableSample, match="a generator ends there"):
        reader.read(2)


def test_looking_at_the_first_samples_leaves_the_stream_as_it_was():
    dataset = Generated()
    dataset.number = 2
    assert [sample[0] for sample in Stream(dataset, 0).first(3)] == [2, 3, 4]
    assert dataset.number == 2


class Unwritable(Counter):
    def state_dict(self) -> Any:
        return {"number": torch.zeros(1)}


def test_what_cannot_be_a_stream_is_told_in_one_line():
    with pytest.raises(UserError, match="a generator can be read only once"):
        Stream((number for number in range(3)), 0)
    with pytest.raises(UserError, match=r"state_dict\(\) is not JSON: .*Tensor"):
        Stream(Unwritable(), 0)
    assert is_stream(Plain()) and is_stream(Counter())
    assert not is_stream([1, 2]) and not is_stream(torch.zeros(3)) and not is_stream(3)
