"""Write a simulation: the terminal's table, simulation.json, .csv and images."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from scaletrain.collectives.cost import Link
from scaletrain.run.atomic import write_json
from scaletrain.run.environment import environment
from scaletrain.scaling.predict import simulate, step_time
from scaletrain.scaling.predict.calibration import FAR
from scaletrain.scaling.predict.network import INCAST_S, INCAST_SENDERS, LOCAL_LATENCY_S
from scaletrain.scaling.predict.simulate import Point, SimulatedJob
from scaletrain.scaling.predict.step_time import Strategy
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
            speedup = _range(point.speedup, point.fast_speedup, ".1f", "-")
            if beats_some and point in fastest[workers]:
                cells.append(f"[bold]{speedup}*[/bold]")
            else:
                cells.append(speedup)
        table.add_row(strategy, *cells)
    return table


def _range(low: float, high: float, form: str, between: str) -> str:
    """Return two figures as a range, or as one where they read the same."""
    first, last = format(low, form), format(high, form)
    return first if first == last else f"{first}{between}{last}"


def _remarks(job: SimulatedJob, points: Sequence[Point], left_out: Sequence[int]) -> list[str]:
    """Return lines about the assumptions of the table."""
    remarks = []
    if left_out:
        counts = ", ".join(map(str, left_out))
        remarks.append(
            f"left out: {counts} workers cannot share a batch of {job.batch_size}"
            " (a larger --batch, or --mode weak)"
        )
    remarks += _assumptions(job, points)
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


def _assumptions(job: SimulatedJob, points: Sequence[Point]) -> list[str]:
    """Return what the prediction rests on, with the sources of its figures."""
    fabric = job.network
    lines = [f"network: {fabric.source}"]
    if fabric.workers_per_host > 1:
        inside = "as fast as its port (ASSUMED; --local-bandwidth)"
        if fabric.local:
            inside = _rate_inside(fabric.local)
        lines.append(f"hosts: {fabric.workers_per_host} workers each; inside a host {inside}")
    if job.stragglers is None or job.overlap is None:
        lines.append("a range: * and the price go by its first figure, with which to plan")
    if job.stragglers is None:
        lines.append(
            f"  workers vary by {step_time.USUAL_STRAGGLERS.variation:.1%} from step to step, as in"
            " TensorFlow's synchronous steps (OSDI 2016), to not at all (--straggler-variation)"
        )
    if job.overlap is None:
        lines.append(
            "  communication is not hidden behind backward, to all of it that can be"
            " (--overlap, --no-overlap)"
        )
    elif job.overlap:
        lines.append("all of the communication that can hide behind backward does (--overlap)")
    if job.overlap is not False:
        lines.append(
            f"gradients leave in buckets of {step_time.BUCKET_BYTES / 2**20:.0f} MiB, the first of"
            f" {step_time.FIRST_BUCKET_BYTES / 2**20:.0f}, as PyTorch's DDP sends them by default"
        )
    if job.overlap is not False and job.profile == step_time.USUAL_PROFILE:
        lines.append(
            "ASSUMED: forward is a third of a pass, gradients come in proportion to their bytes"
            " (--layers)"
        )
    if any(Strategy.parse(point.strategy).has_servers for point in points):
        lines += _about_servers(job)
    most_hosts = max(point.workers for point in points) / fabric.workers_per_host
    if job.overlap is None and fabric.drops_packets and most_hosts > INCAST_SENDERS:
        lines.append(
            f"where more than {INCAST_SENDERS} hosts (ASSUMED) send to one port at once, TCP may"
            f" time out once a step, in the first figure: {1e3 * INCAST_S:.0f} ms, Linux's shortest"
            " (Vasudevan et al., SIGCOMM 2009)"
        )
    return lines


def _rate_inside(link: Link) -> str:
    """Return the link between workers of a host in words."""
    latency = f"{1e6 * link.latency_s:g} us a message"
    if link.latency_s == LOCAL_LATENCY_S:
        latency = f"{latency} (ASSUMED)"
    return f"{link.bandwidth_bytes_per_s / 1e9:,.1f} GB/s, {latency}"


def _about_servers(job: SimulatedJob) -> list[str]:
    feeder = "host" if job.servers.fed_by_host else "worker"
    fed = ""
    if job.network.workers_per_host > 1:
        fed = f", which gets a message from every {feeder} (--servers-fed-by)"
    if job.servers.bytes_per_s == math.inf:
        return [f"server: moves what the network does, as measured{fed}"] if fed else []
    return [
        f"server: moves {job.servers.bytes_per_s / 1e9:.2f} GB/s in and out together, as ours did"
        f" over TCP on two cores (benchmarks/results/parameter_server.md){fed}"
    ]


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
    segments = f" in {plural(best.segments, 'segment')}" if best.segments else ""
    step_ms = _range(1e3 * best.step_s, 1e3 * best.fast_step_s, ".2f", " to ")
    fast_efficiency = best.efficiency * best.step_s / best.fast_step_s
    efficiency = _range(best.efficiency, fast_efficiency, ".2f", " to ")
    count, noun = plural(workers, "worker").split()
    return (
        f"{count:>5} {noun}: {names}{segments}{machines}, {step_ms} ms a step,"
        f" efficiency {efficiency}{price}{without}"
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
    header = {
        **environment(),
        "job": job._asdict() | {"network": network, "servers": job.servers._asdict()},
    }
    write_json(out / "simulation.json", {"header": header, "rows": rows})
    write_csv(out / "simulation.csv", rows)
    reach = None if measured is None else measured * FAR
    for form in ("svg", "png"):
        image = plots.image(plots.simulation(points, reach), form, watermark="PREDICTED")
        (out / f"simulation.{form}").write_bytes(image)
