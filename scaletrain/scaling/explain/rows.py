"""One row of a report: the figures of a cell over its repeats."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import TypeVar

import numpy as np

from scaletrain.collectives.traffic import bytes_moved
from scaletrain.scaling.explain import limiter
from scaletrain.scaling.explain.measurements import Measurements, mean_part_s, rates, typical_runs
from scaletrain.scaling.measure.intervals import Mean, mean, outlying, percentiles, ratio, typical
from scaletrain.scaling.model import Cell, RankTimes, Repeat, Row, Run, Summary
from scaletrain.scaling.predict.fit import strategy_of

_Value = TypeVar("_Value")


def row_of(cell: Cell, measurements: Measurements) -> Row:
    """Return the row of a cell; without figures if none of its repeats has finished."""
    results = measurements.results(cell)
    runs = results.runs
    batch_size = cell.batch_size if measurements.strong else cell.batch_size * cell.workers
    row = Row(
        config=cell.config,
        exchange=cell.exchange,
        workers=cell.workers,
        batch_size=batch_size,
        variant=dict(cell.variant),
        oversubscribed=_scarce(runs),
        repeats=len(runs),
        failures=tuple(results.failures),
        runs=tuple(_repeat(run) for run in runs),
    )
    if not runs:
        return row
    row = _with_speed(row, runs)
    row = _with_parts(row, runs)
    row = _with_traffic(row, runs)
    row = _with_learning(row, runs)
    row = _with_speedup(row, cell, measurements)
    row = _with_exposed_communication(row, cell, measurements)
    row = _with_culprit(row, runs)
    return dataclasses.replace(
        row,
        emulation=_first(_emulation(run.summary) for run in runs),
        servers=_first(run.servers for run in runs),
        ranks=_ranks_of(runs),
    )


def _repeat(run: Run) -> Repeat:
    reached = run.convergence if run.learns else None
    return Repeat(run.samples_per_s, run.step_s, run.summary.wall_s, reached)


def _ranks_of(runs: Sequence[Run]) -> tuple[RankTimes, ...]:
    """Return the times of each rank, as means over the repeats."""
    means = []
    for times in zip(*[run.ranks for run in runs], strict=False):
        values: dict[str, float | None] = {}
        for field in dataclasses.fields(RankTimes):
            if field.name not in ("rank", "host"):
                values[field.name] = _mean_of(getattr(each, field.name) for each in times)
        means.append(dataclasses.replace(times[0], **values))
    return tuple(means)


def _with_speed(row: Row, runs: Sequence[Run]) -> Row:
    """Add samples per second and the distribution of steps over all ranks and repeats."""
    # Intervals are over repeats, which are independent; the steps of a run are not.
    # Percentiles are over all single steps, also those of outlying repeats.
    rate = typical(rates(runs))
    step = mean([run.step_s for run in typical_runs(runs)])
    steps = np.concatenate([run.steps.ravel() for run in runs])
    at_percent = percentiles(steps)
    return dataclasses.replace(
        row,
        samples_per_s=rate.value,
        samples_per_s_ci95=rate.ci95,
        outliers=_outliers(runs),
        step_s_min=float(steps.min()),
        step_s_p10=at_percent[10],
        step_s_p50=at_percent[50],
        step_s_p90=at_percent[90],
        step_s_p95=at_percent[95],
        step_s_mean=step.value,
        step_s_ci95=step.ci95,
    )


def _outliers(runs: Sequence[Run]) -> tuple[int, ...]:
    """Return the positions of the repeats whose speed is outlying, counted from 1."""
    return tuple(number for number, out in enumerate(outlying(rates(runs)), 1) if out)


def _with_parts(row: Row, runs: Sequence[Run]) -> Row:
    """Add the mean seconds of each part of a step."""
    return dataclasses.replace(
        row,
        input_s=mean_part_s(runs, "input_s"),
        forward_s=mean_part_s(runs, "forward_s"),
        backward_s=mean_part_s(runs, "backward_s"),
        update_s=mean_part_s(runs, "update_s"),
        wait_in_backward_s=_mean_of(run.waited_s for run in typical_runs(runs)),
    )


def _with_traffic(row: Row, runs: Sequence[Run]) -> Row:
    """Add the bytes that a worker sends: counted, else those of the collective's schedule."""
    gradient_bytes = _first(run.gradient_bytes for run in runs)
    bytes_sent = _mean_of(run.sent_bytes for run in runs)
    bytes_sent_is = None if bytes_sent is None else "counted"
    strategy = strategy_of(row.exchange)
    # Servers run no schedule. That of two_level depends on which workers share a host.
    has_schedule = strategy not in (None, "server", "two_level")
    if bytes_sent is None and gradient_bytes and strategy and has_schedule:
        # ``bytes_moved`` counts all workers together.
        bytes_sent = bytes_moved(strategy, row.workers, gradient_bytes) / row.workers
        bytes_sent_is = "the schedule's"
    return dataclasses.replace(
        row, gradient_bytes=gradient_bytes, bytes_sent=bytes_sent, bytes_sent_is=bytes_sent_is
    )


