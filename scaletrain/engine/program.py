"""A schedule compiled for one rank: the messages that it sends and receives, in order.

Compiling has two steps. Chunks that lie side by side and travel together become one message, once
for each schedule (``RankProgram.of``). For each size of a tensor, messages become slices of
elements (``RankProgram.parts``).
"""

import functools
from typing import NamedTuple

from scaletrain.collectives.schedule import RankRound, Schedule, Transfer, in_turn

RECEIPT = -1  # the place of a receipt: one element, whose value means nothing


class ChunkMessage(NamedTuple):
    """Consecutive chunks ``first`` to ``last`` (exclusive), to or from ``peer``."""

    peer: int
    first: int
    last: int
    add: bool  # the receiver adds it; otherwise it replaces the receiver's chunks
    in_turn: bool  # its sender sends to another rank next (see ``schedule.in_turn``)


class MessageRound(NamedTuple):
    """One rank's messages of a round."""

    number: int  # among the rounds in which the rank takes part
    sends: list[ChunkMessage]
    receives: list[ChunkMessage]


class RoundPart(NamedTuple):
    """Messages that are started at once: a round of one segment, or its receipts.

    ``place`` is the number of a message's slice among all slices of the tensor, or ``RECEIPT``.
    """

    round: int
    segment: int
    sends: tuple[tuple[int, int], ...]  # (peer, place)
    receives: tuple[tuple[int, int, bool], ...]  # (peer, place, whether it is reduced)


class RankProgram:
    """One rank's part of a schedule.

    Args:
        num_chunks: into how many chunks the schedule cuts a tensor.
        rounds: the rounds in which this rank takes part.
    """

    def __init__(self, num_chunks: int, rounds: list[MessageRound]):
        self.num_chunks = num_chunks
        self.rounds = rounds
        # Training sends the same few sizes at every step: everything that follows from a size alone
        # is worked out once.
        self.parts = functools.lru_cache(maxsize=128)(self._parts)

    @classmethod
    def of(cls, schedule: Schedule, rank: int) -> "RankProgram":
        """Return the program of one rank."""
        rounds_of_ranks = schedule.per_rank()
        turns = in_turn(rounds_of_ranks)
        rounds = []
        for number, rank_round in enumerate(rounds_of_ranks[rank]):
            rounds.append(_merge(number, rank_round, turns))
        return cls(schedule.num_chunks, rounds)

    def _parts(
        self, count: int, segments: int, receipts_from: float
    ) -> tuple[list[slice], list[RoundPart]]:
        """Return the slices of a tensor, and the parts in the order in which to start them.

        All ranks start them in the same order. That lets messages match without tags. With fewer
        elements than chunks, some messages are empty: they are left out.

        Args:
            count: elements of the tensor.
            segments: parts of the tensor that go through the schedule side by side.
            receipts_from: elements from which a message is answered by a receipt if its sender
                turns to another rank next.
        """
        slices = _Slices(self.num_chunks)
        parts = []
        for messages in self.rounds:
            # Segment by segment within a round: one is on the wire while another one is added.
            for segment in range(segments):
                start = segment * count // segments
                stop = (segment + 1) * count // segments
                slices.cut(start, stop)
                part = _part_of_messages(messages, segment, slices)
                if part.sends or part.receives:
                    parts.append(part)
                receipts = _part_of_receipts(messages, segment, slices, receipts_from)
                if receipts.sends or receipts.receives:
                    parts.append(receipts)
        return slices.all(), parts


class _Slices:
    """The slices of a tensor that messages have used so far, each with its number (place)."""

    def __init__(self, num_chunks: int):
        self._num_chunks = num_chunks
        self._places: dict[tuple[int, int], int] = {}
        self._start = 0
        self._length = 0

    def cut(self, start: int, stop: int) -> None:
        """Let the chunks of messages lie between these elements from now on."""
        self._start = start
        self._length = stop - start

    def length(self, message: ChunkMessage) -> int:
        """Return the number of elements of a message."""
        first, last = self._edges(message)
        return last - first

    def place(self, message: ChunkMessage) -> int:
        """Return the place of a message that is not empty."""
        # Messages with equal edges share a place, and so the view that ``execute`` makes of it.
        return self._places.setdefault(self._edges(message), len(self._places))

    def all(self) -> list[slice]:
        """Return all slices, in the order of their places."""
        return [slice(first, last) for first, last in self._places]

    def _edges(self, message: ChunkMessage) -> tuple[int, int]:
        first = message.first * self._length // self._num_chunks
        last = message.last * self._length // self._num_chunks
        return self._start + first, self._start + last


def _part_of_messages(messages: MessageRound, segment: int, slices: _Slices) -> RoundPart:
    """Return a round of one segment, without its empty messages."""
    sends = []
    for message in messages.sends:
        if slices.length(message) > 0:
            sends.append((message.peer, slices.place(message)))
    receives = []
    for message in messages.receives:
        if slices.length(message) > 0:
            receives.append((message.peer, slices.place(message), message.add))
    return RoundPart(messages.number, segment, tuple(sends), tuple(receives))


def _part_of_receipts(
    messages: MessageRound, segment: int, slices: _Slices, receipts_from: float
) -> RoundPart:
    """Return the receipts of a round: those that this rank sends, and those that it waits for."""
    sends = []
    # A receipt travels against its message. Both ends see the same length, so they agree on
    # whether there is one.
    for message in messages.receives:
        if message.in_turn and slices.length(message) >= receipts_from:
            sends.append((message.peer, RECEIPT))
    receives = []
    for message in messages.sends:
        if message.in_turn and slices.length(message) >= receipts_from:
            receives.append((message.peer, RECEIPT, False))
    return RoundPart(messages.number, segment, tuple(sends), tuple(receives))


def _merge(number: int, rank_round: RankRound, turns: set[tuple[int, int]]) -> MessageRound:
    """Return a rank's messages of a round.

    Args:
        number: of the round among the rank's own.
        rank_round: the transfers.
        turns: (round, rank) of all ranks that turn to others next (``schedule.in_turn``).
    """
    sends = _Messages()
    for transfer in rank_round.sends:
        sends.add(transfer.dst, transfer, (rank_round.round, transfer.src) in turns)
    # Receipts depend on whether the sender turns to another rank, at this end, too.
    receives = _Messages()
    for transfer in rank_round.receives:
        receives.add(transfer.src, transfer, (rank_round.round, transfer.src) in turns)
    return MessageRound(number, sends.all(), receives.all())


class _Messages:
    """Transfers in one direction, merged where chunks lie side by side."""

    def __init__(self) -> None:
        self._by_peer: dict[int, list[ChunkMessage]] = {}

    def add(self, peer: int, transfer: Transfer, turns: bool) -> None:
        """Append a transfer to the last message of the peer if it continues it."""
        messages = self._by_peer.setdefault(peer, [])
        next_chunk = transfer.chunk + 1
        if messages:
            latest = messages[-1]
            if latest.last == transfer.chunk and latest.add == transfer.add:
                messages[-1] = latest._replace(last=next_chunk)
                return
        messages.append(ChunkMessage(peer, transfer.chunk, next_chunk, transfer.add, turns))

    def all(self) -> list[ChunkMessage]:
        """Return the messages, peer by peer."""
        merged = []
        for messages in self._by_peer.values():
            merged += messages
        return merged
