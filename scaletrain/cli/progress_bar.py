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
)

from scaletrain.run.layout import RunDir
from scaletrain.run.records import NewRecords
from scaletrain.run.time_left import TimeLeft
from scaletrain.units import duration

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
    files = RunDir(run_dir)
    arguments = (files, _version(files.header(0)), over)
    follower = threading.Thread(target=_follow, args=arguments, daemon=True)
    follower.start()
    try:
        yield
    finally:
        over.set()
        # Waits for the last drawing, so that no line of output is mixed with it.
        follower.join()


def _follow(files: RunDir, before: tuple[int, int] | None, over: threading.Event) -> None:
    """Draw the bar until ``over`` is set, and once more after that.

    Args:
        files: of the run.
        before: the version of rank 0's header before the job was started.
        over: set once the job has ended.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} samples/s"),
        TextColumn("{task.fields[left]} left", style="progress.remaining"),
    )
    header: dict[str, Any] = {}
    records = NewRecords(files.records(0))
    time_left: TimeLeft | None = None
    # On standard error, since the lines of rank 0 go to standard output.
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task: TaskID | None = None
        is_last = False
        while not is_last:
            # The look after the event still counts: the last records may have come just before it.
            is_last = over.wait(_REFRESH_S)
            if time_left is None:
                # A run that goes on has records and a header of the part before. When its worker
                # writes the header anew, it has cut the records, and begins its first step.
                if _version(files.header(0)) == before:
                    continue
                header = json.loads(files.header(0).read_text(encoding="utf-8"))
                time_left = TimeLeft.of_header(header)
                records.skip()
            # Between two looks a fast job writes many records. A slow one keeps its bar as it is.
            new = records.read()
            if not new:
                continue
            for record in new:
                time_left.add(record)
            recent = new[-_RECENT:]
            seconds = sum(record.step_s for record in recent)
            rate = header["global_batch"] * len(recent) / seconds
            # With the first record: before it there is no loss and no rate to show.
            if task is None:
                task = bar.add_task(
                    "training", total=header["num_steps"], loss=0.0, rate=0.0, left=""
                )
            newest = recent[-1]
            loss = math.nan if newest.loss is None else newest.loss
            left = duration(time_left.seconds() or 0.0)
            bar.update(task, completed=newest.step + 1, loss=loss, rate=rate, left=left)


def _version(path: Path) -> tuple[int, int] | None:
    """Return a mark that changes once a file is replaced; None if it is not there."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns
