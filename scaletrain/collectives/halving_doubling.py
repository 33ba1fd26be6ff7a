"""Recursive halving and doubling (Rabenseifner): bandwidth-optimal in 2 log2(p) rounds."""

from scaletrain.collectives.cost import Load, crossings
from scaletrain.collectives.recursive_doubling import core_of, pair_crossings
from scaletrain.collectives.schedule import Schedule, Transfer, sent_back


def schedule(size: int) -> Schedule:
    """Return a reduce-scatter that swaps and adds halves, then an all-gather of the same.

    If p is not a power of two, the ranks beyond it first send their message to a core rank, and get
    the sum back at the end: one more message each way.

    Source: Rabenseifner, Optimization of collective reduction operations, ICCS 2004; Thakur,
    Rabenseifner and Gropp, IJHPCA 2005, section 4.5; Goyal et al. 2017.

    Args:
        size: number of ranks.
    """
    largest = _largest_power_of_two(size)
    core, extra = core_of(size, largest)
    halving = []
    distance = largest // 2
    while distance:
        # Core ranks i and i ^ distance share the block of 2 * distance chunks that holds chunk i.
        # Each keeps the half of it that holds its own chunk, and sends the other half.
        transfers = []
        for sender in range(largest):
            receiver = sender ^ distance
            first = receiver // distance * distance
            for chunk in range(first, first + distance):
                transfers.append(Transfer(core[sender], core[receiver], chunk, True))
        halving.append(tuple(transfers))
        distance //= 2
    # The same pairs backwards: each sends the sums that it holds to the one that lacks them.
    doubling = [sent_back(transfers) for transfers in reversed(halving)]
    rounds = [*halving, *doubling]
    if extra:
        rounds = [extra, *rounds, sent_back(extra)]
    return Schedule(size, largest, tuple(rounds))


def _largest_power_of_two(size: int) -> int:
    """Return the largest power of two that is at most ``size``."""
    return 1 << (size.bit_length() - 1)


def loads(size: int, *, hosts_per_leaf: int = 0) -> list[Load]:
    """Return the loads of the rounds, for so many ranks that the schedule is slow to make."""
    largest = _largest_power_of_two(size)
    core, extra = core_of(size, 1)
    halving: list[Load] = []
    doubling: list[Load] = []
    distance = largest // 2
    while distance:
        # Each rank sends ``distance`` of its ``largest`` chunks, and receives as many.
        share = distance / largest
        uplink = share * pair_crossings(core, distance, hosts_per_leaf)
        load = Load(1, messages=1, one_way=share, both_ways=2 * share, uplink=uplink)
        halving.append(load._replace(added=share))
        doubling.append(load)
        distance //= 2
    rounds = [*halving, *reversed(doubling)]
    if size == largest:
        return rounds
    # A rank outside the core hands over its whole message, and gets the whole sum at the end.
    after = Load(1, messages=1, one_way=1, both_ways=1, uplink=crossings(extra, hosts_per_leaf))
    return [after._replace(added=1), *rounds, after]
