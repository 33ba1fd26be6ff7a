"""Write a simulation: the terminal's table, simulation.json, .csv and images."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scaletrain.run.atomic import write_json
from scaletrain.run.environment import environment
from scaletrain.scaling.predict import simulate
from scaletrain.scaling.predict.fit import FAR
from scaletrain.scaling.predict.simulate import Point, SimulatedJob
from scaletrain.scaling.show import plots
from scaletrain.scaling.show.publish import write_csv
from scaletrain.units import plural


def show_simulation(
    job: SimulatedJob, points: Sequence[Point], console: Console, asked: Sequence[int]
) -> None:
    """Print a table of speed-ups, and the best strategy at each number of workers.

    Args:
        job: the simulated job.
        points: every strategy at every number of workers that fits.
        console: where to print.
        asked: the numbers of workers that were asked for.
    """
    counts = sorted({point.workers for point in points})
    fastest = simulate.fastest(points)
    console.print(_table(job, points, counts, fastest))
    left_out = sorted(set(asked) - set(counts))
    lines = _remarks(job, points, left_out)
    for workers in counts:
        lines.append(_best_line(points, workers, fastest[workers]))
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _table(
    job: SimulatedJob,
    points: Sequence[Point],
    counts: Sequence[int],
    fastest: Mapping[int, Sequence[Point]],
) -> Table:
    """Return the speed-ups: a row a strategy, a column a number of workers."""
    table = Table(
        title=f"predicted speed-up, {job.mode} scaling, {job.num_bytes / 1e6:,.1f} MB a step,"
        f" batch {job.batch_size}"
    )
    table.add_column("strategy")
    for workers in counts:
        table.add_column(str(workers), justify="right")
    at = {(point.strategy, point.workers): point for point in points}
    strategies = list(dict.fromkeys(point.strategy for point in points))
    for strategy in strategies:
        cells = []
        for workers in counts:
            point = at[strategy, workers]
            # Where all are equally fast none is marked.
            beats_some = workers > 1 and len(fastest[workers]) < len(strategies)
            if beats_some and point in fastest[workers]:
                cells.append(f"[bold]{point.speedup:.1f}*[/bold]")
            else:
                cells.append(f"{point.speedup:.1f}")
        table.add_row(strategy, *cells)
    return table


def _remarks(job: SimulatedJob, points: Sequence[Point], left_out: Sequence[int]) -> list[str]:
    """Return lines about the assumptions of the table."""
    remarks = []
    if left_out:
        counts = ", ".join(map(str, left_out))
        remarks.append(
            f"left out: {counts} workers cannot share a batch of {job.batch_size}"
            " (a larger --batch, or --mode weak)"
        )
    remarks.append(f"network: {job.network.source}")
    has_price = job.price_per_worker_hour is not None
    if has_price:
        remarks.append(f"an epoch is {job.epoch_samples:,} samples (--epoch-samples)")
    if any(point.machines > point.workers for point in points):
        price = "; prices count them" if has_price else ""
        remarks.append(
            "server and server:K take 1 and K machines beside the workers,"
            f" +N takes N backup workers{price}"
        )
    return remarks


def _best_line(points: Sequence[Point], workers: int, equal: Sequence[Point]) -> str:
    """Return one line about the fastest strategies, ``equal``, at a number of workers."""
    best = min(equal, key=lambda point: point.machines)
    strategies = {point.strategy for point in points}
    if workers == 1:
        names = "nothing to exchange"
    elif len(equal) == len(strategies) > 1:
        names = "all alike"
    else:
        names = " or ".join(point.strategy for point in equal)
    machines = without = price = ""
    if best.machines > workers:
        machines = f" ({best.machines} machines)"
        without = _without_more_machines(points, workers)
    if best.cost_per_epoch is not None:
        price = f", {best.cost_per_epoch:,.2f} an epoch"
    count, noun = plural(workers, "worker").split()
    return (
        f"{count:>5} {noun}: {names}{machines}, {1e3 * best.step_s:.2f} ms a step,"
        f" efficiency {best.efficiency:.2f}{price}{without}"
    )


def _without_more_machines(points: Sequence[Point], workers: int) -> str:
    """Return the fastest strategy of the workers alone: more machines may be a poor bargain."""
    alone = [point for point in points if point.workers == workers == point.machines]
    if not alone:
        return ""
    fastest = min(alone, key=lambda point: point.step_s)
    return f"; without more machines {fastest.strategy}, {1e3 * fastest.step_s:.2f} ms"


def write_simulation(
    out: Path, job: SimulatedJob, points: Sequence[Point], measured: int | None
) -> None:
    """Write simulation.json, .csv, .svg and .png.

    Args:
        out: the directory.
        job: the simulated job.
        points: every strategy at every number of workers.
        measured: the most workers of the calibration; None: there was none. Lines are dashed
            beyond ``FAR`` times as many.
    """
    out.mkdir(parents=True, exist_ok=True)
    rows = simulate.as_rows(points)
    network = {"network": job.network.network._asdict(), "source": job.network.source}
    # JSON has no form for a ``Fabric``: its figures and their source stand for it.
    header = {**environment(), "job": job._asdict() | {"network": network}}
    write_json(out / "simulation.json", {"header": header, "rows": rows})
    write_csv(out / "simulation.csv", rows)
    reach = None if measured is None else measured * FAR
    for form in ("svg", "png"):
        image = plots.image(plots.simulation(points, reach), form, watermark="PREDICTED")
        (out / f"simulation.{form}").write_bytes(image)
