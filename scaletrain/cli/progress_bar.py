"""The progress bar of ``scaletrain train``: it follows rank 0's records, under every launcher."""

import contextlib
import json
import math
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from scaletrain.run.layout import RunDir

_REFRESH_S = 0.2
_RECENT = 50  # records that the rate is taken from


@contextlib.contextmanager
def shown(run_dir: Path) -> Iterator[None]:
    """Draw loss, samples/s and the time left while the body runs.

    If standard error is not a terminal, draw nothing: rank 0 then prints lines.
    """
    if not sys.stderr.isatty():
        yield
        return
    # The workers inherit it: rank 0 leaves the steps to the bar.
    os.environ["SCALETRAIN_FOLLOWED"] = "1"
    # Set by this thread once the job has ended, and read by the follower.
    over = threading.Event()
    # A thread, because the main thread is busy with the job's output. It only reads files.
    follower = threading.Thread(target=_follow, args=(RunDir(run_dir), over), daemon=True)
    follower.start()
    try:
        yield
    finally:
        over.set()
        # Waits for the last drawing, so that no line of output is mixed with it.
        follower.join()


def _follow(files: RunDir, over: threading.Event) -> None:
    """Draw the bar until ``over`` is set, and once more after that."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} samples/s"),
        TimeRemainingColumn(),
    )
    header: dict[str, Any] = {}
    records = _NewRecords(files.records(0))
    # On standard error, since the lines of rank 0 go to standard output.
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task: TaskID | None = None
        is_last = False
        while not is_last:
            # The look after the event still counts: the last records may have come just before it.
            is_last = over.wait(_REFRESH_S)
            if not header and files.header(0).exists():
                header = json.loads(files.header(0).read_text(encoding="utf-8"))
            if not header:
                continue
            # Between two looks a fast job writes many records. A slow one keeps its bar as it is.
            recent = records.read()[-_RECENT:]
            if not recent:
                continue
            seconds = sum(record["step_s"] for record in recent)
            rate = header["global_batch"] * len(recent) / seconds
            # With the first record: before it there is no loss and no rate to show.
            if task is None:
                task = bar.add_task("training", total=header["num_steps"], loss=0.0, rate=0.0)
            newest = recent[-1]
            loss = math.nan if newest["loss"] is None else newest["loss"]
            bar.update(task, completed=newest["step"] + 1, loss=loss, rate=rate)


class _NewRecords:
    """The records that were added to a file since the last look."""

    def __init__(self, path: Path):
        self._path = path
        self._offset = 0  # of the first byte not seen

    def read(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        with open(self._path, encoding="utf-8") as file:
            file.seek(self._offset)
            # The worker may be in the middle of a line: that one is read whole at the next look.
            lines = [line for line in file.readlines() if line.endswith("\n")]
        # In bytes, as `seek` counts, not in characters.
        self._offset += sum(len(line.encode()) for line in lines)
        return [json.loads(line) for line in lines]
