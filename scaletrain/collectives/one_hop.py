"""One hop: the collectives beside allreduce, each as a single round of direct messages.

Ranks that share memory are all neighbours, so that no message gains by a detour. As schedules,
these collectives are proved, costed and drawn like the allreduce algorithms beside this file.

>>> from scaletrain.collectives.drawing import as_text
>>> print(as_text(schedule_of("scatter", 3, root=1)))
round 0: 1 -> 0 [0], 1 -> 2 [2]
"""

import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from scaletrain.collectives.schedule import Schedule, Transfer, verify_results
from scaletrain.errors import unknown

PROVED = 64  # ranks up to which ``proved`` proves


class _Kind(NamedTuple):
    """A collective."""

    num_chunks: Callable[[int], int]  # by the number of ranks
    # The chunk that one rank sends to another: (sender, receiver, size). -1: none.
    chunk: Callable[[int, int, int], int]
    add: bool = False  # the receiver adds it
    to_root: bool = False  # only the root receives
    from_root: bool = False  # only the root sends

    @property
    def rooted(self) -> bool:
        """One of the ranks has a part of its own."""
        return self.to_root or self.from_root


def _one(size: int) -> int:
    return 1


def _one_a_rank(size: int) -> int:
    return size


def _one_a_pair(size: int) -> int:
    return size * size


def _whole(sender: int, receiver: int, size: int) -> int:
    return 0


def _of_sender(sender: int, receiver: int, size: int) -> int:
    return sender


def _of_receiver(sender: int, receiver: int, size: int) -> int:
    return receiver


def _of_pair(sender: int, receiver: int, size: int) -> int:
    return sender * size + receiver


_KINDS = {
    "broadcast": _Kind(_one, _whole, from_root=True),
    "reduce": _Kind(_one, _whole, add=True, to_root=True),
    "all_gather": _Kind(_one_a_rank, _of_sender),
    "reduce_scatter": _Kind(_one_a_rank, _of_receiver, add=True),
    "all_to_all": _Kind(_one_a_pair, _of_pair),
    "gather": _Kind(_one_a_rank, _of_sender, to_root=True),
    "scatter": _Kind(_one_a_rank, _of_receiver, from_root=True),
    # The messages have no content: a rank has come.
    "barrier": _Kind(_one_a_rank, _of_sender),
}
COLLECTIVES = tuple(_KINDS)
ROOTED = tuple(name for name, kind in _KINDS.items() if kind.rooted)


def schedule_of(collective: str, size: int, root: int = 0) -> Schedule:
    """Return a collective as one round.

    A receiver lists its messages from the rank after its own on, so that the ranks do not all turn
    to the same one first.

    Args:
        collective: one of ``COLLECTIVES``.
        size: number of ranks.
        root: the rank that sends or receives everything, in collectives that have one.

    Raises:
        UserError: no such collective.
    """
    if collective not in _KINDS:
        raise unknown("collective", collective, COLLECTIVES)
    kind = _KINDS[collective]
    transfers = []
    for distance in range(1, size):
        for receiver in range(size):
            sender = (receiver + distance) % size
            if kind.to_root and receiver != root:
                continue
            if kind.from_root and sender != root:
                continue
            chunk = kind.chunk(sender, receiver, size)
            transfers.append(Transfer(sender, receiver, chunk, kind.add))
    rounds = (tuple(transfers),) if transfers else ()
    return Schedule(size, kind.num_chunks(size), rounds)


def results(collective: str, size: int, root: int = 0) -> Iterator[tuple[int, int, int]]:
    """Yield what the ranks must have at the end, for ``schedule.verify_results``.

    Args: as ``schedule_of``.

    Yields:
        (rank, chunk, contributors), the last with a bit for each rank.
    """
    kind = _KINDS[collective]
    everyone = (1 << size) - 1
    for receiver in range(size):
        if kind.to_root and receiver != root:
            continue
        for sender in range(size):
            if kind.from_root and sender != root:
                continue
            contributors = everyone if kind.add else 1 << sender
            yield receiver, kind.chunk(sender, receiver, size), contributors


@functools.lru_cache(maxsize=256)
def proved(collective: str, size: int, root: int = 0) -> Schedule:
    """Return a collective's schedule, proved if ``size`` is at most 64.

    Beyond that, the proof of an all-to-all takes seconds.

    Args, Raises: as ``schedule_of``.
    """
    made = schedule_of(collective, size, root)
    if size <= PROVED:
        verify_results(made, results(collective, size, root))
    return made
