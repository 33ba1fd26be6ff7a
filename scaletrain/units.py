"""Quantities as people write them: rates, durations, sizes and counts."""

import re

from scaletrain.errors import UserError


def plural(count: int, noun: str) -> str:
    """Return a count with its noun, in the plural where it needs one.

    >>> plural(1, "worker"), plural(3, "worker")
    ('1 worker', '3 workers')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def duration(seconds: float) -> str:
    """Return a duration as people say it, in at most two units.

    >>> duration(95), duration(5400), duration(200_000)
    ('95 s', '1 h 30 min', '2 d 7 h')
    """
    whole = round(seconds)
    if whole < 120:
        return f"{whole} s"
    minutes = round(whole / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def bits_per_s(bandwidth: str) -> float:
    """Return a rate in bits per second.

    >>> bits_per_s("2.5Gbit")
    2500000000.0

    Raises:
        UserError: the text is not a rate.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)bit(?:/s)?", bandwidth.strip(), re.IGNORECASE)
    # A link with a rate of 0 would never deliver anything.
    if not match or float(match[1]) == 0:
        raise UserError(
            f"bandwidth: {bandwidth!r} is not a rate (allowed: 1Gbit, 100Mbit, 2.5Gbit, ...)"
        )
    factors = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
    return float(match[1]) * factors[match[2].lower()]


def seconds(latency: str) -> float:
    """Return a duration in seconds.

    >>> seconds("1.5ms")
    0.0015

    Raises:
        UserError: the text is not a duration.
    """
    # YAML reads a bare 0 as a number, and zero needs no unit.
    if str(latency) == "0":
        return 0.0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(us|ms|s)", str(latency).strip())
    if not match:
        raise UserError(
            f"latency: {latency!r} is not a duration (allowed: 0, 100us, 1.5ms, 0.1s, ...)"
        )
    factors = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
    return float(match[1]) * factors[match[2]]
