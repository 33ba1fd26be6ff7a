"""Runs a schedule on real tensors: one rank's end."""

from typing import NamedTuple

from torch import Tensor

from scaletrain.collectives.schedule import Schedule, Transfer
from scaletrain.engine.transport import Receive, Reduce, Transport


class Program(NamedTuple):
    """What one rank does of a schedule: (sends, receives) of every round in which it takes part."""

    num_chunks: int
    rounds: tuple[tuple[list[Transfer], list[Transfer]], ...]

    @classmethod
    def of(cls, schedule: Schedule, rank: int) -> "Program":
        return cls(schedule.num_chunks, tuple(schedule.of_rank(rank)))


def execute(program: Program, transport: Transport, tensor: Tensor, reduce: Reduce) -> None:
    """Reduce ``tensor`` over all ranks, in place. Every rank of the transport calls it with its program of the same schedule (collective).

    Args:
        tensor: one-dimensional and contiguous, of the same dtype and number of elements on every rank.
        reduce: ``torch.add``, ``torch.maximum``, ...: associative and commutative.

    Raises:
        TimeoutError, ConnectionError: a peer is late or gone; named.
    """
    chunks = _cut(tensor, program.num_chunks)
    for sends, receives in program.rounds:
        out = [(t.dst, chunks[t.chunk]) for t in sends if chunks[t.chunk].numel()]
        into = [Receive(t.src, chunks[t.chunk], reduce if t.add else None) for t in receives if chunks[t.chunk].numel()]
        if out or into:
            transport.swap(out, into)


def _cut(tensor: Tensor, pieces: int) -> list[Tensor]:
    """``pieces`` consecutive views whose sizes differ by at most one; with fewer elements than pieces, some are empty."""
    count = tensor.numel()
    return [tensor[i * count // pieces : (i + 1) * count // pieces] for i in range(pieces)]
