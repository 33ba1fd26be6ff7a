"""An allreduce algorithm as data: rounds of transfers, and the proof that it is right.

Each file beside this one makes schedules by a function ``schedule(size, ...)``. Four readers use
them: ``verify`` here, the cost model (``cost``), the engine that moves tensors
(``scaletrain.engine.execute``), and ``drawing``.
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from scaletrain import plugins
from scaletrain.errors import UserError

PROVED = 256  # ranks up to which ``proved`` proves


class Transfer(NamedTuple):
    """In one round, ``src`` sends a chunk to ``dst``, which adds it or replaces its own."""

    src: int
    dst: int
    chunk: int
    add: bool


Round = tuple[Transfer, ...]


def sent_back(transfers: Iterable[Transfer]) -> Round:
    """Return transfers in the other direction: a result goes back the way its terms came.

    >>> sent_back([Transfer(src=1, dst=0, chunk=0, add=True)])
    (Transfer(src=0, dst=1, chunk=0, add=False),)
    """
    return tuple(Transfer(dst, src, chunk, False) for src, dst, chunk, _ in transfers)


class RankRound(NamedTuple):
    """One rank's part of a round."""

    round: int  # index of the round in the schedule
    sends: list[Transfer]
    receives: list[Transfer]


class Schedule(NamedTuple):
    """The transfers of all ranks, round by round.

    The tensor is cut into ``num_chunks`` chunks of equal size (the last ones may be shorter). All
    transfers of a round read the values from before the round. Several additions to the same chunk
    happen in the order listed.

    >>> both = (Transfer(1, 0, 0, True),), (Transfer(0, 1, 0, False),)
    >>> verify(Schedule(size=2, num_chunks=1, rounds=both))
    """

    size: int
    num_chunks: int
    rounds: tuple[Round, ...]

    def reduction(self) -> "Schedule":
        """Return the part that adds (see ``verify_reduction``).

        It is a reduce (tree), or a reduce-scatter that leaves chunks on different ranks (ring).
        """
        return self._replace(rounds=_only(self.rounds, add=True))

    def distribution(self) -> "Schedule":
        """Return the part that replaces (see ``verify_distribution``).

        It is a broadcast (tree), or an all-gather (ring).
        """
        return self._replace(rounds=_only(self.rounds, add=False))

    def per_rank(self) -> list[list[RankRound]]:
        """Return, for each rank, the rounds in which it takes part, in their order."""
        rounds_of_ranks: list[list[RankRound]] = [[] for _ in range(self.size)]
        for index, transfers in enumerate(self.rounds):
            for transfer in transfers:
                _latest(rounds_of_ranks[transfer.src], index).sends.append(transfer)
                _latest(rounds_of_ranks[transfer.dst], index).receives.append(transfer)
        return rounds_of_ranks


def _latest(rounds: list[RankRound], index: int) -> RankRound:
    """Return the last of a rank's rounds, after adding round ``index`` if it is missing."""
    if not rounds or rounds[-1].round != index:
        rounds.append(RankRound(index, [], []))
    return rounds[-1]


def _only(rounds: Iterable[Round], *, add: bool) -> tuple[Round, ...]:
    """Return the transfers that add (or replace), without the rounds that have none."""
    kept = []
    for transfers in rounds:
        chosen = tuple(transfer for transfer in transfers if transfer.add == add)
        if chosen:
            kept.append(chosen)
    return tuple(kept)


# The proof


class ScheduleError(ValueError):
    """A schedule that is not an allreduce. The message names the round or rank that is wrong."""


def proved(name: str, size: int, **options: Any) -> Schedule:
    """Return the schedule of an algorithm on disk, proved if ``size`` is at most 256.

    Beyond that, the proof of a ring takes seconds.

    Raises:
        UserError: it is no allreduce of ``size`` ranks with these options; names the fault.
    """
    schedule = plugins.load("collective", name)(size, **options)
    if not isinstance(schedule, Schedule):
        raise UserError(
            f"collective {name}: schedule({size}) returned {schedule!r:.60} (allowed: a Schedule)"
        )
    if size <= PROVED:
        try:
            verify(schedule)
        except ScheduleError as error:
            raise UserError(f"collective {name}: no allreduce of {size} ranks: {error}") from None
    return schedule


