"""Direct: each rank owns a slice, gets it from all others at once and sends the sum to all; two rounds, bandwidth-optimal."""

from scaletrain.collectives.cost import Load
from scaletrain.collectives.schedule import Schedule, Transfer


def schedule(size: int) -> Schedule:
    """Reduce-scatter and all-gather in one hop each: 2(p - 1) messages of 1/p a rank. Owners add in the order of the ranks after
    their own. On shared memory this is the fast path."""
    up = tuple(
        Transfer((owner + i) % size, owner, owner, True)
        for i in range(1, size)
        for owner in range(size)
    )
    down = tuple(Transfer(t.dst, t.src, t.chunk, False) for t in up)
    return Schedule(size, size, (up, down) if size > 1 else ())


def loads(size: int) -> list[Load]:
    part = (size - 1) / size
    return (
        [Load(1, size - 1, part, 2 * part, part), Load(1, size - 1, part, 2 * part)]
        if size > 1
        else []
    )
