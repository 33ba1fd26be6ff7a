"""Recursive halving and doubling (Rabenseifner): halves are swapped and added, then gathered again; bandwidth-optimal in log2(p) rounds."""

from scaletrain.collectives.cost import Load
from scaletrain.collectives.recursive_doubling import core_of
from scaletrain.collectives.schedule import Schedule, Transfer


def schedule(size: int) -> Schedule:
    """Thakur, Rabenseifner and Gropp, IJHPCA 2005, section 4.5; Goyal et al. 2017. When p is no power of two, the others hand their message over
    before (and get the sum after): one more message each way."""
    largest = 1 << (size.bit_length() - 1)
    core, extra = core_of(size, largest)
    halving = []
    distance = largest // 2
    while distance:
        # Ranks i and i ^ distance share the block of 2 * distance chunks that holds chunk i; each keeps its own half.
        halving.append(
            tuple(
                Transfer(core[i], core[i ^ distance], c, True)
                for i in range(largest)
                for c in range(
                    (i ^ distance) // distance * distance,
                    (i ^ distance) // distance * distance + distance,
                )
            )
        )
        distance //= 2
    doubling = [
        tuple(Transfer(t.dst, t.src, t.chunk, False) for t in transfers)
        for transfers in reversed(halving)
    ]
    rounds = [*halving, *doubling]
    if extra:
        rounds = [extra, *rounds, tuple(Transfer(t.dst, t.src, t.chunk, False) for t in extra)]
    return Schedule(size, largest, tuple(rounds))


def loads(size: int) -> list[Load]:
    largest = 1 << (size.bit_length() - 1)
    parts = []
    distance = largest // 2
    while distance:
        parts.append(distance / largest)
        distance //= 2
    found = [Load(1, 1, part, 2 * part, part) for part in parts] + [
        Load(1, 1, part, 2 * part) for part in reversed(parts)
    ]
    return found if size == largest else [Load(1, 1, 1, 1, 1), *found, Load(1, 1, 1, 1)]