def verify(schedule: Schedule) -> None:
    """Prove that a schedule is an allreduce, and that its replicas end bitwise equal.

    It needs no process and no tensor.

    1. Follow every rank's chunk as an expression: which contributions were added, in which order.
    2. At the end, each rank must hold each contribution exactly once, and all ranks the same
       expression, since floating-point addition is not associative.
    3. Run the ranks against each other as blocking steps, as the engine does, to show that none
       waits for ever.

    Raises:
        ScheduleError: a contribution is lost, doubled or misdirected, a replica adds in another
            order, or ranks block each other.
    """
    end = _follow(schedule)
    everyone = (1 << schedule.size) - 1
    first_rank = end.held[0]
    for rank, chunks in enumerate(end.held):
        # Missing contributions first: that message says more than one about orders.
        for chunk in range(schedule.num_chunks):
            end.require(rank, chunk, everyone)
        for chunk in range(schedule.num_chunks):
            if chunks[chunk].expression != first_rank[chunk].expression:
                raise ScheduleError(
                    f"at the end ranks 0 and {rank} have added chunk {chunk} in different orders"
                )
    verify_order(schedule.per_rank())


def verify_reduction(schedule: Schedule) -> list[int]:
    """Prove that every chunk's sum is complete on a rank at the end. Return these ranks.

    Each is the lowest if there are several. The same rank for all chunks: a reduce to it. An equal
    share for every rank: a reduce-scatter.

    Raises:
        ScheduleError: as ``verify``.
    """
    end = _follow(schedule)
    everyone = (1 << schedule.size) - 1
    owners = []
    for chunk in range(schedule.num_chunks):
        complete = [
            rank for rank, chunks in enumerate(end.held) if chunks[chunk].contributors == everyone
        ]
        if not complete:
            raise ScheduleError(f"at the end no rank holds the sum of chunk {chunk}")
        owners.append(complete[0])
    verify_order(schedule.per_rank())
    return owners


def verify_distribution(schedule: Schedule, owners: Sequence[int]) -> None:
    """Prove that every rank ends with each chunk of the rank that owns it.

    One owner of all chunks: a broadcast. All ranks are owners: an all-gather.

    Args:
        schedule: the distribution.
        owners: for each chunk, the rank that has it at the beginning.

    Raises:
        ScheduleError: as ``verify``.
    """
    # A rank's own bit stands for the value that it begins with, so a chunk with just the owner's
    # bit is the owner's chunk.
    wanted = []
    for rank in range(schedule.size):
        for chunk, owner in enumerate(owners):
            wanted.append((rank, chunk, 1 << owner))
    verify_results(schedule, wanted)


def verify_results(schedule: Schedule, wanted: Iterable[tuple[int, int, int]]) -> None:
    """Prove that ranks end with the chunks that they must have.

    Args:
        schedule: any collective.
        wanted: (rank, chunk, contributors), the last with a bit for each rank whose contribution
            the chunk must hold, and no other.

    Raises:
        ScheduleError: as ``verify``.
    """
    end = _follow(schedule)
    for rank, chunk, contributors in wanted:
        end.require(rank, chunk, contributors)
    verify_order(schedule.per_rank())


class _Held(NamedTuple):
    """One rank's value of one chunk."""

    contributors: int  # a bit for each rank whose contribution is in it
    expression: int  # number of the expression: equal numbers are sums in the same order


class _Lost(NamedTuple):
    """Contributions that a replacement took from a rank."""

    round: int
    transfer: Transfer
    contributors: int


