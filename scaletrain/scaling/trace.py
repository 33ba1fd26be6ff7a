"""A Chrome trace (chrome://tracing, Perfetto) of all ranks of a run on one clock."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaletrain.metrics import StepRecord, read_records

PARTS = ("input_s", "forward_s", "backward_s", "update_s")


def of_run(run_dir: Path) -> dict[str, Any]:
    """The trace of a run directory: a process a rank; its steps, their parts, and the exchange's own spans where it records them.

    Ranks stamp unix time. Where a rank's header (``rank-<r>.json``) has ``clock_offset_s``, by which its clock is ahead of rank 0's,
    it is taken off.
    """
    events: list[dict[str, Any]] = []
    paths = sorted(run_dir.glob("rank-*.jsonl"), key=lambda path: int(path.stem.partition("-")[2]))
    ranks = [(int(path.stem.partition("-")[2]), list(read_records(path))) for path in paths]
    offsets = {rank: _offset(run_dir, rank) for rank, _ in ranks}
    origin = min((records[0].time - offsets[rank] for rank, records in ranks if records), default=0.0)
    for rank, records in ranks:
        events.append({"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}})
        for record in records:
            events += _step(record, rank, record.time - offsets[rank] - origin)
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _offset(run_dir: Path, rank: int) -> float:
    try:
        return float(json.loads((run_dir / f"rank-{rank}.json").read_text(encoding="utf-8")).get("clock_offset_s", 0.0))
    except (OSError, ValueError):
        return 0.0


def _step(record: StepRecord, rank: int, began_s: float) -> Iterator[dict[str, Any]]:
    yield _span(
        f"step {record.step}",
        rank,
        0,
        began_s,
        record.step_s,
        {"loss": record.loss, "samples": record.samples, **record.exchange},
    )
    at = began_s
    for part in PARTS:
        seconds = getattr(record, part)
        if seconds > 0:
            yield _span(part.removesuffix("_s"), rank, 1, at, seconds, {})
        at += seconds


def _span(name: str, rank: int, row: int, began_s: float, seconds: float, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "X", "pid": rank, "tid": row, "ts": 1e6 * began_s, "dur": 1e6 * seconds, "args": args}
