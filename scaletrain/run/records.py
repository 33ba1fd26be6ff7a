"""Records: what every rank writes while it trains. One JSON object a line, one file a rank; measuring never communicates."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

# Left out of every figure of speed: DDP rebuilds its buckets after the first step, and caches and
# connections warm up.
WARMUP_STEPS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class StepRecord:
    """One optimizer step of one rank. Durations are seconds; parts that a step does not have are 0.

    ``input_s + forward_s + backward_s + update_s`` is ``step_s`` up to bookkeeping. Communication that overlaps backward is inside
    ``backward_s``; what a training step pays for it (exposed communication) is the difference to a run with the exchange ``none``.
    """

    step: int  # optimizer steps done before this one
    rank: int
    time: float  # unix time at which the step began
    loss: float  # mean over the samples this rank processed
    samples: int  # processed by this rank in this step
    lr: float
    step_s: float
    input_s: float  # waiting for the batch
    forward_s: float
    backward_s: float  # the exchange included, where it overlaps
    update_s: float  # optimizer, or waiting for the server's weights
    exchange: dict[str, float] = dataclasses.field(
        default_factory=dict
    )  # the exchange's own numbers (bytes, staleness, ...)


class RecordWriter:
    """Appends StepRecords to ``RUN_DIR/rank-<rank>.jsonl``. Lines are whole: a killed worker leaves at most one cut line."""

    def __init__(self, run_dir: Path, rank: int, *, append: bool = False):
        self._file: TextIO = open(  # noqa: SIM115 (lives as long as the writer)
            records_path(run_dir, rank), "a" if append else "w", encoding="utf-8", buffering=1
        )

    def write(self, record: StepRecord) -> None:
        self._file.write(json.dumps(dataclasses.asdict(record)) + "\n")

    def close(self) -> None:
        self._file.close()


def records_path(run_dir: Path, rank: int) -> Path:
    return run_dir / f"rank-{rank}.jsonl"


def read_records(path: Path) -> Iterator[StepRecord]:
    """The records of one rank. A last line that was cut (the worker was killed) is left out; keys of later versions are ignored."""
    known = {field.name for field in dataclasses.fields(StepRecord)}
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            if line.endswith("\n"):
                yield StepRecord(
                    **{key: value for key, value in json.loads(line).items() if key in known}
                )
