"""Records: what every rank writes while it trains. One JSON object a line, one file a rank; measuring never communicates."""

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO


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
        self._file: TextIO = open(
            records_path(run_dir, rank), "a" if append else "w", encoding="utf-8", buffering=1
        )  # noqa: SIM115

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


def write_json(path: Path, value: Any) -> None:
    """Write a file whole or not at all: a reader never sees half of it, a full disk leaves the old one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, sort_keys=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        error.filename = str(path)  # the file that was wanted
        raise
    finally:
        partial.unlink(missing_ok=True)


def has_finished(run_dir: Path) -> bool:
    """Whether a run has done all its steps, by its summary."""
    try:
        return bool(
            json.loads((run_dir / "summary.json").read_text(encoding="utf-8")).get("finished", True)
        )
    except (OSError, ValueError):
        return False


def environment() -> dict[str, Any]:
    """What a reader needs to judge a figure: host, processor, cores, versions, commit. Imports no torch."""
    import importlib.metadata
    import platform
    import subprocess

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    processor = next(
        (
            line.partition(":")[2].strip()
            for line in _lines("/proc/cpuinfo")
            if line.startswith("model name")
        ),
        platform.processor() or platform.machine(),
    )
    commit = git("rev-parse", "--short=12", "HEAD")
    # Pages of results are not what was measured: a run that writes several does not mark the later ones.
    if commit and git(
        "status",
        "--porcelain",
        "--untracked-files=no",
        "--",
        ":/",
        ":(top,exclude)benchmarks/results",
    ):
        commit += "-dirty"
    return {
        "host": platform.node(),
        "os": platform.platform(),
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "python": platform.python_version(),
        "versions": {
            name: version(name)
            for name in ("scaletrain", "torch", "numpy", "mpi4py", "horovod", "pyzmq")
        },
        "commit": commit,
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
