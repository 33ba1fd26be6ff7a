"""How the engine cuts a message: facts that the engine and the cost model share."""

# Bandwidth-optimal algorithms. Where the pieces stay large, several parts of a message go through
# these schedules side by side, so that one part is on the wire while another is added.
SIDE_BY_SIDE = ("ring", "halving_doubling", "direct", "two_level")
_MOST_PARTS = 4
_SMALL_BYTES = 128 << 10  # smaller pieces cost more by their number than by their bytes

# Over TCP, a message travels in pieces of this size: one is added while the next arrives.
PIECE_BYTES = 512 << 10

# Over TCP, a message of at least this size is answered by a receipt if its sender turns to another
# rank next (``schedule.in_turn``).
RECEIPTS_FROM_BYTES = 1 << 20


def parts(collective: str, size: int, num_bytes: float) -> int:
    """Return in how many parts the engine sends a message through a chosen algorithm.

    The parts go through the schedule side by side.

    Args:
        collective: the algorithm that a person chose (``auto`` measures instead).
        size: number of ranks.
        num_bytes: size of the message.
    """
    if collective not in SIDE_BY_SIDE:
        return 1
    pieces_of_each_rank = int(num_bytes) // (size * _SMALL_BYTES)
    return max(1, min(_MOST_PARTS, pieces_of_each_rank))
