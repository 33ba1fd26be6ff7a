"""How long a run still takes, from the records of one rank.

A run is steps, and pauses between them: evaluations and checkpoints. Each is counted for itself, so
the estimate is right before most evaluations have been seen, and does not jump at each of them.
"""

import math
from collections import deque
from typing import Any

from scaletrain.run.records import WARMUP_STEPS, StepRecord

# Steps that the time of a step is taken from: enough to even out loaders and caches, few enough to
# follow a machine that gets slower.
_RECENT = 1000


class TimeLeft:
    """Estimates how long a run still takes. It is given each record of one rank, in their order.

    Args:
        num_steps: of the run. After the last one comes an evaluation in any case.
        evaluate_every: steps between evaluations; None: only after the last step.
        save_every: steps between checkpoints; None: only after the last step.
        test_samples: of one rank, in an evaluation. Before the first evaluation they take as long
            as forward takes for as many training samples.
    """

    def __init__(
        self, num_steps: int, evaluate_every: int | None, save_every: int | None, test_samples: int
    ):
        self._num_steps = num_steps
        self._evaluate_every = evaluate_every
        self._save_every = save_every
        self._test_samples = test_samples
        self._last: StepRecord | None = None
        self._num_records = 0
        # Of recent steps: how far each went (a rank may leave steps out), and its seconds.
        self._steps: deque[tuple[int, float]] = deque(maxlen=_RECENT)
        # Seconds of forward for one training sample.
        self._forward_s: deque[float] = deque(maxlen=_RECENT)
        # Seconds of the pauses seen so far, by (evaluates, saves).
        self._pauses: dict[tuple[bool, bool], deque[float]] = {}

    @classmethod
    def of_header(cls, header: dict[str, Any]) -> "TimeLeft":
        """Return the estimate for a run, by the header of one of its workers."""
        return cls(
            header["num_steps"],
            header.get("evaluate_every"),
            header.get("save_every"),
            header.get("test_samples", 0),
        )

    def add(self, record: StepRecord) -> None:
        """Take a step into account."""
        last, self._last = self._last, record
        self._num_records += 1
        if self._num_records == WARMUP_STEPS + 1:
            self._steps.clear()  # of the warm-up: a short run has no others
            self._forward_s.clear()
        seconds, num_steps = record.step_s, 1
        if last is not None:
            # A clock may have been put back.
            pause_s = max(0.0, record.time - last.time - last.step_s)
            num_steps = max(1, record.step - last.step)
            kind = self._pause_after(last.step + 1)
            if kind == (False, False) or num_steps > 1:
                seconds += pause_s
            else:
                self._pauses.setdefault(kind, deque(maxlen=_RECENT)).append(pause_s)
        self._steps.append((num_steps, seconds))
        if record.samples:
            self._forward_s.append(record.forward_s / record.samples)

    def seconds(self) -> float | None:
        """Return the seconds left after the last record; None before the first one."""
        if self._last is None:
            return None
        done = self._last.step + 1
        num_steps = sum(number for number, _ in self._steps)
        step_s = sum(seconds for _, seconds in self._steps) / num_steps
        left_s = (self._num_steps - done) * step_s
        # The pause after the last record's step, if there is one, has not been seen.
        both = self._num_pauses(done, _common(self._evaluate_every, self._save_every))
        evaluations = self._num_pauses(done, self._evaluate_every) - both
        saves = self._num_pauses(done, self._save_every) - both
        left_s += evaluations * self._pause_s(True, False)
        left_s += saves * self._pause_s(False, True)
        # One more: the last step is evaluated and saved.
        return left_s + (both + 1) * self._pause_s(True, True)

    def _pause_after(self, done: int) -> tuple[bool, bool]:
        """Return whether an evaluation, and whether a checkpoint, comes after so many steps."""
        evaluates = self._evaluate_every is not None and done % self._evaluate_every == 0
        saves = self._save_every is not None and done % self._save_every == 0
        return evaluates, saves

    def _num_pauses(self, done: int, every: int | None) -> int:
        """Return how many pauses come from here on, before the last step is done."""
        if every is None:
            return 0
        return max(0, (self._num_steps - 1) // every - (done - 1) // every)

    def _pause_s(self, evaluates: bool, saves: bool) -> float:
        """Return the seconds of a pause: the mean of those seen, else a guess."""
        seen = self._pauses.get((evaluates, saves))
        if seen:
            return sum(seen) / len(seen)
        if evaluates and saves:
            return self._pause_s(True, False) + self._pause_s(False, True)
        if not evaluates:
            return 0.0  # a checkpoint is written while training goes on
        with_save = self._pauses.get((True, True))
        if with_save:
            return sum(with_save) / len(with_save)
        if not self._forward_s:
            return 0.0
        return self._test_samples * sum(self._forward_s) / len(self._forward_s)


def _common(evaluate_every: int | None, save_every: int | None) -> int | None:
    """Return the steps between pauses in which both are done; None: there are none."""
    if evaluate_every is None or save_every is None:
        return None
    return math.lcm(evaluate_every, save_every)