class _Follower:
    """Follows the chunks of all ranks as expressions.

    Attributes:
        held: for each rank and chunk, its present value.
    """

    def __init__(self, size: int, num_chunks: int):
        self.held = [[_Held(1 << rank, rank)] * num_chunks for rank in range(size)]
        self._lost: list[_Lost] = []
        # The number of each sum of two expressions. Expression r is the contribution of rank r.
        self._sums: dict[tuple[int, int], int] = {}

    def run(self, index: int, transfers: Round) -> None:
        """Run round ``index``."""
        # Read before anything is written: the transfers of a round happen at once.
        sent = [self.held[transfer.src][transfer.chunk] for transfer in transfers]
        written: dict[tuple[int, int], bool] = {}  # (rank, chunk): whether something was added
        for transfer, value in zip(transfers, sent, strict=True):
            target = (transfer.dst, transfer.chunk)
            # Additions may come together, but beside a replacement the order would matter.
            if target in written and not (transfer.add and written[target]):
                raise ScheduleError(
                    f"round {index}: rank {transfer.dst} gets chunk {transfer.chunk} twice,"
                    " and one replaces the other"
                )
            written[target] = transfer.add
            if transfer.add:
                self._add(index, transfer, value)
            else:
                self._replace(index, transfer, value)

    def _add(self, index: int, transfer: Transfer, value: _Held) -> None:
        old = self.held[transfer.dst][transfer.chunk]
        common = old.contributors & value.contributors
        if common:
            raise ScheduleError(
                f"round {index}: rank {transfer.dst} adds the contribution of rank"
                f" {common.bit_length() - 1} twice (chunk {transfer.chunk})"
            )
        # a + b and b + a are the same number: addition commutes, it is only not associative.
        key = (
            min(old.expression, value.expression),
            max(old.expression, value.expression),
        )
        # The numbers below ``size`` are the contributions of the ranks.
        number = self._sums.setdefault(key, len(self.held) + len(self._sums))
        contributors = old.contributors | value.contributors
        self.held[transfer.dst][transfer.chunk] = _Held(contributors, number)

    def _replace(self, index: int, transfer: Transfer, value: _Held) -> None:
        # Not a fault yet: a later round may bring the contributions back.
        lost = self.held[transfer.dst][transfer.chunk].contributors & ~value.contributors
        if lost:
            self._lost.append(_Lost(index, transfer, lost))
        self.held[transfer.dst][transfer.chunk] = value

    def require(self, rank: int, chunk: int, contributors: int) -> None:
        """Raise ScheduleError unless a rank's chunk is the sum of exactly these contributions."""
        wrong = self.held[rank][chunk].contributors ^ contributors
        if not wrong:
            return
        other = (wrong & -wrong).bit_length() - 1  # the lowest rank among the wrong ones
        message = f"the contribution of rank {other} (chunk {chunk})"
        if not contributors >> other & 1:
            raise ScheduleError(f"at the end rank {rank} must not have {message}")
        raise ScheduleError(
            f"at the end rank {rank} lacks {message}{self._how_lost(rank, chunk, other)}"
        )

    def _how_lost(self, rank: int, chunk: int, other: int) -> str:
        """Return where the contribution of ``other`` was lost last; empty if it never came."""
        for index, transfer, contributors in reversed(self._lost):
            is_here = (transfer.dst, transfer.chunk) == (rank, chunk)
            if is_here and contributors >> other & 1:
                return (
                    f": in round {index} what rank {transfer.src} sent, which lacks it,"
                    " replaced the rank's own"
                )
        return ""


def _follow(schedule: Schedule) -> _Follower:
    """Return the values of all ranks at the end of a schedule."""
    size = schedule.size
    num_chunks = schedule.num_chunks
    if size < 1 or num_chunks < 1:
        raise ScheduleError(f"size {size} and {num_chunks} chunks: both must be at least 1")
    follower = _Follower(size, num_chunks)
    for index, transfers in enumerate(schedule.rounds):
        for transfer in transfers:
            src, dst, chunk, _ = transfer
            are_ranks = 0 <= src < size and 0 <= dst < size and src != dst
            if not are_ranks or not 0 <= chunk < num_chunks:
                raise ScheduleError(
                    f"round {index}: {transfer} is not between two of {size} ranks,"
                    f" or of one of {num_chunks} chunks"
                )
        follower.run(index, transfers)
    return follower


