"""Direct: each rank adds up a slice from all others at once, then sends the sum to all."""

from scaletrain.collectives.cost import Load
from scaletrain.collectives.schedule import Schedule, Transfer, sent_back


def schedule(size: int) -> Schedule:
    """Return a reduce-scatter and an all-gather in one hop each, which is bandwidth-optimal.

    A rank sends 2(p - 1) messages of 1/p of the tensor. The owner of a slice adds the others in the
    order of the ranks after its own. On shared memory this is the fast path.

    Args:
        size: number of ranks.
    """
    if size == 1:
        return Schedule(size, size, ())
    to_owners = []
    for distance in range(1, size):
        for owner in range(size):
            to_owners.append(Transfer((owner + distance) % size, owner, owner, True))
    return Schedule(size, size, (tuple(to_owners), sent_back(to_owners)))


def loads(size: int, *, hosts_per_leaf: int = 0) -> list[Load]:
    """Return the loads of the rounds, for so many ranks that the schedule is slow to make."""
    if size == 1:
        return []
    # p - 1 slices of 1/p each.
    share = (size - 1) / size
    uplink = 0.0
    if hosts_per_leaf:
        # Each rank of a leaf sends a slice to every rank outside. The last leaf may be smaller.
        for inside in {min(hosts_per_leaf, size), size % hosts_per_leaf}:
            uplink = max(uplink, inside * (size - inside) / size)
    rounds = Load(repeats=1, messages=size - 1, one_way=share, both_ways=2 * share, uplink=uplink)
    return [rounds._replace(added=share), rounds]
