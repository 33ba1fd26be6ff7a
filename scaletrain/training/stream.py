"""Data without an index: samples come one after the other, pass after pass.

Every process that needs samples of a stream reads all of it, in the same order, and keeps its
share. So N workers train as one does, no sample is lost or doubled, and a run's place is one number
of samples, for any number of workers.
"""

import inspect
import itertools
import json
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data._utils import worker as loader_process

from scaletrain.errors import UserError
from scaletrain.run import progress
from scaletrain.training.batches import (
    LEAVE_OUT,
    Assembler,
    Batch,
    UnreadableSample,
    as_it_is,
    cut,
    raising,
)
from scaletrain.training.randomness import seed_generators, seed_of

_ALIVE_S = 1.0  # between signs of life


def is_stream(dataset: Any) -> bool:
    """Return True if a data set is read in its own order: it has no index, or no length."""
    if isinstance(dataset, IterableDataset):
        return True
    has_index = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return not has_index and hasattr(dataset, "__iter__")


class Place(NamedTuple):
    """Where a stream goes on: all samples before it have been used."""

    epoch: int | str = 0  # the pass; or the name of one outside of training, such as "test"
    samples: int = 0  # of this pass before the place
    state: Any = None  # the stream's own at this place; None: it is found by reading


class Stream:
    """A data set that is iterated, and can begin at any place.

    A stream may have a state: ``state_dict`` and ``load_state_dict`` of its iterator or, if that
    has none, of the data set. Every pass begins with the state that the data set has now.

    Args:
        dataset: an ``IterableDataset``, or any object with an ``__iter__`` that begins anew.
        seed: of the run. Each sample is read under the seed of its place.
        leaves_out: go on after a sample that cannot be read.

    Raises:
        UserError: it is an iterator, which can be read only once.
    """

    def __init__(self, dataset: Any, seed: int, leaves_out: bool = False):
        kind = type(dataset)
        if isinstance(dataset, Iterator) and kind.__module__ in ("builtins", "itertools"):
            raise UserError(
                f"data: a {kind.__name__} can be read only once (allowed: an object whose __iter__"
                " begins anew, such as of a class with `def __iter__(self): ... yield sample`)"
            )
        self._dataset = dataset
        self.seed = seed
        self.leaves_out = leaves_out
        self._has_state = hasattr(dataset, "state_dict") and hasattr(dataset, "load_state_dict")
        self._first_state = _plain(dataset.state_dict()) if self._has_state else None

    def begin(self, state: Any = None) -> Iterator[Any]:
        """Return an iterator from the beginning, or from where the stream had this state."""
        iterator = iter(self._dataset)
        if hasattr(iterator, "load_state_dict") and iterator is not self._dataset:
            if state is not None:
                iterator.load_state_dict(state)
        elif self._has_state:
            self._dataset.load_state_dict(self._first_state if state is None else state)
            # One that is its own iterator has begun above; beginning again might lose the state.
            if iterator is not self._dataset:
                iterator = iter(self._dataset)
        return iterator

    def state(self, iterator: Iterator[Any]) -> Any:
        """Return the state of the stream where an iterator is; None if it has none.

        Raises:
            UserError: it is not JSON.
        """
        if hasattr(iterator, "state_dict"):
            return _plain(iterator.state_dict())
        return _plain(self._dataset.state_dict()) if self._has_state else None

    def first(self, count: int) -> list[Any]:
        """Return the first samples, and leave the stream as it was."""
        samples = Reader(self, Place("first")).rest_of_pass()
        found = [sample for _, sample in itertools.islice(samples, count)]
        self.begin()
        return found


class Reader:
    """Reads a stream sample by sample, each under the seed of its place.

    Args:
        stream: to be read.
        place: where to begin.
    """

    def __init__(self, stream: Stream, place: Place):
        self._stream = stream
        self._epoch = place.epoch
        self._index = place.samples
        self._place = place
        self._iterator = self._begin(place.state)
        if place.state is None:
            self._index = 0  # up to ``find``

    def find(self) -> Iterator[None]:
        """Read on to the place where to begin, if the stream cannot go there itself.

        Yields once a second, for signs of life.
        """
        since = time.monotonic()
        for _ in itertools.islice(self.rest_of_pass(), self._place.samples - self._index):
            if time.monotonic() - since >= _ALIVE_S:
                since = time.monotonic()
                yield

    def read(self, count: int) -> list[tuple[int, Any]]:
        """Return numbers and samples of the next ``count`` places, pass after pass.

        They are fewer only if the stream has ended for good: a whole pass has no sample. In place
        of a sample that is left out stands the ``UnreadableSample`` that reading it raised.

        Raises:
            UnreadableSample: a sample cannot be read.
        """
        samples: list[tuple[int, Any]] = []
        while True:
            samples += itertools.islice(self.rest_of_pass(), count - len(samples))
            if len(samples) == count or self._index == 0:
                return samples
            assert isinstance(self._epoch, int)
            self._epoch += 1
            self._index = 0
            self._iterator = self._begin()

    def rest_of_pass(self) -> Iterator[tuple[int, Any]]:
        """Yield number and sample of each place up to the end of the pass."""
        while True:
            try:
                sample = self._next()
            except StopIteration:
                return
            self._index += 1
            yield self._index - 1, sample

    def place(self) -> Place:
        """Return the place after the last sample that was read."""
        return Place(self._epoch, self._index, self._stream.state(self._iterator))

    def _begin(self, state: Any = None) -> Iterator[Any]:
        # ``__iter__`` may draw, too, such as the order of its files.
        seed_generators(seed_of(self._stream.seed, "stream", self._epoch))
        try:
            return self._stream.begin(state)
        except Exception as error:
            raise UnreadableSample("the stream cannot be begun", error) from error

    def _next(self) -> Any:
        seed_generators(seed_of(self._stream.seed, "stream", self._epoch, self._index))
        try:
            return next(self._iterator)
        except StopIteration:
            raise
        except Exception as error:
            fault = f"sample {self._index} of the stream cannot be read"
            if not self._stream.leaves_out:
                raise UnreadableSample(fault, error, LEAVE_OUT) from error
            if inspect.isgenerator(self._iterator):
                fault += (
                    ", and a generator ends there (bad_samples: skip needs an iterator with"
                    " __next__, or a collate that reads)"
                )
                raise UnreadableSample(fault, error) from error
            return UnreadableSample(fault, error)


