"""Recursive doubling: pairs swap and add the whole message, at distance 1, 2, 4, ...; the fewest rounds, for small messages."""

from scaletrain.collectives.schedule import Schedule, Transfer


def schedule(size: int) -> Schedule:
    """Thakur, Rabenseifner and Gropp, IJHPCA 2005, section 4.5: log2(p) rounds of the whole message; 2 more when p is no power of two."""
    core, extra = core_of(size)
    rounds = [extra] if extra else []
    distance = 1
    while distance < len(core):
        rounds.append(
            tuple(Transfer(core[i], core[i ^ distance], 0, True) for i in range(len(core))),
        )
        distance *= 2
    if extra:
        rounds.append(tuple(Transfer(t.dst, t.src, 0, False) for t in extra))
    return Schedule(size, 1, tuple(rounds))


def core_of(size: int, chunks: int = 1) -> tuple[list[int], tuple[Transfer, ...]]:
    """A power of two of the ranks, and the transfers by which each of the others hands its message to one of these."""
    largest = 1 << (size.bit_length() - 1)
    others = size - largest
    # Odd ranks below 2 * others stand aside: neighbours are the likeliest to share a host.
    core = [*range(0, 2 * others, 2), *range(2 * others, size)]
    return core, tuple(
        Transfer(r, r - 1, c, True) for r in range(1, 2 * others, 2) for c in range(chunks)
    )
