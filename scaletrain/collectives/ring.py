"""Ring: chunks go round and are added, then go round complete; bandwidth-optimal."""

from scaletrain.collectives.cost import Load
from scaletrain.collectives.schedule import Schedule, Transfer


def schedule(size: int) -> Schedule:
    """Return a reduce-scatter and an all-gather: 2(p - 1) rounds of 1/p of the message.

    Source: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of
    workstations, JPDC 2009.

    Args:
        size: number of ranks.
    """
    rounds = []
    # A rank sends the chunk that it has added to in the round before. At the end, rank r holds
    # the whole sum of chunk r + 1, which is the first that the second half sends on.
    for index in range(size - 1):
        rounds.append(_round(size, -index, add=True))
    for index in range(size - 1):
        rounds.append(_round(size, 1 - index, add=False))
    return Schedule(size, size, tuple(rounds))


def _round(size: int, offset: int, *, add: bool) -> tuple[Transfer, ...]:
    """Return a round in which every rank sends chunk ``rank + offset`` to the next rank."""
    transfers = []
    for rank in range(size):
        transfers.append(Transfer(rank, (rank + 1) % size, (rank + offset) % size, add))
    return tuple(transfers)


def loads(size: int, *, hosts_per_leaf: int = 0) -> list[Load]:
    """Return the loads of the rounds, for so many ranks that the schedule is slow to make."""
    num_rounds = size - 1
    if num_rounds == 0:
        return []
    share = 1 / size
    # Neighbours share a leaf, but for one chunk that leaves it and one that enters.
    has_several_leaves = 0 < hosts_per_leaf < size
    uplink = share if has_several_leaves else 0.0
    rounds = Load(num_rounds, messages=1, one_way=share, both_ways=2 / size, uplink=uplink)
    return [rounds._replace(added=share), rounds]