def verify_order(rounds_of_ranks: list[list[RankRound]]) -> None:
    """Prove that the ranks end if each round blocks until all its messages have been matched.

    Between two ranks, messages match in order, without tags: the n-th sent is the n-th received,
    and must be meant for it.

    Args:
        rounds_of_ranks: as ``Schedule.per_rank``.

    Raises:
        ScheduleError: ranks wait for each other, or a message matches a receive that was meant for
            another.
    """
    replay = _Replay(rounds_of_ranks)
    for rank in range(len(rounds_of_ranks)):
        replay.start(rank)
    stuck = []
    for rank, rounds in enumerate(rounds_of_ranks):
        if replay.num_done[rank] < len(rounds):
            stuck.append(f"rank {rank} in round {rounds[replay.num_done[rank]].round}")
    if stuck:
        raise ScheduleError(f"deadlock: {len(stuck)} ranks wait for ever ({', '.join(stuck[:4])})")


class _Replay:
    """Runs the ranks against each other. Each blocks until its messages are matched.

    Attributes:
        num_done: for each rank, how many of its rounds it has behind it.
    """

    def __init__(self, rounds_of_ranks: list[list[RankRound]]):
        self._rounds_of_ranks = rounds_of_ranks
        self.num_done = [0] * len(rounds_of_ranks)
        # Messages of each rank's present round that are not matched yet.
        self._num_open = [0] * len(rounds_of_ranks)
        # By (sender, receiver): messages that one side has posted and the other has not.
        self._sent: dict[tuple[int, int], deque[Transfer]] = {}
        self._awaited: dict[tuple[int, int], deque[Transfer]] = {}
        self._ready: list[int] = []  # ranks whose present round has just been completed by another

    def start(self, rank: int) -> None:
        """Start a rank, and let every rank go as far as it can."""
        self._post_until_blocked(rank)
        # A list instead of recursion: ranks wake each other in chains of any length.
        while self._ready:
            woken = self._ready.pop()
            is_at_end = self.num_done[woken] == len(self._rounds_of_ranks[woken])
            if not is_at_end and not self._num_open[woken]:
                self.num_done[woken] += 1
                self._post_until_blocked(woken)

    def _post_until_blocked(self, rank: int) -> None:
        rounds = self._rounds_of_ranks[rank]
        while self.num_done[rank] < len(rounds):
            rank_round = rounds[self.num_done[rank]]
            self._num_open[rank] = len(rank_round.sends) + len(rank_round.receives)
            # Both directions are posted before the rank blocks, so two ranks can swap in one round.
            for transfer in rank_round.sends:
                self._post(rank, transfer.dst, transfer, self._sent, self._awaited)
            for transfer in rank_round.receives:
                self._post(rank, transfer.src, transfer, self._awaited, self._sent)
            if self._num_open[rank]:
                return
            self.num_done[rank] += 1

    def _post(
        self,
        rank: int,
        other: int,
        transfer: Transfer,
        posted: dict[tuple[int, int], deque[Transfer]],
        opposite: dict[tuple[int, int], deque[Transfer]],
    ) -> None:
        """Post one side of a message, and match it if the other rank has posted its own.

        Args:
            rank: the rank that posts.
            other: the rank at the other end.
            transfer: the message.
            posted: all messages that were posted on this side.
            opposite: those on the other side.
        """
        pair = (transfer.src, transfer.dst)
        waiting = opposite.get(pair)
        if not waiting:
            posted.setdefault(pair, deque()).append(transfer)
            return
        match = waiting.popleft()
        if match != transfer:
            raise ScheduleError(
                f"rank {rank}, step {self.num_done[rank]}: {transfer} meets {match}:"
                " messages between two ranks have no tags"
            )
        self._num_open[rank] -= 1
        self._num_open[other] -= 1
        if not self._num_open[other] and other != rank:
            self._ready.append(other)


