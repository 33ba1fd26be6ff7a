"""Runs a schedule on real tensors: one rank's end."""

import functools
import math
import time
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from scaletrain.collectives.schedule import Schedule, Transfer, in_turn
from scaletrain.engine.transport import Pending, Receive, Reduce, Transport
from scaletrain.run import spans


class Message(NamedTuple):
    """Consecutive chunks ``first`` to ``last`` (exclusive) to or from ``peer``."""

    peer: int
    first: int
    last: int
    add: bool
    in_turn: bool  # its sender sends to another rank next: see ``schedule.in_turn``


Extent = Callable[[Message], tuple[int, int]]
_RECEIPT = -1  # where a receipt lies: one element, which says nothing


class Step(NamedTuple):
    """What is started at once: a round of one segment, or its receipts. ``where`` is the place of a message's elements among all pieces of
    the tensor."""

    round: int
    segment: int
    sends: tuple[tuple[int, int], ...]  # (peer, where)
    receives: tuple[tuple[int, int, bool], ...]  # (peer, where, whether it is reduced)


class Program:
    """What one rank does of a schedule: (sends, receives) of every round in which it takes part."""

    def __init__(self, num_chunks: int, rounds: tuple[tuple[list[Message], list[Message]], ...]):
        self.num_chunks, self.rounds = num_chunks, rounds
        # Training sends the same few sizes at every step: what follows from a size alone is worked out once.
        self.steps = functools.lru_cache(maxsize=128)(self._steps)

    @classmethod
    def all_of(cls, schedule: Schedule) -> list["Program"]:
        """Every rank's. Chunks that lie side by side and travel between the same two ranks become one message."""
        programs = schedule.programs()
        turns = in_turn(programs)

        def messages(
            index: int, transfers: list[Transfer], of: Callable[[Transfer], int]
        ) -> list[Message]:
            return _merge([(of(t), t, (index, t.src) in turns) for t in transfers])

        return [
            cls(
                schedule.num_chunks,
                tuple(
                    (
                        messages(index, sends, lambda t: t.dst),
                        messages(index, receives, lambda t: t.src),
                    )
                    for index, sends, receives in program
                ),
            )
            for program in programs
        ]

    @classmethod
    def of(cls, schedule: Schedule, rank: int) -> "Program":
        return cls.all_of(schedule)[rank]

    def _steps(
        self, count: int, segments: int, receipts_from: float
    ) -> tuple[list[slice], list[Step]]:
        """For a tensor of ``count`` elements: its pieces, and the steps in the order in which all ranks start them, which is what lets
        messages match without tags. With fewer elements than chunks some messages are empty; they are left out. A message of at least
        ``receipts_from`` elements whose sender turns to another rank next is answered by a receipt."""
        pieces: dict[tuple[int, int], int] = {}
        steps = []
        for number, (sends, receives) in enumerate(self.rounds):
            for segment in range(segments):
                base = segment * count // segments
                length = (segment + 1) * count // segments - base

                def extent(
                    message: Message, base: int = base, length: int = length
                ) -> tuple[int, int]:
                    first, last = (
                        edge * length // self.num_chunks for edge in (message.first, message.last)
                    )
                    return base + first, base + last

                def where(message: Message, extent: Extent = extent) -> int | None:
                    low, high = extent(message)
                    return pieces.setdefault((low, high), len(pieces)) if low < high else None

                out = tuple((m.peer, place) for m in sends if (place := where(m)) is not None)
                into = tuple(
                    (m.peer, place, m.add) for m in receives if (place := where(m)) is not None
                )
                if out or into:
                    steps.append(Step(number, segment, out, into))

                def receipt(message: Message, extent: Extent = extent) -> bool:
                    low, high = extent(message)
                    return message.in_turn and high - low >= receipts_from

                back = tuple((m.peer, _RECEIPT) for m in receives if receipt(m))
                awaited = tuple((m.peer, _RECEIPT, False) for m in sends if receipt(m))
                if back or awaited:
                    steps.append(Step(number, segment, back, awaited))
        return [slice(*piece) for piece in pieces], steps


def execute(
    program: Program, transport: Transport, tensor: Tensor, reduce: Reduce, segments: int = 1
) -> None:
    """Reduce ``tensor`` over all ranks, in place. Every rank of the transport calls it with its program of the same schedule (collective).

    Args:
        tensor: one-dimensional and contiguous, of the same dtype and number of elements on every rank.
        reduce: ``torch.add``, ``torch.maximum``, ...: associative and commutative.
        segments: that many parts of the tensor go through the schedule side by side: while one waits or adds, another is on the wire.

    Raises:
        TimeoutError, ConnectionError: a peer is late or gone; named.
    """
    receipts_from = getattr(transport, "receipts_from_bytes", math.inf) / tensor.element_size()
    slices, steps = program.steps(tensor.numel(), segments, receipts_from)
    views: list[Tensor | None] = [None] * (len(slices) + 1)  # the last one is the receipts'

    def view(place: int) -> Tensor:
        found = views[place]
        if found is None:
            found = views[place] = (
                tensor.new_zeros(1) if place == _RECEIPT else tensor[slices[place]]
            )
        return found

    pending: list[Pending | None] = [None] * segments
    tracing = spans.on()
    for step in steps:
        if (earlier := pending[step.segment]) is not None:
            earlier()
        sends = [(peer, view(place)) for peer, place in step.sends]
        receives = [
            Receive(peer, view(place), reduce if add else None)
            for peer, place, add in step.receives
        ]
        started = transport.start(sends, receives)
        pending[step.segment] = _traced(started, step) if tracing else started
    for last in pending:
        if last is not None:
            last()


def _traced(started: Pending, step: Step) -> Pending:
    """The same, and when it is done the trace has the round, from its start, and the part of it that was spent waiting and adding."""
    began = time.time()

    def wait() -> None:
        waited = time.time()
        started()
        to, of = [peer for peer, _ in step.sends], [peer for peer, _, _ in step.receives]
        spans.add("wait", f"wait for {', '.join(map(str, of or to))}", waited, segment=step.segment)
        spans.add(
            "round",
            f"round {step.round}",
            began,
            segment=step.segment,
            sends_to=to,
            receives_from=of,
        )

    return wait


def _merge(transfers: list[tuple[int, Transfer, bool]]) -> list[Message]:
    by_peer: dict[int, list[Message]] = {}
    for peer, t, turns in transfers:
        messages = by_peer.setdefault(peer, [])
        if messages and messages[-1].last == t.chunk and messages[-1].add == t.add:
            messages[-1] = messages[-1]._replace(last=t.chunk + 1)
        else:
            messages.append(Message(peer, t.chunk, t.chunk + 1, t.add, turns))
    return [message for messages in by_peer.values() for message in messages]
