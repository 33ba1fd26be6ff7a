"""Records: the facts that every rank writes down about each of its steps.

A records file (``RunDir.records``) holds one JSON object a line. Each rank writes its own file, so
measuring never communicates.
"""

import contextlib
import dataclasses
import json
import operator
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from scaletrain.errors import TrainingError
from scaletrain.run.atomic import write_text
from scaletrain.run.layout import RunDir

# Left out of every figure of speed: DDP rebuilds its buckets after the first step, and caches and
# connections warm up.
WARMUP_STEPS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step of one rank.

    Durations are seconds; a part that the step does not have is 0. ``input_s``, ``forward_s``,
    ``backward_s`` and ``update_s`` add up to ``step_s``, but for some bookkeeping.

    Communication that overlaps backward is inside ``backward_s``. Its price to a step (exposed
    communication) is the difference to a run with the exchange ``none``.
    """

    step: int  # optimizer steps done before this one
    rank: int
    time: float  # unix time at which the step began
    loss: float | None  # mean over what this rank processed; None: it is not finite
    samples: int  # processed by this rank in this step
    lr: float
    step_s: float
    input_s: float  # waiting for the batch
    forward_s: float
    backward_s: float  # including the exchange where it overlaps
    update_s: float  # the optimizer, or waiting for the server's weights
    # The exchange's own numbers, such as bytes or staleness.
    exchange: dict[str, float] = dataclasses.field(default_factory=dict)
    count: float = 0.0  # what the loss is a mean over: samples, tokens, ...
    parts: dict[str, float] = dataclasses.field(default_factory=dict)  # means over the same count
    skipped: bool = False  # the weights stayed: a gradient was not finite
    loss_scale: float | None = None  # for the next step; None unless precision is fp16
    # A line for each sample that could not be read, and was left out.
    bad_samples: list[str] = dataclasses.field(default_factory=list)
    gc_s: float = 0.0  # in Python's garbage collector, inside whichever part
    # The training thread could run, and had no core. None: the kernel does not tell.
    stolen_s: float | None = None
    # Both of these together, by part: input, forward, backward, update.
    taken_s: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def wait_s(self) -> float:
        """Waiting for counts, gradients or weights, as far as it is measured."""
        return sum(self.exchange.get(key, 0.0) for key in _WAITS.values())

    def own_s(self) -> dict[str, float]:
        """Return the seconds of each part without those waits: what this rank itself took."""
        return {
            "input": self.input_s,
            "forward": max(0.0, self.forward_s - self.exchange.get(_WAITS["forward"], 0.0)),
            "backward": max(0.0, self.backward_s - self.exchange.get(_WAITS["backward"], 0.0)),
            "optimizer": max(0.0, self.update_s - self.exchange.get(_WAITS["optimizer"], 0.0)),
        }

    def work_s(self) -> dict[str, float]:
        """Return ``own_s`` without what the collector and other processes took of each part."""
        work = self.own_s()
        for part, taken_s in self.taken_s.items():
            name = "optimizer" if part == "update" else part
            work[name] = max(0.0, work[name] - taken_s)
        return work


# Keys of ``StepRecord.exchange``: waiting for other ranks or servers, inside each part.
_WAITS = {
    "forward": "wait_in_forward_s",
    "backward": "wait_in_backward_s",
    "optimizer": "wait_s",
}
_FIELDS = tuple(field.name for field in dataclasses.fields(StepRecord))
_values = operator.attrgetter(*_FIELDS)


class RecordWriter:
    """Appends the records of one rank to its file.

    Lines are written whole: a worker that is killed leaves at most one cut line.

    Args:
        run_dir: the run's directory.
        rank: of the worker.
        append: keep the records that are there, as a resumed run does.
    """

    def __init__(self, run_dir: Path, rank: int, *, append: bool = False):
        path = RunDir(run_dir).records(rank)
        # Line-buffered: readers follow the file while the worker trains.
        self._file: TextIO = open(  # noqa: SIM115 (lives as long as the writer)
            path, "a" if append else "w", encoding="utf-8", buffering=1
        )

    def write(self, record: StepRecord) -> None:
        """Append one record.

        Raises:
            TrainingError: there is no room for it, and so for no checkpoint.
        """
        # ``dataclasses.asdict`` would copy every value deeply, which takes longer than writing.
        value = dict(zip(_FIELDS, _values(record), strict=True))
        try:
            self._file.write(json.dumps(value) + "\n")
        except OSError as error:
            raise TrainingError(f"{self._file.name}: {error.strerror}") from error

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def cut_lines(path: Path, is_kept: Callable[[dict[str, Any]], bool]) -> None:
    """Drop lines of a file that holds one JSON object a line, as a run does that goes on.

    A line that was cut by a kill is dropped, too. A file that does not exist stays so.

    Args:
        path: of the file; replaced atomically.
        is_kept: returns False for an object that will be written again.
    """
    if not path.exists():
        return
    kept = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n") and is_kept(json.loads(line)):
                kept.append(line)
    write_text(path, "".join(kept))


def read_records(path: Path) -> Iterator[StepRecord]:
    """Yield the records of one rank.

    A last line that was cut is left out, and so are keys that a later version wrote.
    """
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):  # else cut: the worker was killed
                yield _record(line)


def _record(line: str) -> StepRecord:
    value = json.loads(line)
    return StepRecord(**{key: value[key] for key in _FIELDS if key in value})


class NewRecords:
    """The records that are added to a file while a run writes it.

    Args:
        path: of the file, which may not be there yet.
    """

    def __init__(self, path: Path):
        self._path = path
        self._offset = 0  # of the first byte not seen

    def skip(self) -> None:
        """Leave out the records that are there."""
        with contextlib.suppress(FileNotFoundError):
            self._offset = self._path.stat().st_size

    def read(self) -> list[StepRecord]:
        """Return the records that were added since the last look."""
        try:
            with open(self._path, "rb") as file:
                file.seek(self._offset)
                # The worker may be in the middle of a line: that one is read at the next look.
                lines = [line for line in file if line.endswith(b"\n")]
        except FileNotFoundError:
            return []
        self._offset += sum(len(line) for line in lines)
        return [_record(line.decode()) for line in lines]


def last_records(path: Path, num_bytes: int = 32_768) -> list[StepRecord]:
    """Return the records at the end of a file, without reading the whole.

    Args:
        path: of the file.
        num_bytes: read at most so many. The record in which they begin is left out.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        begin = max(0, file.seek(0, os.SEEK_END) - num_bytes)
        file.seek(begin)
        lines = file.read().splitlines(keepends=True)
    if begin:
        del lines[0]  # cut, or taken for it
    return [_record(line.decode()) for line in lines if line.endswith(b"\n")]