def in_turn(rounds_of_ranks: list[list[RankRound]]) -> set[tuple[int, int]]:
    """Return (round, rank) of all ranks that only send in a round, and then send to others.

    The root of a broadcast does so. Such a rank has nothing to wait for between the two, unless a
    receipt says that the first message has arrived. Where a message counts as sent before that,
    both share the link, and the receiver of the first waits for longer than a round.

    Args:
        rounds_of_ranks: as ``Schedule.per_rank``.
    """
    turns = set()
    for rank, rounds in enumerate(rounds_of_ranks):
        for now, after in pairwise(rounds):
            if not now.sends or now.receives or not after.sends:
                continue
            targets = {transfer.dst for transfer in now.sends}
            next_targets = {transfer.dst for transfer in after.sends}
            if targets != next_targets:
                turns.add((now.round, rank))
    return turns


# Pipelines


class Pipeline(NamedTuple):
    """Transfers that are repeated for every segment of the message.

    Each segment starts a fixed number of rounds after the one before (the period). In a round every
    rank sends at most one message and receives at most one, over all segments: one port, both
    directions at once.

    Attributes:
        size: number of ranks.
        transfers: of one segment, in an order that is right one by one.
        starts: for each of them, its round in the first segment.
        period: rounds from one segment to the next.
    """

    size: int
    transfers: tuple[Transfer, ...]
    starts: tuple[int, ...]
    period: int

    @classmethod
    def of(cls, transfers: Sequence[Transfer], size: int) -> "Pipeline":
        """Return the shortest pipeline of these transfers.

        Transfers are put into the earliest rounds with free ports, modulo the period. Compilers
        pipeline loops in the same way (modulo scheduling). The period is the shortest that any
        order has: the messages of the busiest port.
        """
        if not transfers:
            return cls(size, (), (), 1)
        num_sends = Counter(transfer.src for transfer in transfers)
        num_receives = Counter(transfer.dst for transfer in transfers)
        period = max(*num_sends.values(), *num_receives.values())
        # The earliest rounds make the shortest pipeline, but may run out of free ports. With a
        # coloring of the ports, each transfer's place in the period is free for certain.
        starts = _starts(transfers, period, None)
        if starts is None:
            starts = _starts(transfers, period, _colors(transfers, period))
        assert starts is not None
        return cls(size, tuple(transfers), tuple(starts), period)

    def num_rounds(self, segments: int) -> int:
        """Return how many rounds so many segments take."""
        if not self.transfers:
            return 0
        return max(self.starts) + 1 + self.period * (segments - 1)

    def num_chunks(self, segments: int) -> int:
        """Return into how many chunks the message is cut."""
        return (1 + max((transfer.chunk for transfer in self.transfers), default=0)) * segments

    def schedule(self, segments: int) -> Schedule:
        """Return the schedule of so many segments.

        Chunk c of a segment's transfers becomes chunk ``c * segments + i`` in segment i.
        """
        rounds: list[list[Transfer]] = [[] for _ in range(self.num_rounds(segments))]
        for segment in range(segments):
            for transfer, start in zip(self.transfers, self.starts, strict=True):
                src, dst, chunk, add = transfer
                moved = Transfer(src, dst, chunk * segments + segment, add)
                rounds[start + self.period * segment].append(moved)
        filled = tuple(tuple(transfers) for transfers in rounds if transfers)
        return Schedule(self.size, self.num_chunks(segments), filled)


