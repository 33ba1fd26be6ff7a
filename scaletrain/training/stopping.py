"""Stop all ranks before the same step, on a signal that one of them got."""

import signal
import time
from typing import Any

import torch.distributed as dist

# In the job's store: the step before which all ranks stop, and a lower one for slow steps.
_STOP_AT = "scaletrain/stop_at"
_STOP_SOONER = "scaletrain/stop_sooner"
_LOOK_S = 1.0  # a rank looks into the store at least this often
_AHEAD = 3  # ranks are less than two steps apart, and each looks before every step by then


class StopTogether:
    """Stops all ranks before the same step, on SIGINT, SIGTERM or SIGUSR1.

    1. The rank that gets a signal before step s writes the step to stop at into the job's store. It
       is the second multiple of ``every`` after s.
    2. Every rank looks into the store at each multiple of ``every``, and where steps are slow at
       least once a second. In synchronous training ranks are less than two steps apart, so each of
       them looks before it gets there.
    3. A rank that has seen the step looks before each of its steps from then on. Two seconds later
       all others have seen it, too: if the step is still far, one of them writes that all stop
       three steps from here.

    A second signal ends the process at once.

    Args:
        store: the job's store, joined by all ranks.
        every: steps between two looks.
    """

    def __init__(self, store: dist.Store, every: int):
        self._store = store
        self._every = every
        self._stop_at: int | None = None  # once it is known
        self._is_announced = False  # whether this rank has written it
        # On this rank's monotonic clock.
        self._looked_at = time.monotonic()
        self._seen_at = 0.0
        # That this rank got. The handler interrupts this thread anywhere, perhaps between two calls
        # of the store: it only sets this number, and the store is written to before the next step.
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def __call__(self, step: int) -> bool:
        """Return True if the job stops before this step."""
        if self.signal and not self._is_announced:
            # The next look may be over for a rank that is a step ahead; the one after it is not.
            stop_at = (step // self._every + 2) * self._every
            # The first rank to write decides.
            self._store.compare_set(_STOP_AT, "", str(stop_at))
            self._is_announced = True
        if self._stop_at is None:
            self._look(step)
        else:
            self._look_for_sooner(step)
        return self._stop_at is not None and step >= self._stop_at

    def over(self) -> None:
        """Ignore a batch system's warning from now on: nothing is left to stop.

        By default SIGUSR1 would end the process in its last moments.
        """
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)

    def _look(self, step: int) -> None:
        """Look for the step to stop at, if it is time to."""
        now = time.monotonic()
        if step % self._every and now - self._looked_at < _LOOK_S and not self._is_announced:
            return
        self._looked_at = now
        # ``get`` alone would wait for the key.
        if self._store.check([_STOP_AT]):
            self._stop_at = int(self._store.get(_STOP_AT))
            self._seen_at = now

    def _look_for_sooner(self, step: int) -> None:
        """Look for a lower step to stop at; write one if all ranks look before each step now."""
        assert self._stop_at is not None
        sooner = step + _AHEAD
        if time.monotonic() - self._seen_at >= 2 * _LOOK_S and sooner < self._stop_at:
            self._store.compare_set(_STOP_SOONER, "", str(sooner))
        if self._store.check([_STOP_SOONER]):
            self._stop_at = min(self._stop_at, int(self._store.get(_STOP_SOONER)))

    def _on_signal(self, number: int, frame: Any) -> None:
        self.signal = number
        # The next one ends the process, as without this class. Not SIGUSR1: a batch system may send
        # its warning more than once, and a checkpoint is due.
        for second in (signal.SIGINT, signal.SIGTERM):
            signal.signal(second, signal.SIG_DFL)
