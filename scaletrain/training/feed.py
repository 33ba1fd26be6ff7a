"""A worker's batches of every step, from a data set with an index or from a stream.

A feed yields this rank's part of the next step, and says the position that a checkpoint holds.
"""

import abc
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch

from scaletrain.config import RunConfig
from scaletrain.errors import TrainingError, UserError
from scaletrain.training.batches import Assembler, Batch, GlobalBatches, Share, cut, load
from scaletrain.training.stream import Place, Reader, Stream, StreamSteps, is_stream
from scaletrain.training.workload import Data
from scaletrain.units import plural
from scaletrain.world import World

_TEST_BATCH = 256  # samples of one forward pass in evaluation


class DataEnded(Exception):
    """No rank has a sample any more."""


class StepInput(NamedTuple):
    """This rank's part of a step."""

    batches: list[Batch]  # of the backward passes
    num_samples: int  # that were read; 0: the one batch is a stand-in, and counts for nothing
    left_out: list[str]  # one line for each sample that could not be read
    global_batch: int | None  # samples of all ranks; None: ranks have to tell each other
    may_end: bool = False  # ranks tell each other whether they have samples
    has_ended: bool = False  # this rank has no more samples

    @property
    def is_stand_in(self) -> bool:
        """Whether this rank has no sample in the step, and goes along with an earlier batch."""
        return self.num_samples == 0


class Feed(abc.ABC):
    """The training data of one rank.

    Attributes:
        num_samples: of the training set; None: a stream, which does not say.
        num_steps: of the run.

    Args:
        config: of the run.
        world: this worker's place.
        data: of the job.
        global_batch: samples a step, of all workers.
    """

    num_samples: int | None = None
    num_steps: int

    def __init__(self, config: RunConfig, world: World, data: Data, global_batch: int):
        self._config = config
        self._world = world
        self._data = data
        self._global_batch = global_batch
        self._num_left_out = 0  # in the whole run, of all ranks as far as this one knows
        self._earlier: Batch | None = None  # stands in for a batch without samples

    @abc.abstractmethod
    def start(self, step: int, position: Mapping[str, Any], missed: int = 0) -> None:
        """Begin to read.

        Args:
            step: of the first input, from 0.
            position: as a checkpoint holds it; empty: of a run that begins.
            missed: steps since the position that the job has done without this rank.
        """

    @abc.abstractmethod
    def next(self) -> StepInput:
        """Return this rank's part of the next step.

        Raises:
            DataEnded: this rank never had a sample.
        """

    @abc.abstractmethod
    def describe(self) -> str:
        """Return the length of the run, as a line for people."""

    def position(self) -> dict[str, Any]:
        """Return the feed's part of a checkpoint, after all steps so far, as JSON."""
        return {"left_out": self._num_left_out}

    def count_left_out(self, number: int) -> None:
        """Count samples of a step that could not be read.

        Args:
            number: of all ranks where they tell each other, else of this one.
        """
        self._num_left_out += number

    def check_left_out(self) -> None:
        """Raise ``TrainingError`` if more samples could not be read than the policy allows."""
        most = self._config.bad_samples.skip
        if self._num_left_out > most:
            raise TrainingError(
                f"bad_samples.skip: {plural(self._num_left_out, 'sample')} could not be read"
                f" (allowed: {most}; rank-<r>.jsonl names them)"
            )

    def _input(self, batches: list[Batch], step_input: StepInput) -> StepInput:
        """Return an input with these batches, and a stand-in if they are empty.

        Every rank has to run backward, or the exchange would wait for it.

        Raises:
            TrainingError: there is no earlier batch that could stand in.
        """
        left_out: list[str] = []
        for batch in batches:
            left_out += batch.left_out
        filled = [batch for batch in batches if batch.samples]
        num_samples = sum(len(batch.samples) for batch in filled)
        if filled:
            self._earlier = filled[-1]
        elif self._earlier is not None:
            filled = [self._earlier]
        else:
            reason = left_out[0] if left_out else "data: the stream is shorter than a batch"
            raise TrainingError(f"{reason} (rank {self._world.rank} has no sample to begin with)")
        return step_input._replace(batches=filled, num_samples=num_samples, left_out=left_out)


class IndexedFeed(Feed):
    """A data set with an index: an order of its own in each epoch, drawn from the seed."""

    def __init__(self, config: RunConfig, world: World, data: Data, global_batch: int):
        super().__init__(config, world, data, global_batch)
        self.num_samples = len(data.train)
        self._order = GlobalBatches(len(data.train), global_batch, config.seed)
        epochs = config.epochs or 0
        self.num_steps = config.steps or max(1, round(epochs * self._order.steps_per_epoch))

    def start(self, step: int, position: Mapping[str, Any], missed: int = 0) -> None:
        self._num_left_out = position.get("left_out", 0)
        config, world = self._config, self._world
        shares = self._order.shares(step, self.num_steps, world.rank, world.size, config.accumulate)
        self._loaded = load(
            self._data.train,
            shares,
            config.loader_workers,
            config.seed,
            self._data.collate,
            config.leaves_out_samples,
        )

    def next(self) -> StepInput:
        batches = [next(self._loaded) for _ in range(self._config.accumulate)]
        if self._config.leaves_out_samples:
            return self._input(batches, StepInput([], 0, [], None))
        num_samples = sum(len(batch.samples) for batch in batches)
        return StepInput(batches, num_samples, [], self._global_batch)

    def describe(self) -> str:
        each = self._order.steps_per_epoch
        epochs = self.num_steps / each
        num_epochs = f"{epochs:.4g} epoch" if epochs == 1 else f"{epochs:.4g} epochs"
        num_samples = len(self._data.train)
        left_out = num_samples - each * self._global_batch
        uneven = f", {left_out} of them left out of each epoch's order" if left_out else ""
        return (
            f"steps: {self.num_steps} = {num_epochs} of {each} steps"
            f" ({num_samples} samples{uneven})"
        )


class StreamFeed(Feed):
    """A stream: each step takes its next samples; where it ends, it begins anew."""

    def __init__(self, config: RunConfig, world: World, data: Data, global_batch: int):
        super().__init__(config, world, data, global_batch)
        if config.steps is None:
            raise UserError(
                "epochs: the training data is a stream, without a length (allowed: steps)"
            )
        self.num_steps = config.steps
        self._stream = Stream(data.train, config.seed, config.leaves_out_samples)
        self._place = Place()  # after the last step that was taken
        self._has_ended = False

    def start(self, step: int, position: Mapping[str, Any], missed: int = 0) -> None:
        self._num_left_out = position.get("left_out", 0)
        self._place = Place(**position.get("place", {}))
        config, world = self._config, self._world
        self._steps = StreamSteps(
            self._stream,
            self._place,
            self._global_batch,
            cut(self._global_batch, world.rank, world.size),
            config.accumulate,
            Assembler(self._data.collate, config.leaves_out_samples),
        ).load(config.loader_workers)
        for _ in range(missed):
            self.next()

    def next(self) -> StepInput:
        step = next(self._steps, None)
        if step is None:
            self._has_ended = True
            if self._earlier is None:
                raise DataEnded
            return StepInput([self._earlier], 0, [], 0, may_end=True, has_ended=True)
        self._place = step.place
        global_batch = None if self._config.leaves_out_samples else step.global_batch
        return self._input(step.batches, StepInput([], 0, [], global_batch, may_end=True))

    def position(self) -> dict[str, Any]:
        return super().position() | {"place": self._place._asdict()}

    def describe(self) -> str:
        samples = self.num_steps * self._global_batch
        return f"steps: {self.num_steps} = the next {samples} samples of a stream"


def open_feed(config: RunConfig, world: World, data: Data, global_batch: int) -> Feed:
    """Return the training data of a rank.

    Raises:
        UserError: the batch is larger than the training set, or the length of the run is given in
            epochs of a stream, or groups of workers would share one.
    """
    if config.groups > 1 and is_stream(data.train):
        raise UserError(
            f"exchange.groups: {config.groups} groups cannot share a stream, which may end for one"
            " of them before it ends for another (allowed: data with [index] and len())"
        )
    kind = StreamFeed if is_stream(data.train) else IndexedFeed
    return kind(config, world, data, global_batch)


class EvaluationFeed:
    """The test data of one rank: every n-th sample.

    Args:
        config: of the run.
        world: this worker's place.
        data: of the job.
    """

    def __init__(self, config: RunConfig, world: World, data: Data):
        self._config = config
        self._world = world
        self._data = data
        self._stream: Stream | None = None
        self.num_samples: int | None = None  # None: a stream, which does not say
        if is_stream(data.test):
            self._stream = Stream(data.test, config.seed, config.leaves_out_samples)
        else:
            self.num_samples = len(data.test)

    def batches(self) -> Iterator[tuple[Batch, bool]]:
        """Yield this rank's batches, and whether they count.

        A rank without a readable sample gets one of another rank, to learn which figures there
        are: it does not count.
        """
        has_samples = False
        for batch in self._read(self._world.rank, self._world.size, _TEST_BATCH):
            has_samples = has_samples or len(batch.samples) > 0
            yield batch, True
        if not has_samples:
            for batch in self._read(0, 1, 1):
                if batch.samples:
                    yield batch, False
                    return

    def first(self, count: int, num_batches: int = 1) -> list[Batch]:
        """Return batches of the first samples, ``count`` in each, as far as there are samples."""
        return [*itertools.islice(self._read(0, 1, count), num_batches)]

    def _read(self, begin: int, stride: int, size: int) -> Iterator[Batch]:
        """Yield batches of ``size`` of every ``stride``-th sample, from sample ``begin`` on."""
        config, collate = self._config, self._data.collate
        leaves_out = config.leaves_out_samples
        if self._stream is None:
            assert self.num_samples is not None
            indices = torch.arange(self.num_samples)[begin::stride].split(size)
            shares = (Share("test", part) for part in indices)
            yield from load(self._data.test, shares, 0, config.seed, collate, leaves_out)
            return
        assembler = Assembler(collate, leaves_out)
        reader = Reader(self._stream, Place("test"))
        own = itertools.islice(reader.rest_of_pass(), begin, None, stride)
        while samples := list(itertools.islice(own, size)):
            yield assembler.batch(samples)


def first_batch(data: Data, count: int, seed: int) -> Any:
    """Return a batch of the first training samples, for measuring; few samples come again."""
    if not is_stream(data.train):
        indices = torch.arange(count) % len(data.train)
        return next(load(data.train, iter([Share(0, indices)]), 0, seed, data.collate)).content
    samples = Reader(Stream(data.train, seed), Place()).read(count)
    return Assembler(data.collate, leaves_out=False).batch(samples).content
