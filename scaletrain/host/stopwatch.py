"""A stopwatch for waits, which leaves out the time in which this process itself was stopped."""

import time
from collections.abc import Callable

# A process that looks several times a second and comes back this late was stopped itself: by a
# batch system, a person, a debugger or a closed lid, and most often with the whole job.
ABSENT_S = 3.0


class Stopwatch:
    """Measures a wait for others, look by look.

    Nobody can answer while the whole job is stopped. A limit that went on meanwhile would end a
    healthy job, so a gap of more than ``ABSENT_S`` between two looks does not count. Look at least
    once a second.

    Args:
        clock: returns monotonic seconds.

    Example:
        >>> times = iter([0.0, 0.5, 60.5, 61.0])
        >>> stopwatch = Stopwatch(lambda: next(times))
        >>> [stopwatch.look() for _ in range(3)]
        [0.5, 0.5, 1.0]
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._looked_at = clock()
        self._waited_s = 0.0

    def look(self) -> float:
        """Return the seconds of the wait so far."""
        now = self._clock()
        gap_s = now - self._looked_at
        self._looked_at = now
        if gap_s <= ABSENT_S:
            self._waited_s += gap_s
        return self._waited_s

    def absence(self) -> float:
        """Look, and return the seconds for which this process was away; 0: it was not.

        For waits whose beginnings are kept elsewhere: they begin so much later.

        >>> times = iter([0.0, 0.5, 60.5, 61.0])
        >>> stopwatch = Stopwatch(lambda: next(times))
        >>> [stopwatch.absence() for _ in range(3)]
        [0.0, 60.0, 0.0]
        """
        before, waited_s = self._looked_at, self._waited_s
        if self.look() > waited_s:
            return 0.0
        return self._looked_at - before
