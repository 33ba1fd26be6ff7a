"""A Chrome trace (chrome://tracing, Perfetto) of all ranks of a run on one clock: steps, their parts, buckets, rounds and waits."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaletrain.run.records import StepRecord, read_records

PARTS = ("input_s", "forward_s", "backward_s", "update_s")
KINDS = ("bucket", "round", "wait")


def of_run(run_dir: Path) -> dict[str, Any]:
    """The trace of a run directory: a process a rank; its steps and their parts, and what the run recorded with ``trace: true``.

    Ranks stamp unix time. Where a rank's header (``rank-<r>.json``) has ``clock_offset_s``, by which its clock is ahead of rank 0's,
    it is taken off.
    """
    events: list[dict[str, Any]] = []
    paths = sorted(run_dir.glob("rank-*.jsonl"), key=lambda path: int(path.stem.partition("-")[2]))
    ranks = [(int(path.stem.partition("-")[2]), list(read_records(path))) for path in paths]
    offsets = {rank: _offset(run_dir, rank) for rank, _ in ranks}
    origin = min(
        (records[0].time - offsets[rank] for rank, records in ranks if records), default=0.0
    )
    for rank, records in ranks:
        events.append(
            {"name": "process_name", "ph": "M", "pid": rank, "args": {"name": f"rank {rank}"}}
        )
        behind = offsets[rank] + origin
        rows = [
            (
                "step",
                [_span(f"step {r.step}", r.time - behind, r.step_s, _told(r)) for r in records],
            )
        ]
        rows.append(
            ("parts", [part for record in records for part in _parts(record, record.time - behind)])
        )
        for kind, spans in _recorded(run_dir / f"spans-{rank}.jsonl", behind).items():
            rows += [
                (kind if not lane else f"{kind} ({lane + 1})", own)
                for lane, own in enumerate(_lanes(spans))
            ]
        weights = [
            _span("wait for weights", *_end(r, behind), {})
            for r in records
            if "wait_s" in r.exchange
        ]
        rows += [("wait for weights", weights)] * bool(weights)
        for row, (name, spans) in enumerate(rows):
            events.append(
                {"name": "thread_name", "ph": "M", "pid": rank, "tid": row, "args": {"name": name}}
            )
            events += [span | {"pid": rank, "tid": row} for span in spans]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _offset(run_dir: Path, rank: int) -> float:
    try:
        return float(
            json.loads((run_dir / f"rank-{rank}.json").read_text(encoding="utf-8")).get(
                "clock_offset_s", 0.0
            )
        )
    except (OSError, ValueError):
        return 0.0


def _told(record: StepRecord) -> dict[str, Any]:
    return {"loss": record.loss, "samples": record.samples, **record.exchange}


def _parts(record: StepRecord, began_s: float) -> Iterator[dict[str, Any]]:
    for part in PARTS:
        seconds = getattr(record, part)
        if seconds > 0:
            yield _span(part.removesuffix("_s"), began_s, seconds, {})
        began_s += seconds


def _end(record: StepRecord, behind: float) -> tuple[float, float]:
    """When a parameter server's worker waited for weights: last in its step."""
    wait_s = record.exchange["wait_s"]
    return record.time - behind + record.step_s - wait_s, wait_s


def _recorded(path: Path, behind: float) -> dict[str, list[dict[str, Any]]]:
    """Spans by kind, in the order of their beginnings. A last line that was cut is left out."""
    found: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    for value in (json.loads(line) for line in lines if line.endswith("\n")):
        told = {key: value[key] for key in value if key not in ("kind", "name", "began", "s")}
        found[value["kind"]].append(_span(value["name"], value["began"] - behind, value["s"], told))
    return {
        kind: sorted(spans, key=lambda span: span["ts"]) for kind, spans in found.items() if spans
    }


def _lanes(spans: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """As few rows as hold spans that overlap (buckets under way together, parts of a message side by side)."""
    lanes: list[list[dict[str, Any]]] = []
    for span in spans:
        free = next(
            (lane for lane in lanes if lane[-1]["ts"] + lane[-1]["dur"] <= span["ts"]), None
        )
        if free is None:
            lanes.append([span])
        else:
            free.append(span)
    return lanes


def _span(name: str, began_s: float, seconds: float, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "X", "ts": 1e6 * began_s, "dur": 1e6 * seconds, "args": args}
