"""Spans: buckets, rounds and waits of one rank, each with its beginning and its end.

They are off unless a run asks for a trace, or a profile collects them for some steps. A spans file
(``RunDir.spans``) holds one JSON object a line: ``kind`` (bucket, round or wait), ``name``,
``began`` (unix seconds on this rank's clock), ``s`` (seconds) and the details that the writer adds.
``scaletrain report --trace`` puts the spans under the steps of the records.
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaletrain.run import progress
from scaletrain.run.layout import RunDir

if TYPE_CHECKING:
    import torch.distributed as dist

_PINGS = 5  # how often a rank asks rank 0 for the time
_writer: "_Writer | None" = None
# A profile's spans; the training thread sets the list, and any thread adds.
_collection: list[dict[str, Any]] | None = None


class _Writer:
    """Writes the spans of this process."""

    def __init__(self, path: Path):
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (lives as long as the worker)
        # Buckets come from backward's thread, rounds and waits from the exchange's own.
        self._lock = threading.Lock()

    def write(self, value: dict[str, Any]) -> None:
        line = json.dumps(value) + "\n"
        with self._lock:
            self._file.write(line)

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def recorded(run_dir: Path, rank: int, wanted: bool) -> Iterator[None]:
    """Write the spans of this process while the body runs, if they are ``wanted``."""
    global _writer
    _writer = _Writer(RunDir(run_dir).spans(rank)) if wanted else None
    try:
        yield
    finally:
        writer = _writer
        _writer = None
        if writer:
            writer.close()


def on() -> bool:
    """Return True if spans are written or collected."""
    return _writer is not None or _collection is not None


def collect(collection: list[dict[str, Any]]) -> None:
    """Also append the spans that end from now on to a list, as a file would hold them."""
    global _collection
    _collection = collection


def stop_collecting() -> None:
    """End the collection that ``collect`` began."""
    global _collection
    _collection = None


def add(kind: str, name: str, began: float, **details: Any) -> None:
    """Write a span that ends now. Any thread may call it.

    Args:
        kind: "bucket", "round" or "wait".
        name: shown to a reader of the trace.
        began: ``time.time()`` at its beginning.
        details: further values to show, such as ``bytes``.
    """
    writer, collection = _writer, _collection
    if writer is None and collection is None:
        return
    seconds = time.time() - began
    span = {"kind": kind, "name": name, "began": began, "s": seconds, **details}
    if writer is not None:
        writer.write(span)
    if collection is not None:
        collection.append(span)


@progress.waiting("the comparison of clocks")
def clock_offset_s(store: "dist.Store", rank: int, size: int) -> float:
    """Return by how many seconds this rank's clock is ahead of rank 0's. Every rank calls it.

    It is right to about half the store's round trip. The ranks take turns: each asks rank 0 for
    the time over the job's store, a few times, and the quickest answer counts (Cristian's
    algorithm, 1989).
    """
    if rank == 0:
        for other in range(1, size):
            for ping in range(_PINGS):
                store.get(f"clock/{other}/{ping}/asked")
                store.set(f"clock/{other}/{ping}/told", repr(time.time()))
        return 0.0
    offsets = []  # (round trip, offset), both in seconds
    for ping in range(_PINGS):
        sent_at = time.time()
        store.set(f"clock/{rank}/{ping}/asked", "")
        rank_0_time = float(store.get(f"clock/{rank}/{ping}/told"))
        received_at = time.time()
        offsets.append((received_at - sent_at, (sent_at + received_at) / 2 - rank_0_time))
    return min(offsets)[1]