class StreamStep(NamedTuple):
    """A rank's share of a global batch of a stream."""

    number: int  # from 0, where reading began
    batches: list[Batch]  # of the backward passes; those without a place left out
    global_batch: int  # places of all ranks
    place: Place  # after the global batch


class StreamSteps(IterableDataset):
    """A rank's share of every step.

    Several loader processes take turns: each reads all of the stream, and assembles every n-th
    step.

    Args:
        stream: to be read.
        place: where to begin.
        batch_size: samples a step, of all workers.
        share: this rank's places in each global batch.
        passes: backward passes of a step.
        assembler: makes batches of samples.
    """

    def __init__(
        self,
        stream: Stream,
        place: Place,
        batch_size: int,
        share: slice,
        passes: int,
        assembler: Assembler,
    ):
        self._stream = stream
        self._place = place
        self._batch_size = batch_size
        self._share = share
        self._passes = passes
        self._assembler = assembler

    def load(self, num_loaders: int) -> Iterator[StreamStep]:
        """Return the steps until the stream ends for good.

        Args:
            num_loaders: processes that read ahead; 0: read in line.

        Raises:
            UnreadableSample: from the iterator: a sample could not be read.
        """
        if num_loaders == 0:
            return _in_order(self._every(1, 0))
        loader = DataLoader(self, batch_size=None, num_workers=num_loaders, collate_fn=as_it_is)
        return _in_order(raising(iter(loader)))

    def __iter__(self) -> Iterator[StreamStep | UserError | None]:
        """Yield this loader process's part; an error is a value, and ends it."""
        info = get_worker_info()
        assert info is not None
        # Streams written for torch's DataLoader alone leave samples to the other processes if they
        # see that there are some. Here each process is to see all samples.
        loader_process._worker_info = None
        try:
            yield from self._every(info.num_workers, info.id)
        except UserError as error:
            yield error

    def _every(self, stride: int, first: int) -> Iterator[StreamStep | None]:
        """Yield every ``stride``-th step from ``first`` on; before them None, as a sign of life."""
        reader = Reader(self._stream, self._place)
        yield from reader.find()
        for number in itertools.count():
            samples = reader.read(self._batch_size)
            if not samples:
                return
            if number % stride == first:
                place = reader.place()
                yield StreamStep(number, self._batches(samples, place), len(samples), place)

    def _batches(self, samples: list[tuple[int, Any]], place: Place) -> list[Batch]:
        """Return this rank's batches of a global batch that ends before a place."""
        own = samples[self._share]
        batches = []
        for index in range(self._passes):
            part = own[cut(len(own), index, self._passes)]
            if part:
                # Draws of ``collate`` depend on the place alone, too.
                first = self._share.start
                seed = seed_of(
                    self._stream.seed, "collate", place.epoch, place.samples, first, index
                )
                seed_generators(seed)
                batches.append(self._assembler.batch(part))
        return batches


def _in_order(steps: Iterator[StreamStep | None]) -> Iterator[StreamStep]:
    """Yield steps by their numbers, and pass on signs of life.

    Loader processes take turns, but one may give more signs of life than another.
    """
    early: dict[int, StreamStep] = {}
    number = 0
    for step in steps:
        if step is None:
            progress.alive("finding the place in the stream")
            continue
        early[step.number] = step
        while number in early:
            yield early.pop(number)
            number += 1


def _plain(state: Any) -> Any:
    """Return a state as a file gives it back.

    Raises:
        UserError: it is not JSON.
    """
    try:
        return json.loads(json.dumps(state))
    except (TypeError, ValueError) as error:
        raise UserError(
            f"data: the stream's state_dict() is not JSON: {error} (allowed: numbers, text, lists"
            " and dicts of them)"
        ) from None
