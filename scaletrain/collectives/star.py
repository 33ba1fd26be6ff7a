"""Star: every rank sends its message to rank 0, which adds them up and sends the sum back; a parameter server's pattern."""

from scaletrain.collectives.schedule import Schedule, Transfer


def schedule(size: int) -> Schedule:
    """The centre receives and sends p - 1 whole messages (FireCaffe, section 4.1)."""
    up = tuple(Transfer(r, 0, 0, True) for r in range(1, size))
    down = tuple(Transfer(0, r, 0, False) for r in range(1, size))
    return Schedule(size, 1, (up, down) if size > 1 else ())
