"""FireCaffe's binomial tree: sums go up to rank 0 in log2(p) rounds, and down again."""

from scaletrain.collectives.schedule import Schedule, Transfer, sent_back


def schedule(size: int) -> Schedule:
    """Return a binomial reduction tree: 2 ceil(log2 p) rounds of the whole message.

    Source: Iandola et al., FireCaffe, CVPR 2016, section 4.

    Args:
        size: number of ranks.
    """
    up = []
    distance = 1
    while distance < size:
        transfers = []
        # The multiples of ``distance`` hold partial sums. Every second one hands its sum down.
        for rank in range(0, size - distance, 2 * distance):
            transfers.append(Transfer(rank + distance, rank, 0, True))
        up.append(tuple(transfers))
        distance *= 2
    down = [sent_back(transfers) for transfers in reversed(up)]
    return Schedule(size, 1, (*up, *down))
