"""An allreduce algorithm as data: rounds of transfers between ranks; and the proof that a schedule is right.

A schedule is made by ``schedule(size, ...)`` of each file beside this one. It is read by four: ``verify`` here, the cost model (``cost``), the
engine that moves tensors, and ``draw``.
"""

from collections.abc import Iterator
from typing import NamedTuple


class Transfer(NamedTuple):
    """In one round, ``src`` sends its chunk to ``dst``, which adds it to its own or replaces its own by it."""

    src: int
    dst: int
    chunk: int
    add: bool


Round = tuple[Transfer, ...]


class Schedule(NamedTuple):
    """What every rank does. The tensor is cut into ``num_chunks`` pieces of equal size (the last ones may be shorter).

    All transfers of a round read the values from before the round.
    """

    size: int
    num_chunks: int
    rounds: tuple[Round, ...]

    def of_rank(self, rank: int) -> Iterator[tuple[list[Transfer], list[Transfer]]]:
        """(sends, receives) of one rank, round by round; rounds in which it does nothing are left out."""
        for transfers in self.rounds:
            sends = [t for t in transfers if t.src == rank]
            receives = [t for t in transfers if t.dst == rank]
            if sends or receives:
                yield sends, receives


class ScheduleError(ValueError):
    """A schedule that is not an allreduce; says which round or rank is wrong."""


def verify(schedule: Schedule) -> None:
    """Prove that a schedule is an allreduce whose replicas end bitwise equal. Needs no process and no tensor.

    Every rank's chunk is followed as an expression: the order in which contributions were added. At the end each rank must hold
    each contribution exactly once, and all ranks the same expression, since floating-point addition is not associative.

    Raises:
        ScheduleError: a contribution is lost or doubled, a replica adds in another order, or a transfer makes no sense.
    """
    size, chunks = schedule.size, schedule.num_chunks
    if size < 1 or chunks < 1:
        raise ScheduleError(f"size {size} and {chunks} chunks: both must be at least 1")
    # held[rank][chunk]: (set of contributors as a bit mask, interned expression number)
    numbers: dict[tuple[int, int], int] = {}
    held = [[(1 << rank, rank)] * chunks for rank in range(size)]
    for index, transfers in enumerate(schedule.rounds):
        before = [row[:] for row in held]
        written: set[tuple[int, int]] = set()
        for t in transfers:
            if not (0 <= t.src < size and 0 <= t.dst < size and t.src != t.dst and 0 <= t.chunk < chunks):
                raise ScheduleError(
                    f"round {index}: {t} is not between two of {size} ranks, or not one of {chunks} chunks"
                )
            mask, expression = before[t.src][t.chunk]
            if not t.add:
                if (t.dst, t.chunk) in written:
                    raise ScheduleError(f"round {index}: rank {t.dst} gets chunk {t.chunk} twice, and one replaces it")
                held[t.dst][t.chunk] = (mask, expression)
            else:
                own, own_expression = held[t.dst][t.chunk]
                if own & mask:
                    twice = (own & mask).bit_length() - 1
                    raise ScheduleError(
                        f"round {index}: rank {t.dst} adds the contribution of rank {twice} twice (chunk {t.chunk})"
                    )
                # a + b and b + a are the same number: addition commutes, it is only not associative
                key = (min(own_expression, expression), max(own_expression, expression))
                held[t.dst][t.chunk] = (own | mask, numbers.setdefault(key, size + len(numbers)))
            written.add((t.dst, t.chunk))
    everyone = (1 << size) - 1
    for rank in range(size):
        for chunk in range(chunks):
            mask, expression = held[rank][chunk]
            if mask != everyone:
                lost = (everyone & ~mask & -(everyone & ~mask)).bit_length() - 1
                raise ScheduleError(f"at the end rank {rank} lacks the contribution of rank {lost} (chunk {chunk})")
            if expression != held[0][chunk][1]:
                raise ScheduleError(f"at the end ranks 0 and {rank} have added chunk {chunk} in different orders")