def _with_learning(row: Row, runs: Sequence[Run]) -> Row:
    """Add loss and accuracy, and when the target was reached, of the runs that really train."""
    summaries = [run.summary for run in runs if run.learns]
    row = dataclasses.replace(
        row,
        final_loss=_mean_of(summary.final_loss for summary in summaries),
        test_accuracy=_mean_of(summary.test_accuracy for summary in summaries),
        target_step=_mean_of(summary.target_step for summary in summaries),
    )
    times = [run.summary.target_s for run in runs if run.summary.target_s is not None]
    if not times:
        return row
    to_target = typical(times)
    return dataclasses.replace(
        row, target_s=to_target.value, target_s_ci95=to_target.ci95, target_runs=len(times)
    )


def _with_speedup(row: Row, cell: Cell, measurements: Measurements) -> Row:
    """Add speed-up and efficiency over the baseline. Reference cells have none."""
    baseline = measurements.baseline(cell)
    if baseline is None or cell.reference:
        return row
    # The baseline's ratio to itself is 1 whatever the noise. Its interval of 0 would claim a
    # precision that nobody measured, and is left out below.
    speedup = _speedup(measurements.runs(cell), measurements.runs(baseline), baseline.workers)
    return dataclasses.replace(
        row,
        speedup=speedup.value,
        speedup_ci95=None if cell == baseline else speedup.ci95,
        efficiency=speedup.value / cell.workers,
        baseline=_baseline_in_words(baseline),
    )


def _speedup(runs: Sequence[Run], baseline: Sequence[Run], baseline_workers: int) -> Mean:
    """Return samples per second over the baseline's, whose own speed-up counts as ideal."""
    speedup = ratio(rates(runs), rates(baseline))
    ci95 = None if speedup.ci95 is None else speedup.ci95 * baseline_workers
    return Mean(speedup.value * baseline_workers, ci95, speedup.n)


def _baseline_in_words(baseline: Cell) -> str:
    if baseline.workers > 1:
        # That the fewest workers scale ideally is an assumption, and the report says so.
        return f"1 worker ({baseline.workers} workers, {baseline.exchange}, taken as ideal)"
    short = " (short runs)" if baseline.reference else ""
    exchange = "no exchange" if baseline.exchange == "none" else baseline.exchange
    return f"1 worker, {exchange}{short}"


def _with_exposed_communication(row: Row, cell: Cell, measurements: Measurements) -> Row:
    """Add the seconds by which a step is longer than that of the same workers with ``none``."""
    if cell.exchange == "none":
        return dataclasses.replace(row, exposed_comm_s=0.0)
    alone = measurements.without_exchange(cell)
    if not alone:
        return row
    # Repeats at the same position ran close together: differences are taken repeat by repeat.
    pairs = zip(measurements.runs(cell), alone, strict=False)
    exposed = typical([run.step_s - without.step_s for run, without in pairs])
    return dataclasses.replace(row, exposed_comm_s=exposed.value, exposed_comm_s_ci95=exposed.ci95)


def _with_culprit(row: Row, runs: Sequence[Run]) -> Row:
    """Add who held up the others, and what to do about it."""
    held_up = limiter.culprit_of([run.culprits for run in runs])
    if held_up is None:
        return row
    return dataclasses.replace(row, culprit=held_up.culprit, remedy=held_up.remedy)


def _scarce(runs: Sequence[Run]) -> str:
    """Return the resource of which the workers had too little, in words; empty if of none."""
    causes = []
    if any(run.has_too_many_threads for run in runs):
        causes.append("more threads than cores")
    if any(max(run.devices.values(), default=0) > 1 for run in runs):
        causes.append("workers that share a GPU")
    return " and ".join(causes)


def _emulation(summary: Summary) -> str | None:
    """Return the emulated parts of a run, in words; None for real training on real hosts."""
    if not summary.emulated and summary.launcher != "rehearsal":
        return None
    parts = []
    if summary.network:
        bandwidth = summary.network.bandwidth or "any bandwidth"
        parts.append(f"hosts are network namespaces of one machine, links of {bandwidth}")
        if summary.network.latency_s:
            parts.append(f"{summary.network.latency_s * 1e3:g} ms of latency")
        if summary.network.loss:
            parts.append(f"{summary.network.loss:.3g} of the packets lost")
    if summary.compute:
        step_s, sample_s = summary.compute.step_s, summary.compute.sample_s
        parts.append(f"accelerators that wait {step_s:g} s a step and {sample_s:g} s a sample")
    return ", ".join(parts) or "hosts and links of one machine"


def _mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are known; None if none is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _first(values: Iterable[_Value | None]) -> _Value | None:
    """Return the first value that is there."""
    return next((value for value in values if value), None)
