"""FireCaffe's binomial reduction tree: sums travel up to rank 0 in log2(p) rounds, the result travels down again."""

from scaletrain.collectives.schedule import Schedule, Transfer


def schedule(size: int) -> Schedule:
    """Iandola et al., FireCaffe (CVPR 2016), section 4: 2 ceil(log2 p) rounds of the whole message."""
    up = []
    distance = 1
    while distance < size:
        up.append(
            tuple(
                Transfer(r + distance, r, 0, True) for r in range(0, size - distance, 2 * distance)
            )
        )
        distance *= 2
    down = [
        tuple(Transfer(t.dst, t.src, 0, False) for t in transfers) for transfers in reversed(up)
    ]
    return Schedule(size, 1, tuple(up + down))
