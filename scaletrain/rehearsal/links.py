"""Links as people write them: rates, latencies, and the token bucket that a rate gets."""

import re

from scaletrain.errors import UserError


def bits_per_s(bandwidth: str) -> float:
    """``1Gbit`` -> 1e9. Raises ``UserError`` for what is not a rate."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)bit(?:/s)?", bandwidth.strip(), re.IGNORECASE)
    if not match or float(match[1]) == 0:
        raise UserError(
            f"bandwidth: {bandwidth!r} is not a rate (allowed: 1Gbit, 100Mbit, 2.5Gbit, ...)"
        )
    return float(match[1]) * {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}[match[2].lower()]


def seconds(latency: str) -> float:
    """``100us`` -> 1e-4. Raises ``UserError`` for what is not a duration."""
    if str(latency) == "0":
        return 0.0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(us|ms|s)", str(latency).strip())
    if not match:
        raise UserError(
            f"latency: {latency!r} is not a duration (allowed: 0, 100us, 1.5ms, 0.1s, ...)"
        )
    return float(match[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[match[2]]


def burst_bytes(rate: float) -> int:
    """A link's token bucket: 2 ms of its rate in bits a second, and at least one of TCP's large packets with the framing of the 45 that it
    stands for. A bucket that is smaller takes them apart, and 16 busy hosts are then more small packets than two cores can pass on."""
    return max(round(rate / 8 * 0.002), 72 * 1024)
