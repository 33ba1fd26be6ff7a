"""Splits the time of a training step into its parts, without slowing the step."""

import time
from collections.abc import Callable
from typing import Any

import torch


class StepClock:
    """Times one step: host time on the CPU; events on the stream, read at the end, on CUDA.

    Args:
        device: of the model.
        on_lap: called with the part at each lap.

    >>> clock = StepClock(torch.device("cpu"))
    >>> clock.lap("forward")
    >>> clock.lap("backward")
    >>> sorted(clock.stop())
    ['backward', 'forward']
    """

    def __init__(self, device: torch.device, on_lap: Callable[[str], None] = lambda part: None):
        self._on_lap = on_lap
        self._cuda = device.type == "cuda"
        self._start = self._now()
        self._laps: list[tuple[str, Any]] = []  # (part, moment of its end)

    def lap(self, part: str) -> None:
        """Note that ``part`` ends now. A part may have several laps."""
        self._laps.append((part, self._now()))
        self._on_lap(part)

    def stop(self) -> dict[str, float]:
        """Return the seconds spent in each part."""
        if self._cuda:
            # An event has no time before the device has passed it.
            torch.cuda.synchronize()
        spent: dict[str, float] = {}
        before = self._start
        for part, after in self._laps:
            # CUDA gives milliseconds.
            seconds = before.elapsed_time(after) / 1000 if self._cuda else after - before
            spent[part] = spent.get(part, 0.0) + seconds
            before = after
        return spent

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
