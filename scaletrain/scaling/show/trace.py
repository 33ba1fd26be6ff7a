"""A Chrome trace (chrome://tracing, Perfetto) of all ranks of a run on one clock.

It shows steps and their parts and, if the run recorded them, buckets, rounds and waits.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from scaletrain.run.atomic import write_json
from scaletrain.run.layout import RunDir
from scaletrain.run.records import StepRecord, read_records
from scaletrain.scaling.model import PARTS, Scalar, Span, Trace, TraceRow, WorkerFacts

KINDS = ("bucket", "round", "wait")  # of recorded spans, in the order in which they are shown


def write(run_dir: Path, path: Path) -> None:
    """Write the trace of a run directory."""
    write_json(path, of_run(run_dir).to_json())


def of_run(run_dir: Path) -> Trace:
    """Return the trace of a run directory.

    Each rank has rows of its own: steps, their parts, and the spans that ``trace: true`` recorded.
    Ranks stamp unix time. The offset of a rank's clock from rank 0's is taken off, if the rank's
    header knows it. Time 0 is the beginning of the first step.
    """
    files = RunDir(run_dir)
    ranks = {}
    for path in files.all_records():
        rank = int(path.stem.removeprefix("rank-"))
        ranks[rank] = list(read_records(path))
    offsets = {rank: _clock_offset_s(files.header(rank)) for rank in ranks}
    begins = [records[0].time - offsets[rank] for rank, records in ranks.items() if records]
    origin = min(begins, default=0.0)
    rows: list[TraceRow] = []
    for rank, records in ranks.items():
        # The origin by the rank's own clock, which stamps its records and spans.
        rows += _rows(rank, records, files.spans(rank), origin=origin + offsets[rank])
    return Trace(tuple(rows))


def _clock_offset_s(header: Path) -> float:
    """Return the seconds by which a rank's clock is ahead of rank 0's; 0 if not known."""
    try:
        return WorkerFacts.from_json(json.loads(header.read_text(encoding="utf-8"))).clock_offset_s
    except (OSError, ValueError):
        return 0.0


def _rows(rank: int, records: list[StepRecord], recorded: Path, origin: float) -> list[TraceRow]:
    """Return the rows of one rank. ``origin``: time 0 of the trace, by the rank's clock."""
    steps: list[Span] = []
    parts: list[Span] = []
    weights: list[Span] = []
    for record in records:
        began_s = record.time - origin
        steps.append(Span(f"step {record.step}", began_s, record.step_s, _facts(record)))
        parts += _parts(record, began_s)
        if "wait_s" in record.exchange:
            # A parameter server's worker waits for weights last in its step.
            wait_s = record.exchange["wait_s"]
            ended_s = began_s + record.step_s
            weights.append(Span("wait for weights", ended_s - wait_s, wait_s))
    rows = [TraceRow(rank, "step", tuple(steps)), TraceRow(rank, "parts", tuple(parts))]
    for kind, spans in _recorded(recorded, origin).items():
        for number, lane in enumerate(_lanes(spans), 1):
            name = kind if number == 1 else f"{kind} ({number})"
            rows.append(TraceRow(rank, name, tuple(lane)))
    if weights:
        rows.append(TraceRow(rank, "wait for weights", tuple(weights)))
    return rows


def _facts(record: StepRecord) -> Mapping[str, Scalar]:
    """Return the facts that a viewer shows beside a step."""
    return {"loss": record.loss, "samples": record.samples, **record.exchange}


def _parts(record: StepRecord, began_s: float) -> Iterator[Span]:
    """Yield the parts of a step that took time, one after the other."""
    for part in PARTS:
        seconds = getattr(record, part)
        if seconds > 0:
            yield Span(part.removesuffix("_s"), began_s, seconds)
        # Records have durations alone: each part begins where the one before ended.
        began_s += seconds


def _recorded(path: Path, origin: float) -> dict[str, list[Span]]:
    """Return the spans of a file by kind, in the order in which they began."""
    if not path.exists():
        return {}
    # All kinds in advance: they fix the order of the rows.
    by_kind: dict[str, list[Span]] = {kind: [] for kind in KINDS}
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):  # else it was cut: the worker was killed
            kind, span = Span.from_json(json.loads(line))
            by_kind[kind].append(dataclasses.replace(span, began_s=span.began_s - origin))
    for spans in by_kind.values():
        spans.sort(key=lambda span: span.began_s)
    return {kind: spans for kind, spans in by_kind.items() if spans}


def _lanes(spans: Sequence[Span]) -> list[list[Span]]:
    """Return as few rows as hold spans that overlap.

    Buckets are under way together, and the parts of a message side by side.
    """
    lanes: list[list[Span]] = []
    for span in spans:
        # Spans come in the order of their beginnings, so any free row is as good as another.
        free = next((lane for lane in lanes if lane[-1].ended_s <= span.began_s), None)
        if free is None:
            lanes.append([span])
        else:
            free.append(span)
    return lanes
