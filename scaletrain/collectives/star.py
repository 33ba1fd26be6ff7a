"""Star: servers add up the messages of all ranks and send the sum back."""

from typing import Annotated

from annotated_types import Ge

from scaletrain.collectives.schedule import Schedule, Transfer, sent_back


def schedule(
    size: int, *, servers: Annotated[int, Ge(1)] = 1, segments: Annotated[int, Ge(1)] = 1
) -> Schedule:
    """Return the traffic of a parameter server.

    One server receives and sends p - 1 whole messages (Iandola et al., FireCaffe, CVPR 2016,
    section 4.1). Of k servers, each does so with a k-th of the message (Li et al., OSDI 2014).

    Args:
        size: number of ranks.
        servers: the first ranks, each of which owns a slice (no more than there are ranks).
        segments: parts of a slice. A server sends the sum of one segment while it receives the
            next, as a server does that answers each layer when it is complete.
    """
    if size == 1:
        return Schedule(size, segments, ())
    servers = min(servers, size)
    to_servers = []
    for segment in range(segments):
        transfers = []
        # Each server owns ``segments`` chunks in a row.
        for server in range(servers):
            for rank in range(size):
                if rank != server:
                    transfers.append(Transfer(rank, server, server * segments + segment, True))
        to_servers.append(transfers)
    rounds = [tuple(to_servers[0])]
    # The servers answer a segment in the round in which they receive the next one.
    for segment in range(segments):
        next_segment: list[Transfer] = []
        if segment + 1 < segments:
            next_segment = to_servers[segment + 1]
        rounds.append((*next_segment, *sent_back(to_servers[segment])))
    return Schedule(size, servers * segments, tuple(rounds))
