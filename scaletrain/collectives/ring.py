"""Ring: p chunks travel round, added on the way (reduce-scatter), then round again complete (all-gather); bandwidth-optimal."""

from scaletrain.collectives.cost import Load
from scaletrain.collectives.schedule import Schedule, Transfer


def schedule(size: int) -> Schedule:
    """Patarasuk and Yuan, JPDC 2009: 2(p - 1) rounds of 1/p of the message."""
    rounds = [
        tuple(Transfer(r, (r + 1) % size, (r - i) % size, True) for r in range(size))
        for i in range(size - 1)
    ] + [
        tuple(Transfer(r, (r + 1) % size, (r + 1 - i) % size, False) for r in range(size))
        for i in range(size - 1)
    ]
    return Schedule(size, size, tuple(rounds))


def loads(size: int) -> list[Load]:
    rounds = size - 1
    return (
        [Load(rounds, 1, 1 / size, 2 / size, 1 / size), Load(rounds, 1, 1 / size, 2 / size)]
        if rounds
        else []
    )
