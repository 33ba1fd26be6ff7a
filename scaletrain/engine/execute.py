"""Runs a schedule on real tensors: one rank's end."""

import time
from typing import NamedTuple

from torch import Tensor

from scaletrain.collectives.schedule import Schedule, Transfer
from scaletrain.engine import spans
from scaletrain.engine.transport import Pending, Receive, Reduce, Transport


class Message(NamedTuple):
    """Consecutive chunks ``first`` to ``last`` (exclusive) to or from ``peer``."""

    peer: int
    first: int
    last: int
    add: bool


class Program(NamedTuple):
    """What one rank does of a schedule: (sends, receives) of every round in which it takes part."""

    num_chunks: int
    rounds: tuple[tuple[list[Message], list[Message]], ...]

    @classmethod
    def all_of(cls, schedule: Schedule) -> list["Program"]:
        """Every rank's. Chunks that lie side by side and travel between the same two ranks become one message."""
        return [
            cls(
                schedule.num_chunks,
                tuple(
                    (_merge([(t.dst, t) for t in sends]), _merge([(t.src, t) for t in receives]))
                    for _, sends, receives in program
                ),
            )
            for program in schedule.programs()
        ]

    @classmethod
    def of(cls, schedule: Schedule, rank: int) -> "Program":
        return cls.all_of(schedule)[rank]


def execute(program: Program, transport: Transport, tensor: Tensor, reduce: Reduce, segments: int = 1) -> None:
    """Reduce ``tensor`` over all ranks, in place. Every rank of the transport calls it with its program of the same schedule (collective).

    Args:
        tensor: one-dimensional and contiguous, of the same dtype and number of elements on every rank.
        reduce: ``torch.add``, ``torch.maximum``, ...: associative and commutative.
        segments: that many parts of the tensor go through the schedule side by side: while one waits or adds, another is on the wire.

    Raises:
        TimeoutError, ConnectionError: a peer is late or gone; named.
    """
    parts = [_Cut(part, program.num_chunks) for part in _split(tensor, segments)]
    pending: list[Pending | None] = [None] * len(parts)
    tracing = spans.on()
    for number, (sends, receives) in enumerate(program.rounds):
        # All ranks start (round, segment) in this order, which is what lets messages match without tags.
        for index, cut in enumerate(parts):
            if (earlier := pending[index]) is not None:
                earlier()
            out = [(m.peer, chunk) for m in sends if (chunk := cut(m)).numel()]
            into = [Receive(m.peer, chunk, reduce if m.add else None) for m in receives if (chunk := cut(m)).numel()]
            pending[index] = started = transport.start(out, into) if out or into else None
            if tracing and started is not None:
                pending[index] = _traced(started, number, index, sends, receives)
    for last in pending:
        if last is not None:
            last()


def _traced(started: Pending, number: int, segment: int, sends: list[Message], receives: list[Message]) -> Pending:
    """The same, and when it is done the trace has the round, from its start, and the part of it that was spent waiting and adding."""
    began = time.time()

    def wait() -> None:
        waited = time.time()
        started()
        spans.add("wait", f"wait for {', '.join(str(m.peer) for m in receives or sends)}", waited, segment=segment)
        to, of = [m.peer for m in sends], [m.peer for m in receives]
        spans.add("round", f"round {number}", began, segment=segment, sends_to=to, receives_from=of)

    return wait


class _Cut:
    """A tensor in pieces whose sizes differ by at most one; with fewer elements than pieces, some are empty."""

    def __init__(self, tensor: Tensor, pieces: int):
        self._tensor, self._pieces, self._count = tensor, pieces, tensor.numel()

    def __call__(self, message: Message) -> Tensor:
        first = message.first * self._count // self._pieces
        return self._tensor[first : message.last * self._count // self._pieces]


def _split(tensor: Tensor, segments: int) -> list[Tensor]:
    count = tensor.numel()
    return [tensor[i * count // segments : (i + 1) * count // segments] for i in range(segments)]


def _merge(transfers: list[tuple[int, Transfer]]) -> list[Message]:
    by_peer: dict[int, list[Message]] = {}
    for peer, t in transfers:
        messages = by_peer.setdefault(peer, [])
        if messages and messages[-1].last == t.chunk and messages[-1].add == t.add:
            messages[-1] = messages[-1]._replace(last=t.chunk + 1)
        else:
            messages.append(Message(peer, t.chunk, t.chunk + 1, t.add))
    return [message for messages in by_peer.values() for message in messages]
