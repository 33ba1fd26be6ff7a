"""Do something on all ranks before the same step: stop on a signal, save when asked to."""

import signal
import time
from typing import Any

import torch.distributed as dist

from scaletrain.run.layout import RunDir

# In the job's store: the step before which all ranks stop; or save, for the nth time.
_STOP = "scaletrain/stop_at"
_SAVE = "scaletrain/save_at"
_LOOK_S = 1.0  # a rank looks into the store at least this often
_AHEAD = 3  # ranks are less than two steps apart, and each looks before every step by then


class Appointment:
    """A step that all ranks agree on, because one of them asked for it.

    1. The rank that asks before step s writes a step into the job's store: the second multiple of
       ``every`` after s.
    2. Every rank looks into the store at each multiple of ``every``, and where steps are slow at
       least once a second. In synchronous training ranks are less than two steps apart, so each of
       them looks before it gets there.
    3. A rank that has seen the step looks before each of its steps from then on. Two seconds later
       all others have seen it, too. If the step is still far away then, one rank writes a closer
       one: three steps ahead.

    Args:
        store: the job's store, joined by all ranks.
        key: of the appointment in the store.
        every: steps between two looks.
    """

    def __init__(self, store: dist.Store, key: str, every: int):
        self._store = store
        self._key = key
        self._sooner_key = f"{key}/sooner"  # a lower step, where steps are slow
        self._every = every
        self._step: int | None = None  # once it is known
        self._is_announced = False  # whether this rank has written it
        # On this rank's monotonic clock.
        self._looked_at = time.monotonic()
        self._seen_at = 0.0

    def is_due(self, step: int, asks: bool) -> bool:
        """Return True from the step on that was agreed.

        Args:
            step: the one that comes next, on this rank.
            asks: whether this rank wants the appointment.
        """
        if asks and not self._is_announced:
            # The next look may be over for a rank that is a step ahead; the one after it is not.
            at = (step // self._every + 2) * self._every
            # The first rank to write decides.
            self._store.compare_set(self._key, "", str(at))
            self._is_announced = True
        if self._step is None:
            self._look(step)
        else:
            self._look_for_sooner(step)
        return self._step is not None and step >= self._step

    def _look(self, step: int) -> None:
        """Look for the step, if it is time to."""
        now = time.monotonic()
        if step % self._every and now - self._looked_at < _LOOK_S and not self._is_announced:
            return
        self._looked_at = now
        # ``get`` alone would wait for the key.
        if self._store.check([self._key]):
            self._step = int(self._store.get(self._key))
            self._seen_at = now

    def _look_for_sooner(self, step: int) -> None:
        """Look for a lower step; write one if all ranks look before each step now."""
        assert self._step is not None
        sooner = step + _AHEAD
        if time.monotonic() - self._seen_at >= 2 * _LOOK_S and sooner < self._step:
            self._store.compare_set(self._sooner_key, "", str(sooner))
        if self._store.check([self._sooner_key]):
            self._step = min(self._step, int(self._store.get(self._sooner_key)))


class StopTogether:
    """Stops all ranks before the same step, on SIGINT, SIGTERM or SIGUSR1 that one of them got.

    A second signal ends the process at once.

    Args:
        store: the job's store, joined by all ranks.
        every: steps between two looks.
    """

    def __init__(self, store: dist.Store, every: int):
        self._appointment = Appointment(store, _STOP, every)
        # That this rank got. The handler interrupts this thread anywhere, perhaps between two calls
        # of the store: it only sets this number, and the store is written to before the next step.
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def __call__(self, step: int) -> bool:
        """Return True if the job stops before this step."""
        return self._appointment.is_due(step, bool(self.signal))

    def over(self) -> None:
        """Ignore a batch system's warning from now on: nothing is left to stop.

        Without this, these signals would end the process in its last moments.
        """
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.signal = number
        # The next one ends the process, as without this class. Not SIGUSR1: a batch system may send
        # its warning more than once, and a checkpoint is due.
        for second in (signal.SIGINT, signal.SIGTERM):
            signal.signal(second, signal.SIG_DFL)


class SaveTogether:
    """Lets all ranks save after the same step, and go on, as often as somebody asks for it.

    The supervisor asks with a file in the run directory, so that it works under every launcher. A
    worker that gets SIGUSR2 asks, too.

    Args:
        store: the job's store, joined by all ranks.
        every: steps between two looks.
        files: of the run.
        rank: rank 0 looks for the file.
    """

    def __init__(self, store: dist.Store, every: int, files: RunDir, rank: int):
        self._store = store
        self._every = every
        self._request = files.save_request if rank == 0 else None
        self._looked_at = time.monotonic()
        self._count = 0  # of saves so far
        self._appointment = Appointment(store, f"{_SAVE}/0", every)
        self.is_asked = False  # set by the handler as well, and cleared by ``__call__``
        signal.signal(signal.SIGUSR2, self._on_signal)

    def __call__(self, step: int) -> bool:
        """Return True if all ranks save now, after ``step`` steps."""
        self._look_for_request()
        if not self._appointment.is_due(step, self.is_asked):
            return False
        self.is_asked = False
        self._count += 1
        self._appointment = Appointment(self._store, f"{_SAVE}/{self._count}", self._every)
        return True

    def _look_for_request(self) -> None:
        now = time.monotonic()
        if self._request is None or now - self._looked_at < _LOOK_S:
            return
        self._looked_at = now
        if self._request.exists():
            self._request.unlink(missing_ok=True)
            self.is_asked = True

    def _on_signal(self, number: int, frame: Any) -> None:
        self.is_asked = True
