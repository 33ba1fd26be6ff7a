"""The progress bar of ``scaletrain train`` on a terminal: it follows rank 0's records, so it works under every launcher."""

import contextlib
import json
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

from scaletrain.run.records import records_path


@contextlib.contextmanager
def shown(run_dir: Path) -> Iterator[None]:
    """While the body runs, draw loss, samples/s and the time left. When output is piped, draw nothing: rank 0 prints lines instead."""
    if not sys.stderr.isatty():
        yield
        return
    os.environ["SCALETRAIN_FOLLOWED"] = (
        "1"  # inherited by the workers: rank 0 leaves the steps to the bar
    )
    over = threading.Event()
    follower = threading.Thread(target=_follow, args=(run_dir, over), daemon=True)
    follower.start()
    try:
        yield
    finally:
        over.set()
        follower.join()


def _follow(run_dir: Path, over: threading.Event) -> None:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[rate]:,.0f} samples/s"),
        TimeRemainingColumn(),
    )
    header: dict[str, Any] = {}
    unread = 0  # offset of the first record not seen
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task: TaskID | None = None
        last = False
        while not last:
            last = over.wait(0.2)
            if not header and (run_dir / "rank-0.json").exists():
                header = json.loads((run_dir / "rank-0.json").read_text(encoding="utf-8"))
            path = records_path(run_dir, 0)
            if not header or not path.exists():
                continue
            with open(path, encoding="utf-8") as file:
                file.seek(unread)
                lines = [line for line in file.readlines() if line.endswith("\n")]
            unread += sum(len(line.encode()) for line in lines)
            if lines:
                recent = [json.loads(line) for line in lines[-50:]]
                rate = (
                    header["global_batch"]
                    * len(recent)
                    / sum(record["step_s"] for record in recent)
                )
                shown = {
                    "completed": recent[-1]["step"] + 1,
                    "loss": recent[-1]["loss"],
                    "rate": rate,
                }
                if task is None:
                    task = bar.add_task("training", total=header["num_steps"], loss=0.0, rate=0.0)
                bar.update(task, **shown)
