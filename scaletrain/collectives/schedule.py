"""An allreduce algorithm as data: rounds of transfers between ranks; and the proof that a schedule is right.

A schedule is made by ``schedule(size, ...)`` of each file beside this one. It is read by four: ``verify`` here, the cost model (``cost``), the
engine that moves tensors (``scaletrain.engine.execute``), and ``draw`` (``drawing``).
"""

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from scaletrain import plugins
from scaletrain.errors import UserError

PROVED = 256  # ranks up to which ``proved`` proves


class Transfer(NamedTuple):
    """In one round, ``src`` sends its chunk to ``dst``, which adds it to its own or replaces its own by it."""

    src: int
    dst: int
    chunk: int
    add: bool


Round = tuple[Transfer, ...]
Program = list[tuple[int, list[Transfer], list[Transfer]]]


class Schedule(NamedTuple):
    """What every rank does. The tensor is cut into ``num_chunks`` pieces of equal size (the last ones may be shorter).

    All transfers of a round read the values from before the round; several additions to the same chunk happen in the order listed.
    """

    size: int
    num_chunks: int
    rounds: tuple[Round, ...]

    def reduction(self) -> "Schedule":
        """The part that adds: a reduce (tree), or a reduce-scatter whose chunks end on different ranks (ring). See ``verify_reduction``."""
        return self._replace(rounds=_only(self.rounds, add=True))

    def distribution(self) -> "Schedule":
        """The part that replaces: a broadcast (tree), or an all-gather (ring). See ``verify_distribution``."""
        return self._replace(rounds=_only(self.rounds, add=False))

    def programs(self) -> list[Program]:
        """What each rank does: (round, sends, receives) for the rounds in which it takes part."""
        found: list[Program] = [[] for _ in range(self.size)]
        for index, transfers in enumerate(self.rounds):
            for t in transfers:
                for rank, side in ((t.src, 1), (t.dst, 2)):
                    mine = found[rank]
                    if not mine or mine[-1][0] != index:
                        mine.append((index, [], []))
                    mine[-1][side].append(t)  # type: ignore[union-attr]
        return found


class ScheduleError(ValueError):
    """A schedule that is not an allreduce; says which round or rank is wrong."""


def proved(name: str, size: int, **options: Any) -> Schedule:
    """The schedule of an algorithm on disk, proved where ``size`` is at most 256 (beyond it a ring's proof takes seconds).

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
    """Prove that a schedule is an allreduce whose replicas end bitwise equal. Needs no process and no tensor.

    Every rank's chunk is followed as an expression: which contributions were added, in which order. At the end each rank must hold each
    contribution exactly once, and all ranks the same expression, since floating-point addition is not associative. The ranks' programs
    are then run against each other as blocking steps, as the engine does, to show that nobody waits for ever.

    Raises:
        ScheduleError: a contribution is lost, doubled or misdirected, a replica adds in another order, or ranks block each other.
    """
    held, lost = _follow(schedule)
    everyone = (1 << schedule.size) - 1
    for rank in range(schedule.size):
        _require(held, lost, rank, range(schedule.num_chunks), everyone)
        for chunk in range(schedule.num_chunks):
            if held[rank][chunk].expression != held[0][chunk].expression:
                raise ScheduleError(
                    f"at the end ranks 0 and {rank} have added chunk {chunk} in different orders"
                )
    verify_order(schedule.programs())


def verify_reduction(schedule: Schedule) -> list[int]:
    """Prove that every chunk's sum is complete on a rank at the end; returns that rank (the lowest) for each chunk.

    All the same rank: a reduce to it. An equal share for every rank: a reduce-scatter. Raises as ``verify``.
    """
    held, _ = _follow(schedule)
    everyone = (1 << schedule.size) - 1
    owners = []
    for chunk in range(schedule.num_chunks):
        owner = next(
            (rank for rank in range(schedule.size) if held[rank][chunk].mask == everyone), None
        )
        if owner is None:
            raise ScheduleError(f"at the end no rank holds the sum of chunk {chunk}")
        owners.append(owner)
    verify_order(schedule.programs())
    return owners


def verify_distribution(schedule: Schedule, owners: Sequence[int]) -> None:
    """Prove that every rank ends with chunk c of rank ``owners[c]``: a broadcast (one owner), an all-gather (all are). Raises as ``verify``."""
    held, lost = _follow(schedule)
    for rank in range(schedule.size):
        for chunk, owner in enumerate(owners):
            _require(held, lost, rank, [chunk], 1 << owner)
    verify_order(schedule.programs())


class _Held(NamedTuple):
    """What a rank has of a chunk."""

    mask: int  # contributors, a bit each
    expression: int  # number of the expression: equal numbers are sums in the same order


class _Lost(NamedTuple):
    """Contributions that a replacement took from a rank."""

    round: int
    transfer: Transfer
    mask: int


def _follow(schedule: Schedule) -> tuple[list[list[_Held]], list[_Lost]]:
    """What every rank holds of every chunk at the end, and what was lost on the way."""
    size, chunks = schedule.size, schedule.num_chunks
    if size < 1 or chunks < 1:
        raise ScheduleError(f"size {size} and {chunks} chunks: both must be at least 1")
    numbers: dict[tuple[int, int], int] = {}
    held = [[_Held(1 << rank, rank)] * chunks for rank in range(size)]
    lost: list[_Lost] = []
    for index, transfers in enumerate(schedule.rounds):
        for t in transfers:
            if not (
                0 <= t.src < size and 0 <= t.dst < size and t.src != t.dst and 0 <= t.chunk < chunks
            ):
                raise ScheduleError(
                    f"round {index}: {t} is not between two of {size} ranks, or of one of {chunks} chunks"
                )
        before = [held[t.src][t.chunk] for t in transfers]
        written: dict[tuple[int, int], bool] = {}
        for t, (mask, expression) in zip(transfers, before, strict=True):
            if (t.dst, t.chunk) in written and not (t.add and written[t.dst, t.chunk]):
                raise ScheduleError(
                    f"round {index}: rank {t.dst} gets chunk {t.chunk} twice, and one replaces the other"
                )
            if t.add:
                own, own_expression = held[t.dst][t.chunk]
                if own & mask:
                    twice = (own & mask).bit_length() - 1
                    raise ScheduleError(
                        f"round {index}: rank {t.dst} adds the contribution of rank {twice} twice (chunk {t.chunk})"
                    )
                # a + b and b + a are the same number: addition commutes, it is only not associative
                key = (min(own_expression, expression), max(own_expression, expression))
                held[t.dst][t.chunk] = _Held(
                    own | mask, numbers.setdefault(key, size + len(numbers))
                )
            else:
                if gone := held[t.dst][t.chunk].mask & ~mask:
                    lost.append(_Lost(index, t, gone))
                held[t.dst][t.chunk] = _Held(mask, expression)
            written[t.dst, t.chunk] = t.add
    return held, lost


def _require(
    held: list[list[_Held]], lost: list[_Lost], rank: int, chunks: Iterable[int], wanted: int
) -> None:
    for chunk in chunks:
        if wrong := held[rank][chunk].mask ^ wanted:
            other = (wrong & -wrong).bit_length() - 1
            what = "lacks" if wanted >> other & 1 else "must not have"
            how = [
                f": in round {number} what rank {t.src} sent, which lacks it, replaced the rank's own"
                for number, t, mask in lost
                if what == "lacks" and (t.dst, t.chunk) == (rank, chunk) and mask >> other & 1
            ]
            raise ScheduleError(
                f"at the end rank {rank} {what} the contribution of rank {other} (chunk {chunk}){''.join(how[-1:])}"
            )


def _only(rounds: Iterable[Round], *, add: bool) -> tuple[Round, ...]:
    kept = (tuple(t for t in transfers if t.add == add) for transfers in rounds)
    return tuple(transfers for transfers in kept if transfers)


def verify_order(programs: list[Program]) -> None:
    """Prove that the ranks' programs end when every step blocks until its own messages have been met by their other side.

    Between two ranks messages match in order, without tags: the n-th sent is the n-th received, and must be meant for it.

    Raises:
        ScheduleError: ranks wait for each other, or a message meets a receive that was meant for another.
    """
    done = [0] * len(programs)  # steps that each rank has behind it
    # What src has posted for dst and the other way round, as (chunk, add), not yet met
    sent: dict[tuple[int, int], deque[Transfer]] = {}
    awaited: dict[tuple[int, int], deque[Transfer]] = {}
    open_messages = [0] * len(programs)  # of the step each rank is in

    def post(rank: int, ready: list[int]) -> None:
        while done[rank] < len(programs[rank]):
            _, sends, receives = programs[rank][done[rank]]
            open_messages[rank] = len(sends) + len(receives)
            for mine, theirs, messages in ((sent, awaited, sends), (awaited, sent, receives)):
                for t in messages:
                    other = t.dst if t.src == rank else t.src
                    if met := theirs.get((t.src, t.dst)):
                        opposite = met.popleft()
                        if opposite != t:
                            raise ScheduleError(
                                f"rank {rank}, step {done[rank]}: {t} meets {opposite}: messages between two ranks have no tags"
                            )
                        open_messages[rank] -= 1
                        open_messages[other] -= 1
                        if not open_messages[other] and other != rank:
                            ready.append(other)
                    else:
                        mine.setdefault((t.src, t.dst), deque()).append(t)
            if open_messages[rank]:
                return
            done[rank] += 1

    ready: list[int] = []
    for rank in range(len(programs)):
        post(rank, ready)
        while ready:
            woken = ready.pop()
            if done[woken] < len(programs[woken]) and not open_messages[woken]:
                done[woken] += 1
                post(woken, ready)
    stuck = [rank for rank, program in enumerate(programs) if done[rank] < len(program)]
    if stuck:
        waits = ", ".join(
            f"rank {rank} in round {programs[rank][done[rank]][0]}" for rank in stuck[:4]
        )
        raise ScheduleError(f"deadlock: {len(stuck)} ranks wait for ever ({waits})")


def in_turn(programs: list[Program]) -> set[tuple[int, int]]:
    """(round, rank) of all ranks that only send in a round, and then send to others: as the root of a broadcast does.

    Such a rank has nothing to wait for between the two, unless it is told that the first message has arrived. Where it counts as sent
    before that, both share the link, and whoever waits for the first waits for longer than a round.
    """
    found = set()
    for rank, program in enumerate(programs):
        for (index, sends, receives), (_, after, _) in pairwise(program):
            if (
                sends
                and not receives
                and after
                and {t.dst for t in sends} != {t.dst for t in after}
            ):
                found.add((index, rank))
    return found


def pipeline(transfers: Sequence[Transfer], size: int, segments: int) -> Schedule:
    """Repeat ``transfers`` for every segment of the message, one segment a fixed number of rounds after the other.

    In a round every rank sends at most one message and receives at most one (one port, both directions at once), over all
    segments: ``transfers``, given in an order that is right one by one, are put into the earliest rounds whose ports are free modulo the
    period (modulo scheduling, as compilers pipeline loops). The period is the shortest that any order has: the busiest port's messages.
    Chunk c of ``transfers`` becomes chunk ``c * segments + i`` in segment i.
    """
    if not transfers:
        return Schedule(size, segments, ())
    sends, receives = Counter(t.src for t in transfers), Counter(t.dst for t in transfers)
    period = max(*sends.values(), *receives.values())
    starts = _starts(transfers, period, None) or _starts(
        transfers, period, _colors(transfers, period)
    )
    assert starts is not None
    rounds: list[list[Transfer]] = [[] for _ in range(max(starts) + 1 + period * (segments - 1))]
    for segment in range(segments):
        for t, start in zip(transfers, starts, strict=True):
            rounds[start + period * segment].append(
                Transfer(t.src, t.dst, t.chunk * segments + segment, t.add)
            )
    num_chunks = (1 + max(t.chunk for t in transfers)) * segments
    return Schedule(size, num_chunks, tuple(tuple(transfers) for transfers in rounds if transfers))


def _starts(
    transfers: Sequence[Transfer], period: int, colors: Sequence[int] | None
) -> list[int] | None:
    """The round of each transfer of one segment: the earliest with free ports (None if there is none), or with its color modulo the period."""
    sending, receiving = set(), set()  # (rank, round modulo the period)
    written: dict[
        tuple[int, int], int
    ] = {}  # (rank, chunk): the first round that sees what was last written
    read: dict[tuple[int, int], int] = {}  # (rank, chunk): the last round that reads it
    starts = []
    for index, t in enumerate(transfers):
        source, target = (t.src, t.chunk), (t.dst, t.chunk)
        earliest = max(written.get(source, 0), written.get(target, 0), read.get(target, 0))
        for start in range(earliest, earliest + period):
            free = (t.src, start % period) not in sending and (
                t.dst,
                start % period,
            ) not in receiving
            if free and (colors is None or start % period == colors[index]):
                break
        else:
            return None
        sending.add((t.src, start % period))
        receiving.add((t.dst, start % period))
        written[target] = start + 1
        read[source] = max(read.get(source, 0), start)
        starts.append(start)
    return starts


def _colors(transfers: Sequence[Transfer], num_colors: int) -> list[int]:
    """A color for each transfer so that no rank sends, and none receives, two of one color.

    Koenig's theorem: the busiest port's messages are colors enough. Each transfer takes a color that is free at its sender; where that
    is taken at its receiver, the two colors are swapped along the path that starts there.
    """
    taken: dict[tuple[str, int], dict[int, int]] = {}  # port: {color: transfer}
    colors = [-1] * len(transfers)
    ports = [(("send", t.src), ("receive", t.dst)) for t in transfers]
    for index, (sender, receiver) in enumerate(ports):
        at_sender, at_receiver = taken.setdefault(sender, {}), taken.setdefault(receiver, {})
        a = next(color for color in range(num_colors) if color not in at_sender)
        b = next(color for color in range(num_colors) if color not in at_receiver)
        if (
            a in at_receiver
        ):  # swap a and b along the path from the receiver; it never comes back to the sender
            path, port, color = [], receiver, a
            while (step := taken[port].get(color)) is not None:
                path.append(step)
                port = ports[step][0] if port == ports[step][1] else ports[step][1]
                color = a + b - color
            for step in path:
                for end in ports[step]:
                    del taken[end][colors[step]]
            for step in path:
                colors[step] = a + b - colors[step]
                for end in ports[step]:
                    taken[end][colors[step]] = step
        colors[index] = a
        at_sender[a] = at_receiver[a] = index
    return colors
