"""The continual embedded Reber grammar: endless strings whose next symbols are to be predicted."""

import random
from collections.abc import Iterator
from typing import Annotated, NamedTuple

import torch
from annotated_types import Ge
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from scaletrain.needs import CountsSamples

SYMBOLS = "BTSXVPE"
# From each state of Reber's grammar: the symbols that may come, and the states they lead to.
_GRAMMAR: tuple[dict[str, int], ...] = (
    {"T": 1, "P": 2},
    {"S": 1, "X": 3},
    {"T": 2, "V": 4},
    {"X": 2, "S": 5},
    {"P": 3, "V": 5},
    {"E": 6},
)
_END = 6


class Step(NamedTuple):
    """A symbol of a stream, and those that may follow it."""

    symbol: str
    next: str


def stream(generator: random.Random) -> Iterator[Step]:
    """Yield symbols without end: embedded Reber strings, one after the other.

    The second and the last but one symbol of a string are the same, with a Reber string between
    them. Nothing marks where the streams' strings part.

    Source: Gers, Schmidhuber and Cummins, "Learning to Forget", Neural Computation 12 (2000),
    section 4.1, figures 4 and 5.
    """
    while True:
        side = generator.choice("TP")
        yield Step("B", "TP")
        yield Step(side, "B")
        symbol, state = "B", 0
        while state != _END:
            yield Step(symbol, "".join(_GRAMMAR[state]))
            symbol = generator.choice([*_GRAMMAR[state]])
            state = _GRAMMAR[state][symbol]
        yield Step(symbol, side)
        yield Step(side, "E")
        yield Step("E", "B")


def data(
    *,
    streams: Annotated[int, Ge(1), CountsSamples()] = 1000,
    length: Annotated[int, Ge(1)] = 200,
    test_streams: Annotated[int, Ge(1)] = 50,
    test_length: Annotated[int, Ge(1)] = 2000,
    seed: int = 0,
) -> tuple[Dataset, Dataset]:
    """Return (train, test) of streams: (length, 7) float32, one symbol a row; targets likewise.

    A row of the targets has a one for each symbol that may come next.

    Args:
        streams: for training.
        length: symbols of each of them.
        test_streams: for testing.
        test_length: symbols of each of them.
        seed: of all streams.
    """
    generator = random.Random(seed)
    train = [_tensors(generator, length) for _ in range(streams)]
    test = [_tensors(generator, test_length) for _ in range(test_streams)]
    return _dataset(train), _dataset(test)


def _tensors(generator: random.Random, length: int) -> tuple[Tensor, Tensor]:
    symbols, following = [], []
    for _, step in zip(range(length), stream(generator), strict=False):
        symbols.append([float(each == step.symbol) for each in SYMBOLS])
        following.append([float(each in step.next) for each in SYMBOLS])
    return torch.tensor(symbols), torch.tensor(following)


def _dataset(streams: list[tuple[Tensor, Tensor]]) -> TensorDataset:
    inputs, targets = zip(*streams, strict=True)
    return TensorDataset(torch.stack(inputs), torch.stack(targets))
