"""Profiles some steps with torch.profiler: a Chrome trace of each rank, with buckets and rounds."""

import gzip
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
from annotated_types import Ge
from torch.profiler import ProfilerActivity

from scaletrain.run import progress, spans
from scaletrain.run.atomic import replacing
from scaletrain.run.layout import RunDir
from scaletrain.run.records import StepRecord
from scaletrain.training.callbacks import Callback
from scaletrain.training.ddp import AllreduceExchange

if TYPE_CHECKING:
    from scaletrain.training.trainer import Trainer

_ROWS = "scaletrain"  # of the steps and spans in the trace


class Profile(Callback):
    """Profiles from one step to another, and writes the trace when they are done."""

    def __init__(self, trainer: "Trainer", wait: int, steps: int):
        if isinstance(trainer.exchange, AllreduceExchange):
            trainer.exchange.trace_buckets()
        self._path = RunDir(trainer.run_dir).profile(trainer.world.rank)
        self._is_rank_0 = trainer.world.rank == 0
        self._first = trainer.next_step + wait
        self._last = self._first + steps - 1
        self._activities = [ProfilerActivity.CPU]
        if trainer.device.type == "cuda":
            self._activities.append(ProfilerActivity.CUDA)
        self._profiler: torch.profiler.profile | None = None  # in the window
        self._is_done = False
        self._records: list[StepRecord] = []
        self._spans: list[dict[str, Any]] = []  # engines' threads add to it

    def after_step(self, record: StepRecord) -> None:
        """Begin before the first step of the window; end after the last one."""
        if self._profiler is not None:
            self._records.append(record)
            if record.step >= self._last:
                self._end()
        elif not self._is_done and record.step + 1 >= self._first:
            self._profiler = torch.profiler.profile(activities=self._activities)
            self._profiler.start()
            spans.collect(self._spans)

    def close(self, summary: Mapping[str, Any] | None) -> None:
        """Write the steps so far of a window that the run's end cuts short."""
        if self._profiler is not None and summary is not None:
            self._end()
        elif not self._is_done and self._is_rank_0:
            self._say(f"the run ended before step {self._first}, so there is no profile")

    def _end(self) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        spans.stop_collecting()
        progress.alive("writing a profile")
        try:
            self._write(self._profiler)
            steps = f"steps {self._records[0].step} to {self._records[-1].step}"
            if self._is_rank_0:
                self._say(f"{steps}: {self._path} (chrome://tracing or ui.perfetto.dev shows it)")
        # A profile is not worth a run. The profiler raises a RuntimeError if the disk is full.
        except (OSError, RuntimeError) as error:
            self._say(f"{self._path} cannot be written: {error}")
        self._profiler = None
        self._is_done = True

    def _write(self, profiler: torch.profiler.profile) -> None:
        """Write torch's trace, with this project's rows added."""
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder, "trace.json")
            profiler.export_chrome_trace(str(file))
            trace = json.loads(file.read_text(encoding="utf-8"))
        origin_s = trace.get("baseTimeNanoseconds", 0) / 1e9
        for record in self._records:
            facts = {"loss": record.loss, "samples": record.samples}
            event = _event("step", f"step {record.step}", record.time, record.step_s, facts)
            trace["traceEvents"].append(event)
        for span in self._spans:
            row = span["kind"]
            if "segment" in span:  # its parts are under way side by side
                row += f" of segment {span['segment']}"
            elif row == "bucket":
                row = span["name"]
            trace["traceEvents"].append(_event(row, span["name"], span["began"], span["s"], span))
        for event in trace["traceEvents"]:
            if event.get("pid") == _ROWS:
                event["ts"] -= origin_s * 1e6
        with replacing(self._path) as partial, gzip.open(partial, "wt", encoding="utf-8") as out:
            json.dump(trace, out)

    def _say(self, what: str) -> None:
        print(f"callbacks: profile: {what}", file=sys.stderr, flush=True)


def _event(row: str, name: str, began_s: float, s: float, facts: dict[str, Any]) -> dict[str, Any]:
    """Return an event of Chrome's trace format; times are in microseconds."""
    return {
        "ph": "X",
        "cat": _ROWS,
        "pid": _ROWS,
        "tid": row,
        "name": name,
        "ts": began_s * 1e6,
        "dur": s * 1e6,
        "args": facts,
    }


def callback(
    trainer: "Trainer", *, wait: Annotated[int, Ge(1)] = 10, steps: Annotated[int, Ge(1)] = 5
) -> Callback:
    """Return the callback.

    Args:
        wait: steps before the first that is profiled.
        steps: to profile.
    """
    return Profile(trainer, wait, steps)
