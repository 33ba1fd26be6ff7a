"""Which samples make up a step: a fixed order that does not depend on the number of workers."""

import pickle
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from scaletrain.errors import UserError
from scaletrain.training.permutation import Permutation
from scaletrain.training.randomness import Placed

_DRAWN_AHEAD = 2048  # samples; a single call costs as much as some 400 of them

# Makes a batch, any tree of tensors, from the list of its samples.
Collate = Callable[[list[Any]], Any]


class Share(NamedTuple):
    """The samples that a rank reads for one batch."""

    epoch: int | str  # or the name of a pass outside of training, such as "test"
    indices: torch.Tensor  # (n,) int64


class Batch(NamedTuple):
    """A batch that has been read."""

    content: Any  # as ``collate`` made it; None: no sample could be read
    samples: Sequence[int]  # their numbers in the data set, in order
    left_out: Sequence[str] = ()  # one line for each sample that could not be read


def cut(length: int, rank: int, size: int) -> slice:
    """Return a rank's part of ``length`` places: parts are consecutive, and differ by one at most.

    >>> [cut(10, rank, 3) for rank in range(3)]
    [slice(0, 3, None), slice(3, 6, None), slice(6, 10, None)]
    """
    # Rank r ends where rank r + 1 begins, so the parts cover all places without gaps.
    return slice(rank * length // size, (rank + 1) * length // size)


class GlobalBatches:
    """The global batch of every step, and each rank's share of it.

    Every epoch is a new permutation of the data, drawn from (seed, epoch). Its batches are
    consecutive slices; the samples left over at its end are dropped. N workers split the batch
    that one worker would take: rank r gets slice r of N, and sizes differ by at most one.

    A step's time and memory depend on the share alone, however large the training set is.

    Args:
        num_samples: in the training set.
        batch_size: samples a step, of all workers.
        seed: of the run; of any size.

    Raises:
        UserError: the batch is larger than the training set.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int):
        if batch_size > num_samples:
            raise UserError(
                f"batch_size: {batch_size} is more than the {num_samples} training samples"
                f" (allowed: 1 to {num_samples})"
            )
        self.batch_size = batch_size
        self.steps_per_epoch = num_samples // batch_size
        self._num_samples = num_samples
        self._seed = seed
        self._epoch = 0  # whose order is kept
        self._order = self._order_of(0)
        # A part of the order, from one place on: small steps share the cost of computing it.
        self._drawn_from = 0
        self._drawn = np.empty(0, dtype=np.int64)

    def epoch(self, step: int) -> int:
        """Return the epoch that a step belongs to, from 0."""
        return step // self.steps_per_epoch

    def indices(self, step: int) -> torch.Tensor:
        """Return the samples of a step's global batch: (batch_size,) int64."""
        return self.share(step, 0, 1)

    def share(self, step: int, rank: int, size: int) -> torch.Tensor:
        """Return a rank's slice of the step's global batch: int64."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = self._order_of(epoch)
            self._epoch = epoch
            self._drawn = self._drawn[:0]
        places = cut(self.batch_size, rank, size)
        length = places.stop - places.start
        first = batch * self.batch_size + places.start
        begin = first - self._drawn_from
        if begin < 0 or begin + length > len(self._drawn):
            # Small batches are drawn ahead, for all ranks; of a large one this rank's share only.
            count = _DRAWN_AHEAD if self.batch_size < _DRAWN_AHEAD else length
            end = min(first + count, self._num_samples)
            self._drawn_from, begin = first, 0
            self._drawn = self._order(np.arange(first, end))
        return torch.from_numpy(self._drawn[begin : begin + length])

    def share_size(self, rank: int, size: int) -> int:
        """Return how many samples a rank has of every step."""
        places = cut(self.batch_size, rank, size)
        return places.stop - places.start

    def shares(
        self, first_step: int, num_steps: int, rank: int, size: int, passes: int = 1
    ) -> Iterator[Share]:
        """Yield a rank's shares of the steps from ``first_step`` to before ``num_steps``.

        Args:
            first_step: from 0.
            num_steps: of the run.
            rank: of the worker.
            size: number of workers.
            passes: backward passes of a step; each has a share of its own.
        """
        for step in range(first_step, num_steps):
            share = self.share(step, rank, size)
            parts = share.tensor_split(passes) if passes > 1 else (share,)
            for part in parts:
                yield Share(self.epoch(step), part)

    def _order_of(self, epoch: int) -> Permutation:
        return Permutation(self._num_samples, self._seed, "order", epoch)


def load(
    dataset: Dataset,
    shares: Iterator[Share],
    num_loaders: int,
    seed: int,
    collate: Collate | None = None,
    leaves_out: bool = False,
) -> Iterator[Batch]:
    """Return the batches of the samples that ``shares`` names; an empty share has none.

    Each sample is read under the seed of its place (``randomness.Placed``), and collated with the
    others. A TensorDataset is indexed at once if nothing else is asked for, since reading it draws
    no random numbers.

    Args:
        dataset: map-style. A sample is any tree of tensors and numbers that ``collate`` takes.
        shares: of each batch. Loader processes read ahead: two shares each are taken at once.
        num_loaders: processes that read ahead; 0: read in line.
        seed: of the run.
        collate: makes a batch of samples; None: torch's ``default_collate``. It goes on drawing
            random numbers where the batch's last sample stopped.
        leaves_out: leave samples out that cannot be read.

    Raises:
        UnreadableSample: from the iterator: reading a sample raised.
    """
    # A subclass may have a ``__getitem__`` that augments.
    if type(dataset) is TensorDataset and num_loaders == 0 and collate is None:
        return (
            Batch(dataset[share.indices], share.indices.tolist())
            for share in shares
            if len(share.indices)
        )
    batches = _Batches(dataset, seed, collate, leaves_out)
    if num_loaders == 0:
        return (batches[place] for place in _places(shares))
    loader = DataLoader(
        _BatchesOrErrors(batches),
        sampler=_places(shares),
        batch_size=None,
        num_workers=num_loaders,
        collate_fn=as_it_is,
    )
    # The processes start now, before the first batch is wanted.
    return raising(iter(loader))


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a tree of tensors with every tensor on the device.

    On a CPU it is the tree itself, whose tensors were read into main memory.
    """
    if device.type == "cpu":
        return batch

    def move(leaf: Any) -> Any:
        return leaf.to(device, non_blocking=True) if isinstance(leaf, torch.Tensor) else leaf

    return pytree.tree_map(move, batch)


_MOST_NAMED = 8  # samples in an error
# The end of an error about a sample that ends the run.
LEAVE_OUT = " (bad_samples: {skip: 10} leaves up to ten such samples out)"


class UnreadableSample(UserError):
    """A sample, or several to be collated, that raised an exception, its cause, when read.

    It is an error in one line, since most often a file of the data set is missing or broken. And
    when a data set loses its connection, that is not taken for the loss of a worker.
    """

    def __init__(self, fault: str, error: BaseException, fix: str = ""):
        description = type(error).__name__
        # The first line: some messages are a page.
        lines = str(error).strip().splitlines()
        if lines:
            description += f": {lines[0]}"
        super().__init__(f"data: {fault}: {description}{fix}")
        self.__cause__ = error

    def __reduce__(self) -> tuple[Any, ...]:
        """Keep the cause, which exceptions lose on their way to another process."""
        return _unreadable, (str(self), _pickled(self.__cause__))


class Assembler:
    """Makes batches of samples that have been read.

    Args:
        collate: makes a batch of samples; None: torch's ``default_collate``.
        leaves_out: leave samples out that could not be read or collated.
    """

    def __init__(self, collate: Collate | None, leaves_out: bool):
        self._collate = collate or default_collate
        self._leaves_out = leaves_out

    def batch(self, samples: Sequence[tuple[int, Any]]) -> Batch:
        """Return a batch.

        Args:
            samples: number and sample of each, or the ``UnreadableSample`` in place of one.

        Raises:
            UnreadableSample: a sample could not be read, or the samples cannot be collated.
        """
        readable = []
        left_out = []
        for number, sample in samples:
            if not isinstance(sample, UnreadableSample):
                readable.append((number, sample))
            elif self._leaves_out:
                left_out.append(str(sample))
            else:
                raise sample
        try:
            return self._collated(readable, left_out)
        except UnreadableSample:
            if not self._leaves_out:
                raise
        # Each for itself tells which of them cannot be collated.
        fitting = []
        for pair in readable:
            try:
                self._collated([pair], [])
            except UnreadableSample as error:
                left_out.append(str(error))
            else:
                fitting.append(pair)
        return self._collated(fitting, left_out)

    def _collated(self, samples: list[tuple[int, Any]], left_out: list[str]) -> Batch:
        if not samples:
            return Batch(None, [], left_out)
        numbers = [number for number, _ in samples]
        try:
            content = self._collate([sample for _, sample in samples])
        except Exception as error:
            names = ", ".join(map(str, numbers[:_MOST_NAMED]))
            if len(numbers) > _MOST_NAMED:
                names += ", ..."
            word, fix = "sample", ""
            if len(numbers) > 1:
                word = "samples"
                fix = " (Data's collate is a function that makes a batch of samples of any form)"
            raise UnreadableSample(f"{word} {names} cannot be collated", error, fix) from error
        return Batch(content, numbers, left_out)


class _Batches(Dataset):
    """Batches by (epoch, indices), read in whichever process indexes it."""

    def __init__(self, dataset: Dataset, seed: int, collate: Collate | None, leaves_out: bool):
        self._samples = Placed(dataset, seed)
        self._leaves_out = leaves_out
        self._assembler = Assembler(collate, leaves_out)

    def __getitem__(self, place: tuple[int | str, list[int]]) -> Batch:
        epoch, indices = place
        samples = []
        for index in indices:
            samples.append((index, read_sample(self._samples, epoch, index, self._leaves_out)))
        return self._assembler.batch(samples)


def read_sample(samples: Placed, epoch: int | str, index: int, leaves_out: bool) -> Any:
    """Return a sample, read under the seed of its place; its error, if such samples are left out.

    Raises:
        UnreadableSample: the data set raised.
    """
    fault = f"sample {index} cannot be read"
    try:
        return samples[epoch, index]
    except Exception as error:
        if leaves_out:
            return UnreadableSample(fault, error)
        raise UnreadableSample(fault, error, LEAVE_OUT) from error


class _BatchesOrErrors(Dataset):
    """Batches for a loader process: an unreadable sample is a value in place of its batch.

    DataLoader would raise another exception, with the whole traceback as its message.
    """

    def __init__(self, batches: _Batches):
        self._batches = batches

    def __getitem__(self, place: tuple[int | str, list[int]]) -> Batch | UnreadableSample:
        try:
            return self._batches[place]
        except UnreadableSample as error:
            return error


def _places(shares: Iterator[Share]) -> Iterator[tuple[int | str, list[int]]]:
    """Yield the keys of the batches: a loader process gets lists faster than tensors."""
    for share in shares:
        if len(share.indices):
            yield share.epoch, share.indices.tolist()


def as_it_is(batch: Any) -> Any:
    """Return the batch as it is: loader processes have collated it already."""
    return batch


def raising(batches: Iterator[Any]) -> Iterator[Any]:
    """Yield the batches of loader processes, and raise the error that stands in place of one."""
    unreadable = None
    for batch in batches:
        if isinstance(batch, UserError):
            unreadable = batch
            break
        yield batch
    # The loader processes end here. A traceback would keep the loader for the garbage collector,
    # which takes its queues apart first, and then waits 5 s for each process.
    del batches
    if unreadable is not None:
        raise unreadable


def _pickled(error: BaseException | None) -> bytes:
    """Return an exception for another process, with its traceback as a note.

    One that cannot travel is replaced by a RuntimeError with its text.
    """
    note = "".join(traceback.format_exception(error)).rstrip()
    try:
        pickled = pickle.dumps(error)
        # Some exceptions can be pickled and not be read again, which the reader could not mend.
        travelled = pickle.loads(pickled)
    except Exception:
        travelled = RuntimeError(f"{type(error).__name__}: {error}")
    travelled.add_note(f"In the loader process:\n{note}")
    return pickle.dumps(travelled)


def _unreadable(message: str, cause: bytes) -> UnreadableSample:
    """Return the error that was pickled, with its own message."""
    error = UnreadableSample("", pickle.loads(cause))
    error.args = (message,)
    return error
