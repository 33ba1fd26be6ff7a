"""From run directories to a report: speed, losses and their causes. Trains nothing."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from scaletrain.errors import UserError
from scaletrain.run.environment import environment
from scaletrain.run.layout import RunDir
from scaletrain.scaling.explain import convergence, headline, losses
from scaletrain.scaling.explain.measurements import CellResults, Measurements
from scaletrain.scaling.explain.rows import row_of
from scaletrain.scaling.measure import machine, servers, sweep, trainings
from scaletrain.scaling.measure.run import read_run
from scaletrain.scaling.model import BatchPoint, Cell, Report, ReportHeader, Row
from scaletrain.scaling.predict.calibration import Fit
from scaletrain.scaling.predict.fit import alike_but_for_exchange, best_fit, predictions

VERSION = 1  # of the format of report.json


def of_sweep(*outs: Path) -> Report:
    """Return the report of a sweep's directory, as far as the sweep has come.

    Several directories make one report: sweeps of the same mode and threads that cover different
    cells.

    Raises:
        UserError: a directory is not that of a sweep.
    """
    plans = [sweep.read(out) for out in outs]
    measurements = Measurements(strong=plans[0].mode == "strong")
    progress = _Progress()
    headers = []
    for out, plan in zip(outs, plans, strict=True):
        for cell in plan.cells():
            _read_cell(out, plan, cell, measurements.results(cell), progress)
        headers.append(sweep.read_header(out) or plan.header())
    configs: dict[str, str] = {}
    for header in headers:
        configs.update(header.config)
    # Host and time are those of the first sweep.
    header = dataclasses.replace(
        headers[0],
        config=configs,
        runs_planned=progress.planned,
        runs_missing=progress.planned - progress.finished - progress.failed,
    )
    if progress.used_by_others:
        header = dataclasses.replace(
            header,
            used_by_others=round(float(np.mean(progress.used_by_others)), 3),
            busy=machine.sentence(progress.used_by_others),
        )
    return _report(measurements, header)


@dataclasses.dataclass
class _Progress:
    """How far the sweeps of a report have come."""

    planned: int = 0  # runs
    finished: int = 0
    failed: int = 0
    # Of each run of which it is known: the share of the cores that other processes used.
    used_by_others: list[float] = dataclasses.field(default_factory=list)


def _read_cell(
    out: Path, plan: sweep.Sweep, cell: Cell, results: CellResults, progress: _Progress
) -> None:
    """Read the repeats of a cell into its results, and count them."""
    # Where two sweeps have the same cell, the later one counts.
    results.runs.clear()
    results.failures.clear()
    for repeat in range(plan.repeats):
        directory = sweep.run_dir(out, cell, repeat)
        if RunDir(directory).has_finished():
            results.runs.append(read_run(directory))
            progress.used_by_others += machine.read(directory)
            continue
        reason = trainings.read_failure(directory)
        if reason is not None:
            results.failures.append(reason)
    progress.planned += plan.repeats
    progress.finished += len(results.runs)
    progress.failed += len(results.failures)


def of_runs(directories: Sequence[Path]) -> Report:
    """Return the report of single runs (``scaletrain train``).

    Runs of the same config, exchange and workers are repeats of one cell.

    Raises:
        UserError: a directory holds no finished run, or the runs scale in different modes.
    """
    runs = [read_run(directory) for directory in directories]
    modes = {run.summary.batch_mode for run in runs}
    if len(modes) > 1:
        raise UserError(
            "runs of strong and of weak scaling do not belong in one report"
            " (allowed: runs of one batch_mode)"
        )
    mode = modes.pop() if modes else "strong"
    measurements = Measurements(strong=mode == "strong")
    for run in runs:
        batch_size = run.summary.batch_size or 0
        if mode == "weak":
            # A summary has the batch of all workers; a cell of weak scaling has one worker's.
            batch_size //= run.workers
        cell = Cell(run.summary.name, run.summary.exchange, run.workers, batch_size)
        measurements.results(cell).runs.append(run)
    cells = measurements.cells(reference=False)
    header = dataclasses.replace(
        ReportHeader.from_json(environment()),
        mode=mode,
        repeats=max(len(measurements.runs(cell)) for cell in cells),
        note="rendered from single runs; host and versions are those of the machine that rendered",
        config={directory.name: _config_text(directory) for directory in directories},
    )
    return _report(measurements, header)


def _config_text(directory: Path) -> str:
    path = RunDir(directory).config
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _report(measurements: Measurements, header: ReportHeader) -> Report:
    """Build the report in steps; each one rests on those before it."""
    # 1. The speed of each cell.
    cells = measurements.cells(reference=False)
    rows = tuple(row_of(cell, measurements) for cell in cells)
    references = tuple(row_of(cell, measurements) for cell in measurements.cells(reference=True))
    rows, loss_reached = _with_time_to_loss(rows, cells, measurements)
    # 2. Its lost time.
    split_losses = []
    for cell, row in zip(cells, rows, strict=True):
        loss = losses.loss_of(cell, row, measurements)
        if loss is not None:
            split_losses.append(loss)
    report = Report(
        version=VERSION,
        header=_with_findings(header, rows, measurements),
        summary="",
        rows=rows,
        losses=tuple(split_losses),
        references=references,
        batches=_batches([*rows, *references]),
        loss_reached=loss_reached,
    )
    # 3. Predictions of the model that this report calibrates.
    fitted = _fitted(report)
    if fitted is not None:
        report = _with_predictions(report, fitted)
    # 4. The sentences for people.
    report = dataclasses.replace(
        report, losses=losses.with_alternatives(report.losses, rows, fitted)
    )
    return with_reference(report)


def with_reference(report: Report, stated: Sequence[float] = ()) -> Report:
    """Return a report whose samples to the target accuracy are held against a reference.

    Args:
        report: the report.
        stated: the samples that reference runs needed; empty: one worker is the reference.
    """
    found = convergence.of(report, stated)
    too_fast = [(each.config, each.variant, each.label) for each in found if each.is_too_fast]
    rows = []
    for row in report.rows:
        is_too_fast = (row.config, row.variant, row.label) in too_fast
        rows.append(dataclasses.replace(row, is_too_fast=is_too_fast))
    report = dataclasses.replace(
        report,
        header=dataclasses.replace(report.header, reference_samples=tuple(stated) or None),
        rows=tuple(rows),
        convergence=found,
    )
    return dataclasses.replace(report, summary=headline.of(report))


def _with_time_to_loss(
    rows: tuple[Row, ...], cells: Sequence[Cell], measurements: Measurements
) -> tuple[tuple[Row, ...], float | None]:
    """Add to rows when they reached the loss that all runs reach; return it, too."""
    if not all(run.learns for run in measurements.all_runs()):
        return rows, None
    runs_of_rows = [measurements.runs(cell) for cell in cells]
    loss = servers.common_loss(rows, runs_of_rows)
    if loss is None:
        return rows, None
    timed = []
    for row, runs in zip(rows, runs_of_rows, strict=True):
        seconds = servers.mean_time_to_loss(runs, loss)
        timed.append(dataclasses.replace(row, time_to_loss_s=seconds))
    return tuple(timed), loss


def _with_findings(
    header: ReportHeader, rows: Sequence[Row], measurements: Measurements
) -> ReportHeader:
    """Add to a header the facts that runs record about themselves."""
    emulation = sorted({row.emulation for row in rows if row.emulation})
    commits: set[str] = set()
    devices: set[str] = set()
    for run in measurements.all_runs():
        devices.update(name for name, _, _ in run.devices)
        if run.commit:
            commits.add(run.commit)
    return dataclasses.replace(
        header,
        # The commits that ran, not the one that renders. Cells of several commits say so.
        commit=", ".join(sorted(commits)) if commits else header.commit,
        baseline=_baselines_in_words(rows),
        emulated=bool(emulation),
        emulation=tuple(emulation),
        devices=tuple(sorted(devices)),
    )


def _baselines_in_words(rows: Sequence[Row]) -> str:
    texts = sorted({row.baseline for row in rows if row.baseline})
    if not texts and any(row.runs for row in rows):
        return "nothing: no other number of workers was measured"
    return "; ".join(texts)


def _batches(rows: Iterable[Row]) -> tuple[BatchPoint, ...]:
    """Return how long one worker computes on a sample at each batch size it had alone.

    This is the price of a small share of a batch.
    """
    points: dict[tuple[str, str, int], BatchPoint] = {}
    for row in rows:
        if row.workers != 1 or row.exchange != "none":
            continue
        if row.forward_s is None or row.backward_s is None:
            continue
        variant = {key: value for key, value in row.variant.items() if key != "batch_size"}
        sample_s = (row.forward_s + row.backward_s) / row.batch_size
        point = BatchPoint(row.config, variant, row.batch_size, sample_s, efficiency=1.0)
        # Rows come before references: the long measurement of a batch size wins.
        points.setdefault((row.config, str(variant), row.batch_size), point)
    in_order = [points[key] for key in sorted(points)]
    # The last one of a job has its largest batch.
    largest = {(point.config, str(point.variant)): point for point in in_order}
    compared = []
    for point in in_order:
        best_s = largest[point.config, str(point.variant)].sample_s
        compared.append(dataclasses.replace(point, efficiency=best_s / point.sample_s))
    return tuple(compared)


def _fitted(report: Report) -> Fit | None:
    """Calibrate the models of computation and network on this very report.

    With three or more worker counts above one, the largest is left out of the calibration: its
    prediction is one. None where rows differ in more than exchange and workers, or no exchange has
    a model.
    """
    rows = [row for row in report.rows if row.runs]
    if not alike_but_for_exchange(rows):
        return None
    gradient_bytes = rows[0].gradient_bytes
    if gradient_bytes is None:
        return None
    counts = sorted({row.workers for row in rows if row.workers > 1})
    fitted_to = counts[-2] if len(counts) > 2 else None
    try:
        return best_fit(report, gradient_bytes, max_workers=fitted_to)
    except UserError:
        return None


def _with_predictions(report: Report, fitted: Fit) -> Report:
    """Set predicted steps beside the measured ones."""
    gradient_bytes = next(row.gradient_bytes for row in report.rows if row.runs)
    assert gradient_bytes is not None, "without it nothing could have been fitted"
    points = predictions(fitted, report, gradient_bytes)
    return dataclasses.replace(
        report,
        header=dataclasses.replace(
            report.header, calibrated_on=f"up to {fitted.max_workers} workers"
        ),
        predictions=tuple(points),
    )
