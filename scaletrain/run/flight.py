"""The last collectives of each rank, for torch's analyser of hangs (``torchfrtrace``).

Each rank writes its collectives into a ring of fixed size, in a file that is mapped into memory
(``RunDir.collectives``): 2 us a collective, and the file is there whatever state the process is in.
When a job has failed, ``write_dumps`` turns the rings into the format of torch's Flight Recorder,
which names the first collective that not all ranks have entered, or that they entered differently.

The analyser knows only torch's own backends by name, so ours is written as ``gloo``.
"""

import contextlib
import json
import mmap
import os
import pickle
import struct
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scaletrain.run.layout import RunDir

VERSION = "2.10"  # of the format
_SLOTS = 512  # collectives that are kept
_HEADER_BYTES = 16_384  # JSON: the groups of this process, padded with spaces
# Of a collective: the number of the record (from 1; 0: empty) and of the collective in its group,
# nanoseconds at which it was called, began and ended (0: not yet), elements; its group's number,
# and in words what it is and of which type.
_SLOT = struct.Struct("=QQqqqQI28s16s")
_ENDED_AT = 32  # offset in a slot
_MOMENT = struct.Struct("=q")
# What the analyser knows, by the names of torch's process groups. Nothing else is shown.
_NAMES = {
    "allreduce": "all_reduce",
    "allgather": "all_gather",
    "reduce_scatter": "reduce_scatter",
    "alltoall": "all_to_all",
    "broadcast": "broadcast",
    "reduce": "reduce",
    "gather": "gather",
    "scatter": "scatter",
    "barrier": "barrier",
}


class Recorder:
    """Writes the collectives of this process.

    Args:
        path: of the ring.
        rank: of this process.
        size: ranks in the job.
    """

    def __init__(self, path: Path, rank: int, size: int):
        self.rank = rank
        self.size = size
        num_bytes = _HEADER_BYTES + _SLOTS * _SLOT.size
        descriptor = os.open(path, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o644)
        try:
            # A file with holes would end the process (SIGBUS) where the disk has no room for one.
            os.posix_fallocate(descriptor, 0, num_bytes)
            self._ring = mmap.mmap(descriptor, num_bytes)
        finally:
            os.close(descriptor)
        # Held while a record gets its number: any thread may call a collective.
        self._numbering = threading.Lock()
        self._num_records = 0
        self._groups: list[dict[str, Any]] = []

    def group(self, name: str, ranks: Sequence[int]) -> int:
        """Note a group of ranks of the job; return its number."""
        self._groups.append({"name": name, "ranks": [*ranks]})
        text = json.dumps(self._groups).encode()
        # Of a group that has no room any more, nothing is shown.
        if len(text) <= _HEADER_BYTES:
            self._ring[:_HEADER_BYTES] = text.ljust(_HEADER_BYTES)
        return len(self._groups) - 1

    def began(self, group: int, name: str, number: int, num_elements: int, dtype: str) -> int:
        """Note a collective that begins; return its record, for ``ended``.

        Args:
            group: its number.
            name: of the collective, as a method of torch's process groups.
            number: of the collective in its group, the same on all ranks.
            num_elements: of this rank's tensor, or of its part of a larger one.
            dtype: in words.
        """
        with self._numbering:
            self._num_records += 1
            record = self._num_records
        now = time.time_ns()
        in_words = (name.encode()[:28], dtype.encode()[:16])
        fields = (record, number, now, now, 0, max(0, num_elements), group, *in_words)
        _SLOT.pack_into(self._ring, _offset(record), *fields)
        return record

    def ended(self, record: int) -> None:
        """Note that a collective has ended well."""
        if record > self._num_records - _SLOTS:  # else another one has its slot
            _MOMENT.pack_into(self._ring, _offset(record) + _ENDED_AT, time.time_ns())


def _offset(record: int) -> int:
    return _HEADER_BYTES + (record % _SLOTS) * _SLOT.size


# None: nothing is recorded. Set by ``recorded``, read by every thread that calls a collective.
recorder: Recorder | None = None


@contextlib.contextmanager
def recorded(files: RunDir, rank: int, size: int) -> Iterator[None]:
    """Record the collectives of this process, one of ``size``, while the body runs."""
    global recorder
    # A full disk, or one that cannot be mapped, is no reason not to train.
    with contextlib.suppress(OSError, ValueError):
        recorder = Recorder(files.collectives(rank), rank, size)
    try:
        yield
    finally:
        recorder = None


# Reading


def write_dumps(files: RunDir, workers: int) -> Path | None:
    """Write what the ranks recorded as dumps of Flight Recorder; return their directory.

    None if no rank has recorded a collective. Afterwards ``torchfrtrace DIRECTORY -p rank_`` says
    where the ranks are apart.
    """
    dumps = {}
    for rank in range(workers):
        dump = read_dump(files.collectives(rank))
        if dump is not None:
            dumps[rank] = dump
    if not any(dump["entries"] for dump in dumps.values()):
        return None
    files.flight.mkdir(exist_ok=True)
    for rank, dump in dumps.items():
        # Written for torch's reader, which takes nothing else. We never read such a file.
        (files.flight / f"rank_{rank}").write_bytes(pickle.dumps(dump))
    return files.flight


def read_dump(path: Path) -> dict[str, Any] | None:
    """Return one rank's ring as a dump; None if there is none."""
    try:
        ring = path.read_bytes()
        groups = json.loads(ring[:_HEADER_BYTES].rstrip(b"\0 ") or b"[]")
    except (OSError, ValueError):
        return None
    entries = []
    for slot in range(_SLOTS):
        fields = ring[_HEADER_BYTES + slot * _SLOT.size : _HEADER_BYTES + (slot + 1) * _SLOT.size]
        if len(fields) == _SLOT.size:
            entry = _entry(_SLOT.unpack(fields), groups)
            if entry is not None:
                entries.append(entry)
    config = {}
    for number, group in enumerate(groups):
        ranks = json.dumps(group["ranks"])
        config[str(number)] = {"name": str(number), "desc": group["name"], "ranks": ranks}
    entries.sort(key=lambda entry: entry["record_id"])
    return {"version": VERSION, "pg_config": config, "entries": entries}


def _entry(fields: tuple[Any, ...], groups: list[dict[str, Any]]) -> dict[str, Any] | None:
    record, number, called_ns, started_ns, ended_ns, count, group, name, dtype = fields
    if record == 0 or group >= len(groups):
        return None
    name = _NAMES.get(name.rstrip(b"\0").decode(errors="replace"))
    if name is None:
        return None
    size = len(groups[group]["ranks"])
    num_in = count * size if name == "reduce_scatter" else count
    num_out = count * size if name == "all_gather" else count
    dtype = dtype.rstrip(b"\0").decode(errors="replace")
    return {
        "record_id": record - 1,
        "pg_id": group,
        "process_group": (str(group), groups[group]["name"]),
        "collective_seq_id": number,
        "p2p_seq_id": 0,
        "op_id": number,
        "profiling_name": f"gloo:{name}",
        "time_created_ns": called_ns,
        "time_discovered_started_ns": started_ns,
        "time_discovered_completed_ns": ended_ns or None,
        "duration_ms": (ended_ns - started_ns) / 1e6 if ended_ns else None,
        "input_sizes": [[num_in]],
        "input_dtypes": [dtype],
        "output_sizes": [[num_out]],
        "output_dtypes": [dtype],
        "state": "completed" if ended_ns else "started",
        "timeout_ms": 0,
        "is_p2p": False,
        "retired": bool(ended_ns),
        "frames": [],
    }
