"""Writes checkpoints in a thread: a step pays for a copy in memory, not for the disk."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from scaletrain.config.schema import Checkpoint
from scaletrain.errors import UserError
from scaletrain.run.layout import RunDir
from scaletrain.training import checkpoint
from scaletrain.training.checkpoint import State
from scaletrain.training.tensor_file import Content

_ALIVE_S = 1.0  # between signs of life


class CheckpointWriter:
    """The checkpoints of one run, written one after the other. Rank 0 has it.

    All methods are called from one thread. Only this thread gives signs of life, and only while it
    waits: from another thread they would hide that training hangs.

    Partial files that earlier processes left are removed at the start.

    Args:
        run_dir: where checkpoints go.
        settings: which checkpoints stay.
        alive: called about once a second while a method waits, with the reason in words.
    """

    def __init__(self, run_dir: Path, settings: Checkpoint, alive: Callable[[str], None]):
        self._run_dir = run_dir
        self._settings = settings
        self._alive = alive
        self._buffers: dict[str, Tensor] = {}  # copies; the thread reads them until it has ended
        # A best checkpoint that comes while another one is being written.
        self._waiting: Content | None = None
        # Started by ``save``. It is no daemon: the interpreter waits for it at its exit.
        self._thread: threading.Thread | None = None
        # Set by the thread, read when it has ended, and then cleared.
        self._error: Exception | None = None
        for partial in RunDir(run_dir).partial_checkpoints():
            partial.unlink(missing_ok=True)

    def save(self, step: int, state: State) -> None:
        """Copy the state after ``step`` steps, and write it while the caller goes on.

        Waits for the checkpoint before.

        Args:
            step: steps done.
            state: may change afterwards.

        Raises:
            UserError: weights are not finite, an entry cannot be saved, or the checkpoint before
                could not be written. Those that are there stay.
        """
        self.wait()
        self._alive("copying a checkpoint")
        self._start(checkpoint.snapshot(self._run_dir, step, state, self._buffers))

    def save_best(self, step: int, state: State, figure: dict[str, Any]) -> None:
        """Copy the state with the best figure so far, and write it when the disk is free.

        Does not wait: by the time that the disk is free, the state would have changed. If two
        states wait for the disk, only the later one is written, since it is better.

        Args:
            step: steps done.
            state: may change afterwards.
            figure: JSON about it, which the checkpoint holds as ``best``.

        Raises:
            UserError: as ``save``.
        """
        is_writing = self.is_writing()
        self._alive("copying a checkpoint")
        # The thread reads the buffers now.
        buffers = {} if is_writing else self._buffers
        content = checkpoint.snapshot(self._run_dir, step, state, buffers)
        content.state["best"] = figure
        if is_writing:
            self._waiting = content
        else:
            self._start(content)

    def _start(self, content: Content) -> None:
        self._thread = threading.Thread(
            target=self._write, args=(content,), name="checkpoint writer"
        )
        self._thread.start()

    def wait(self) -> None:
        """Wait until the last checkpoint is durable.

        Raises:
            UserError: it could not be written.
        """
        while self.is_writing(_ALIVE_S):
            pass

    def is_writing(self, patience_s: float = 0.0) -> bool:
        """Wait at most ``patience_s`` seconds; return True if a checkpoint is being written then.

        Raises:
            UserError: it could not be written.
        """
        if self._thread:
            if patience_s:
                self._alive("writing a checkpoint")
            self._thread.join(patience_s)
            if self._thread.is_alive():
                return True
            self._thread = None
        error, self._error = self._error, None
        if isinstance(error, OSError):
            raise UserError(
                f"{error.filename}: the checkpoint cannot be written: {error.strerror}"
                f"{self._still_there()}"
            ) from None
        if error:
            raise error
        if self._waiting:
            self._start(self._waiting)
            self._waiting = None
            return True
        return False

    def _write(self, content: Content) -> None:
        """Write a checkpoint, and delete those that it replaces, in the thread."""
        files = RunDir(self._run_dir)
        step = content.state["step"]
        try:
            if "best" in content.state:
                checkpoint.write(files.best_checkpoint(step), content)
                for old_step, old in files.best_checkpoints():
                    if old_step != step:
                        old.unlink(missing_ok=True)
            else:
                checkpoint.write(files.checkpoint(step), content)
                keep, keep_every = self._settings.keep, self._settings.keep_every
                checkpoint.delete_older(self._run_dir, step, keep, keep_every)
        except Exception as error:
            self._error = error

    def _still_there(self) -> str:
        checkpoints = RunDir(self._run_dir).checkpoints()
        if not checkpoints:
            return ""
        step, _ = checkpoints[-1]
        return f" (the one after step {step} is whole: mend the disk, then --resume)"
