"""Read one run: the steps of every rank, and its summary."""

import json
from pathlib import Path

import numpy as np

from scaletrain.errors import UserError
from scaletrain.run import watch
from scaletrain.run.layout import RunDir
from scaletrain.run.records import WARMUP_STEPS, StepRecord, last_records, read_records
from scaletrain.scaling.measure import servers
from scaletrain.scaling.model import PARTS, RankTimes, Run, Summary, WorkerFacts

MAX_HEADER_BYTES = 100_000_000  # a longer header of a checkpoint is taken for damage


def read_run(run_dir: Path, warmup_steps: int = WARMUP_STEPS) -> Run:
    """Read the summary and the records of every rank.

    Args:
        run_dir: the run directory.
        warmup_steps: first steps to leave out. One step stays in any case.

    Raises:
        UserError: the directory holds no finished run, or a rank has no records.
    """
    files = RunDir(run_dir)
    summary = _summary(run_dir)
    ranks = [_records(run_dir, rank) for rank in range(summary.workers)]
    shortest = min(len(records) for records in ranks)
    if shortest < 1:
        raise UserError(f"{run_dir}: a rank has no records")
    first = min(warmup_steps, shortest - 1)
    # Arrays need equally many steps of each rank; asynchronous ranks may differ.
    kept = [records[first:shortest] for records in ranks]
    # Times count from the rank's first step, warm-up included.
    began = np.array([records[0].time for records in ranks])
    steps = _array(kept, "step_s")
    return Run(
        summary=summary,
        steps=steps,
        parts={part: _array(kept, part) for part in PARTS},
        samples=_array(kept, "samples"),
        losses=_array(kept, "loss"),
        # A record's time is the step's beginning.
        ended_s=_array(kept, "time") + steps - began,
        sent_bytes=_mean_of_exchange(kept, "bytes_sent"),
        waited_s=_mean_of_exchange(kept, "wait_in_backward_s"),
        gradient_bytes=model_bytes(run_dir),
        servers=servers.read(run_dir),
        ranks=tuple(_rank_times(records, files) for records in kept),
        culprits=tuple(watch.culprits_of(files, kept)),
        worker_facts=_worker_facts(run_dir, len(ranks)),
        evaluated_steps=_evaluated_steps(files),
    )


def _evaluated_steps(files: RunDir) -> tuple[int, ...]:
    """Return the steps after which a run was evaluated; none if no file says so."""
    try:
        lines = files.evaluations.read_text(encoding="utf-8").splitlines(keepends=True)
    except OSError:
        return ()
    # A line without an end was cut: the worker was killed.
    return tuple(json.loads(line)["step"] for line in lines if line.endswith("\n"))


def _rank_times(records: list[StepRecord], files: RunDir) -> RankTimes:
    """Return one rank's mean times over its steps."""
    own = [record.own_s() for record in records]
    stolen = [record.stolen_s for record in records if record.stolen_s is not None]
    rank = records[0].rank

    def mean(values: list[float]) -> float:
        return float(np.mean(values))

    return RankTimes(
        rank=rank,
        host=watch.host_of(files, rank),
        step_s=mean([record.step_s for record in records]),
        input_s=mean([parts["input"] for parts in own]),
        forward_s=mean([parts["forward"] for parts in own]),
        backward_s=mean([parts["backward"] for parts in own]),
        optimizer_s=mean([parts["optimizer"] for parts in own]),
        wait_s=mean([record.wait_s for record in records]),
        gc_s=mean([record.gc_s for record in records]),
        stolen_s=mean(stolen) if stolen else None,
    )


def _summary(run_dir: Path) -> Summary:
    try:
        text = RunDir(run_dir).summary.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{run_dir}: no finished run (summary.json: {error.strerror})") from None
    try:
        return Summary.from_json(json.loads(text))
    except ValueError:
        raise UserError(f"{run_dir}: summary.json is not JSON") from None


def _records(run_dir: Path, rank: int) -> list[StepRecord]:
    path = RunDir(run_dir).records(rank)
    if not path.exists():
        raise UserError(f"{run_dir}: {path.name} is missing")
    return list(read_records(path))


def _array(ranks: list[list[StepRecord]], field: str) -> np.ndarray:
    """Return one field of all records, shape (steps, ranks)."""
    return np.array([_column(records, field) for records in ranks]).T


def _column(records: list[StepRecord], field: str) -> list[float]:
    values = [getattr(record, field) for record in records]
    return [np.nan if value is None else value for value in values]  # a loss that is not finite


def _mean_of_exchange(ranks: list[list[StepRecord]], key: str) -> float | None:
    """Return the mean of a number of the exchange's own; None if it does not record it."""
    values = []
    for records in ranks:
        values += [record.exchange[key] for record in records if key in record.exchange]
    return float(np.mean(values)) if values else None


def _worker_facts(run_dir: Path, ranks: int) -> tuple[WorkerFacts, ...]:
    facts = []
    for rank in range(ranks):
        path = RunDir(run_dir).header(rank)
        if path.exists():
            facts.append(WorkerFacts.from_json(json.loads(path.read_text(encoding="utf-8"))))
    return tuple(facts)


def sent_bytes(run_dir: Path) -> float | None:
    """Return the bytes that rank 0 sent in a step, as a mean over its last steps.

    None if its exchange does not count them, or there are no records.
    """
    path = RunDir(run_dir).records(0)
    if not path.exists():
        return None
    return _mean_of_exchange([last_records(path)], "bytes_sent")


def model_bytes(run_dir: Path) -> int | None:
    """Return the bytes of the model's tensors, by the header of a checkpoint.

    A safetensors file begins with the length of the header in eight bytes; the header is JSON.
    None if there is no checkpoint.
    """
    checkpoints = RunDir(run_dir).checkpoints()
    if not checkpoints:
        return None
    # Any one will do: the model has the same tensors in all of them.
    _, path = checkpoints[0]
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > MAX_HEADER_BYTES:
            return None
        header = json.loads(file.read(length))
    num_bytes = 0
    for name, tensor in header.items():
        # The other tensors are the optimizer's state, which is not exchanged.
        if name.startswith("model."):
            begin, end = tensor["data_offsets"]
            num_bytes += end - begin
    return num_bytes