def _starts(
    transfers: Sequence[Transfer], period: int, colors: Sequence[int] | None
) -> list[int] | None:
    """Return the round of each transfer of one segment: the earliest with free ports.

    Args:
        transfers: of one segment.
        period: rounds from one segment to the next.
        colors: for each transfer, its round modulo the period; None: any.

    Returns:
        None if there are no such rounds.
    """
    sending: set[tuple[int, int]] = set()  # (rank, round modulo the period) of busy ports
    receiving: set[tuple[int, int]] = set()
    # For each (rank, chunk): the first round that sees the value that was written last, and the
    # last round that reads it.
    visible_from: dict[tuple[int, int], int] = {}
    read_until: dict[tuple[int, int], int] = {}
    starts = []
    for index, (src, dst, chunk, _) in enumerate(transfers):
        source = (src, chunk)
        target = (dst, chunk)
        # A write may share a round with the last read before it: that still sees the old value.
        earliest = max(
            visible_from.get(source, 0), visible_from.get(target, 0), read_until.get(target, 0)
        )
        # Ports are busy in every period alike, so one period holds all choices.
        for start in range(earliest, earliest + period):
            color = start % period
            if (src, color) in sending or (dst, color) in receiving:
                continue
            if colors is None or color == colors[index]:
                break
        else:
            return None
        sending.add((src, color))
        receiving.add((dst, color))
        visible_from[target] = start + 1
        read_until[source] = max(read_until.get(source, 0), start)
        starts.append(start)
    return starts


Port = tuple[str, int]  # ("send", rank) or ("receive", rank)


def _colors(transfers: Sequence[Transfer], num_colors: int) -> list[int]:
    """Return a color for each transfer so that no port has two of one color.

    By Koenig's theorem, the messages of the busiest port are colors enough. For each transfer:

    1. Take a color that is free at its sender.
    2. If its receiver has that color already, swap it with a color that is free at the receiver,
       along the path of these two colors that starts there. The path never comes back to the
       sender.
    """
    coloring = _Coloring(transfers)
    for index, (sender, receiver) in enumerate(coloring.ports):
        color = _free_color(coloring.taken[sender], num_colors)
        other = _free_color(coloring.taken[receiver], num_colors)
        if color in coloring.taken[receiver]:
            coloring.swap_from(receiver, color, other)
        coloring.set(index, color)
    return coloring.colors


def _free_color(at_port: dict[int, int], num_colors: int) -> int:
    return next(color for color in range(num_colors) if color not in at_port)


class _Coloring:
    """Colors of some transfers.

    Attributes:
        ports: for each transfer, its sending and its receiving port.
        colors: for each transfer, its color; -1: none yet.
        taken: for each port, the transfer of each color.
    """

    def __init__(self, transfers: Sequence[Transfer]):
        self.ports: list[tuple[Port, Port]] = []
        self.taken: dict[Port, dict[int, int]] = {}
        for transfer in transfers:
            sender = ("send", transfer.src)
            receiver = ("receive", transfer.dst)
            self.ports.append((sender, receiver))
            self.taken[sender] = {}
            self.taken[receiver] = {}
        self.colors = [-1] * len(transfers)

    def set(self, index: int, color: int) -> None:
        """Give a transfer a color that is free at both its ports."""
        self.colors[index] = color
        for port in self.ports[index]:
            self.taken[port][color] = index

    def swap_from(self, port: Port, color: int, other: int) -> None:
        """Swap two colors along the path that starts at a port with ``color``."""
        path = self._path(port, color, other)
        # All out before any goes in: neighbours on the path swap places at the port between them.
        for index in path:
            for end in self.ports[index]:
                del self.taken[end][self.colors[index]]
        for index in path:
            self.set(index, other if self.colors[index] == color else color)

    def _path(self, port: Port, color: int, other: int) -> list[int]:
        """Return the transfers on the path from a port with colors ``color``, ``other``, ..."""
        path = []
        while color in self.taken[port]:
            index = self.taken[port][color]
            path.append(index)
            sender, receiver = self.ports[index]
            port = sender if port == receiver else receiver
            color, other = other, color
        return path
