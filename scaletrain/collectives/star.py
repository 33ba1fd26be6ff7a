"""Star: every rank sends its message to the servers, which add it up and send the sum back; a parameter server's pattern."""

from typing import Annotated

from annotated_types import Ge

from scaletrain.collectives.schedule import Schedule, Transfer


def schedule(
    size: int, *, servers: Annotated[int, Ge(1)] = 1, segments: Annotated[int, Ge(1)] = 1
) -> Schedule:
    """The first ``servers`` ranks own a slice each (no more than there are ranks). One server receives and sends p - 1 whole messages
    (FireCaffe, section 4.1); k of them a k-th of it each (Li et al., OSDI 2014). With ``segments`` a server sends the sum of one
    segment while it receives the next, as a server does that answers each layer when it is complete.
    """
    servers = min(servers, size)
    up = [
        tuple(
            Transfer(r, s, s * segments + i, True)
            for s in range(servers)
            for r in range(size)
            if r != s
        )
        for i in range(segments)
    ]
    down = [tuple(Transfer(t.dst, t.src, t.chunk, False) for t in transfers) for transfers in up]
    rounds = [(*a, *b) for a, b in zip([*up, ()], [(), *down], strict=True)]
    return Schedule(size, servers * segments, tuple(rounds) if size > 1 else ())
