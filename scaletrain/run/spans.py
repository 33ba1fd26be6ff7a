"""What a trace shows beside the steps: buckets, rounds and waits of one rank, each with its beginning and end. Off unless asked for.

``RUN_DIR/spans-<rank>.jsonl`` has an object a line: ``name``, ``kind`` (bucket, round or wait), ``began`` (this rank's unix time), ``s``
and what else the writer tells. ``scaletrain report --trace`` puts them under the steps (``scaling/trace.py``).
"""

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch.distributed as dist

_PINGS = 5
_writer: "_Writer | None" = None


class _Writer:
    def __init__(self, path: Path):
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (lives as long as the worker)
        self._lock = (
            threading.Lock()
        )  # buckets come from backward's thread, rounds and waits from the exchange's own

    def write(self, value: dict[str, Any]) -> None:
        line = json.dumps(value) + "\n"
        with self._lock:
            self._file.write(line)

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def recorded(run_dir: Path, rank: int, wanted: bool) -> Iterator[None]:
    """While the body runs, spans of this process are written to the run's directory, if they are wanted."""
    global _writer
    _writer = _Writer(run_dir / f"spans-{rank}.jsonl") if wanted else None
    try:
        yield
    finally:
        writer, _writer = _writer, None
        if writer:
            writer.close()


def on() -> bool:
    return _writer is not None


def add(kind: str, name: str, began: float, **told: Any) -> None:
    """A span that ends now; ``began``: ``time.time()``. Any thread."""
    if writer := _writer:
        writer.write({"kind": kind, "name": name, "began": began, "s": time.time() - began, **told})


def clock_offset_s(store: "dist.Store", rank: int, size: int) -> float:
    """By how much this rank's clock is ahead of rank 0's, to about half the store's round trip. Every rank calls it (collective).

    Each rank in turn asks rank 0 for the time over the job's store, a few times; the quickest answer counts (Cristian's algorithm, 1989).
    """
    if rank == 0:
        for other in range(1, size):
            for ping in range(_PINGS):
                store.get(f"clock/{other}/{ping}/asked")
                store.set(f"clock/{other}/{ping}/told", repr(time.time()))
        return 0.0
    found = []
    for ping in range(_PINGS):
        asked = time.time()
        store.set(f"clock/{rank}/{ping}/asked", "")
        told = float(store.get(f"clock/{rank}/{ping}/told"))
        heard = time.time()
        found.append((heard - asked, (asked + heard) / 2 - told))
    return min(found)[1]
