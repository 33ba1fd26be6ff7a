"""Trackers: libraries that keep the figures of many runs, such as TensorBoard.

Each is a callback (``training/callbacks/``) that derives a ``TrackerRun`` from its library. The
parts that they share are here: rank 0 alone logs, a thread of its own waits for the library, and a
library that fails ends the tracking and never the training.
"""

import abc
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from scaletrain.config import RunConfig
from scaletrain.needs import Needs
from scaletrain.run import progress
from scaletrain.run.atomic import write_text
from scaletrain.run.layout import RunDir
from scaletrain.run.records import StepRecord
from scaletrain.training.callbacks import Callback

if TYPE_CHECKING:
    from scaletrain.training.trainer import Trainer

_MOST_WAITING = 1000  # calls that the library has not taken yet
_PATIENCE_S = 30.0  # for the library to take the last figures
_PATIENCE_AFTER_ERROR_S = 1.0


@dataclass(frozen=True)
class Place:
    """Where a tracker's figures belong."""

    name: str  # of the tracker
    config: RunConfig
    run_dir: Path
    first_step: int  # steps done when this part of the run began

    @property
    def folder(self) -> Path:
        """The tracker's own folder in the run directory; made if it is missing."""
        folder = RunDir(self.run_dir).tracker(self.name)
        folder.mkdir(exist_ok=True)
        return folder

    def identifier(self, make: Callable[[], str]) -> tuple[str, bool]:
        """Return the run's identifier in the tracker, and whether it is new.

        Args:
            make: makes one, which a resumed run finds again.
        """
        path = RunDir(self.run_dir).tracker_id(self.name)
        if path.exists():
            return path.read_text(encoding="utf-8").strip(), False
        identifier = make()
        write_text(path, f"{identifier}\n")
        return identifier, True


class TrackerRun(abc.ABC):
    """One run in a tracker. Any exception of a method ends the tracking.

    It is made and called on one thread, which may wait for a server.
    """

    @abc.abstractmethod
    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Keep figures. Steps rise, and one may come twice with different names."""

    @abc.abstractmethod
    def end(self, summary: Mapping[str, Any] | None) -> None:
        """Finish the run.

        Args:
            summary: as for ``Callback.close``.
        """


class Tracker(Callback):
    """Hands figures to a tracker every few steps, and after each evaluation.

    The loss is the mean over the steps since the last time. It is over all ranks if they are at the
    same step; otherwise it is rank 0's, and its name says so.

    Args:
        trainer: of this worker.
        name: of the tracker.
        start: opens the run in the tracker.
        needs: the package that must be there.
        every: steps between figures.
    """

    def __init__(
        self,
        trainer: "Trainer",
        name: str,
        start: Callable[[Place], TrackerRun],
        needs: Needs,
        every: int,
    ):
        self._exchange = trainer.exchange
        self._every = every
        self._interval = _Interval()
        self._writer: _Writer | None = None
        if trainer.world.rank != 0:
            return
        needs.check_installed(f"callbacks: {name}")
        config = trainer.config
        place = Place(name, config, trainer.run_dir, trainer.next_step)
        self._writer = _Writer(name, lambda: start(place))

    def after_step(self, record: StepRecord) -> None:
        """Log, if it is time to (collective where all ranks are at the same step)."""
        interval = self._interval
        interval.add(record)
        if (record.step + 1) % self._every:
            return
        self._interval = _Interval()
        name = "loss_rank_0"
        total, count = interval.loss_total, interval.loss_count
        if self._exchange.averages:
            name = "loss"
            own = torch.tensor([total, count], dtype=torch.float64)
            total, count = self._exchange.sum(own).tolist()
        if self._writer is None:
            return
        figures = {"lr": record.lr}
        if count:
            figures[name] = total / count
        if interval.seconds:
            rate = interval.samples / interval.seconds
            figures["samples_per_s"] = rate * self._exchange.live_workers()
        for part, mean in record.parts.items():
            figures[f"{part}_rank_0"] = mean
        self._writer.log(record.step + 1, figures)

    def after_evaluation(self, step: int, figures: Mapping[str, float | None]) -> None:
        """Log the figures that are known."""
        if self._writer:
            known = {name: value for name, value in figures.items() if value is not None}
            self._writer.log(step, known)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """End the run in the tracker (collective, unless an error has ended the training).

        All ranks wait together, and meet once a second, so that no time-out takes a slow tracker
        for a hang.
        """
        if self._writer:
            self._writer.end(summary)
        deadline = time.monotonic() + _PATIENCE_S
        while summary is not None:
            is_waiting = False
            if self._writer and time.monotonic() < deadline:
                is_waiting = self._writer.is_busy(patience_s=1.0)
            progress.alive("waiting for a tracker")
            if not self._exchange.sum(torch.tensor([float(is_waiting)])).item():
                break
        if self._writer:
            self._writer.give_up(_PATIENCE_AFTER_ERROR_S if summary is None else 0.0)


class _Interval:
    """This rank's steps since figures were last logged."""

    def __init__(self) -> None:
        self.loss_total = 0.0
        self.loss_count = 0.0
        self.samples = 0
        self.seconds = 0.0

    def add(self, record: StepRecord) -> None:
        self.samples += record.samples
        self.seconds += record.step_s
        if record.loss is not None:
            self.loss_total += record.loss * record.count
            self.loss_count += record.count


class _Writer:
    """Calls a tracker on a thread of its own, so that no server holds up a step.

    The thread begins with the first figures. A program that ends does not wait for it.
    """

    def __init__(self, name: str, start: Callable[[], TrackerRun]):
        self._name = name
        self._start = start
        # The training thread puts calls, the writer's thread takes them; None ends it.
        self._calls: queue.Queue[Callable[[TrackerRun], None] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._has_failed = False  # the writer's thread sets it, the training thread reads it
        self._has_lost_some = False  # of the training thread

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._put(lambda run: run.log(step, figures))

    def end(self, summary: Mapping[str, Any] | None) -> None:
        """Let the tracker end its run once it has everything, if there is anything."""
        if self._thread.ident:
            self._put(lambda run: run.end(summary))
            self._put(None)

    def is_busy(self, patience_s: float) -> bool:
        """Return True if the tracker has not taken everything yet, after waiting for it."""
        if self._thread.ident:
            self._thread.join(patience_s)
        return self._thread.is_alive()

    def give_up(self, patience_s: float) -> None:
        """Wait no longer than this, and say so if the tracker has not taken everything."""
        if self.is_busy(patience_s):
            self._say("did not take the last figures in time")

    def _put(self, call: Callable[[TrackerRun], None] | None) -> None:
        if not self._thread.ident:
            self._thread.start()
        if self._has_failed:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            if not self._has_lost_some:
                self._say("is too slow: some figures are left out")
            self._has_lost_some = True

    def _work(self) -> None:
        try:
            run = self._start()
            while (call := self._calls.get()) is not None:
                call(run)
        # Libraries raise exceptions of any kind, and some end the program.
        except (Exception, SystemExit) as error:
            self._has_failed = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self._say(f"has failed, and the run goes on without it: {reason}")

    def _say(self, what: str) -> None:
        print(f"callbacks: {self._name} {what}", file=sys.stderr, flush=True)
