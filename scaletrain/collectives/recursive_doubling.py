"""Recursive doubling: pairs swap and add the whole message; few rounds, for small ones."""

from scaletrain.collectives.cost import Load, crossings
from scaletrain.collectives.schedule import Schedule, Transfer, sent_back


def schedule(size: int) -> Schedule:
    """Return log2(p) rounds of the whole message, between pairs at distance 1, 2, 4, ...

    There are 2 more rounds if p is not a power of two.

    Source: Thakur, Rabenseifner and Gropp, IJHPCA 2005, section 4.5.

    Args:
        size: number of ranks.
    """
    core, extra = core_of(size)
    rounds = [extra] if extra else []
    distance = 1
    while distance < len(core):
        transfers = []
        # Both ranks of a pair add the other's value: addition commutes, so they stay bitwise equal.
        for sender in range(len(core)):
            transfers.append(Transfer(core[sender], core[sender ^ distance], 0, True))
        rounds.append(tuple(transfers))
        distance *= 2
    if extra:
        rounds.append(sent_back(extra))
    return Schedule(size, 1, tuple(rounds))


def core_of(size: int, num_chunks: int = 1) -> tuple[list[int], tuple[Transfer, ...]]:
    """Return as many of the ranks as the largest power of two, and how the others hand over.

    Args:
        size: number of ranks.
        num_chunks: into how many chunks the message is cut.

    Returns:
        The ranks of the core, and the transfers by which each of the other ranks hands its message
        to one of these.
    """
    largest = 1 << (size.bit_length() - 1)
    num_others = size - largest
    # Odd ranks below 2 * num_others stand aside: neighbours are the likeliest to share a host.
    core = [*range(0, 2 * num_others, 2), *range(2 * num_others, size)]
    transfers = []
    for rank in range(1, 2 * num_others, 2):
        for chunk in range(num_chunks):
            transfers.append(Transfer(rank, rank - 1, chunk, True))
    return core, tuple(transfers)


def pair_crossings(core: list[int], distance: int, hosts_per_leaf: int) -> int:
    """Return the most messages that leave a leaf when pairs at a distance swap.

    Args:
        core: the ranks that swap.
        distance: between the two of a pair, in ``core``.
        hosts_per_leaf: as in ``Network``.
    """
    # Pairs closer than a leaf is wide may cross a border as well: every pair is looked at.
    swaps = []
    if hosts_per_leaf:
        for index, rank in enumerate(core):
            swaps.append((rank, core[index ^ distance]))
    return crossings(swaps, hosts_per_leaf)


def loads(size: int, *, hosts_per_leaf: int = 0) -> list[Load]:
    """Return the loads of the rounds, for so many ranks that the schedule is slow to make."""
    core, extra = core_of(size)
    rounds = []
    distance = 1
    while distance < len(core):
        uplink = pair_crossings(core, distance, hosts_per_leaf)
        rounds.append(Load(1, messages=1, one_way=1, both_ways=2, added=1, uplink=uplink))
        distance *= 2
    if not extra:
        return rounds
    after = Load(1, messages=1, one_way=1, both_ways=1, uplink=crossings(extra, hosts_per_leaf))
    return [after._replace(added=1), *rounds, after]
