"""Emulated links: the token bucket that a rate gets."""


def burst_bytes(rate: float) -> int:
    """A link's token bucket: 2 ms of its rate in bits a second, and at least one of TCP's large packets with the framing of the 45 that it
    stands for. A bucket that is smaller takes them apart, and 16 busy hosts are then more small packets than two cores can pass on."""
    return max(round(rate / 8 * 0.002), 72 * 1024)
