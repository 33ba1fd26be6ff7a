"""Published scaling figures held against the simulator: benchmarks/results/published.md."""

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
import yaml
from scipy import optimize

from benchmarks.lab import published
from benchmarks.lab.pages import markdown
from scaletrain.collectives.cost import Link, Network
from scaletrain.run.atomic import write_json
from scaletrain.scaling.predict import simulate
from scaletrain.scaling.predict.network import (
    LOCAL_LATENCY_S,
    OUR_SERVERS,
    Fabric,
    Servers,
    fabric_named,
    parse_bandwidth,
)
from scaletrain.scaling.predict.step_time import (
    USUAL_PROFILE,
    USUAL_STRAGGLERS,
    ComputeCost,
    PassProfile,
    StepModel,
    Stragglers,
    Strategy,
    incast_s,
    slowest_factor,
)
from scaletrain.scaling.show import results

CASES = Path(__file__).with_name("published.yaml")
IMAGENET = 1_281_167  # training images
MEDIAN_TARGET = 0.05  # of the errors where the inputs are known
WORST_TARGET = 0.20
MOST_WORKERS = 32_768  # the simulator's limit
SECONDS_TARGET = 10.0  # for every strategy at that limit


@dataclasses.dataclass(frozen=True)
class Series:
    """One published job on one machine at several numbers of workers.

    Points are predicted from the baseline, those on several hosts from a full host where there is
    one: workers of a host slow each other down in ways that are no matter of the exchange.

    Attributes:
        name: the job and the machine, in words.
        source: who published it.
        baseline: what the fewest workers reached, which tells the computation.
        host: what a full host reached; None: it is the baseline, or it was not published.
        points: what more workers reached.
        fabric: the machine's network.
        num_bytes: size of the gradients on the wire.
        batch: samples a step of each worker; or of all, if ``is_strong``.
        is_strong: the global batch is fixed.
        exchange: a collective, or ``server``.
        overlap: whether the exchange hides behind backward; None: the source does not say.
        servers: what the servers are like, if there are any.
        assumed: inputs that the source does not give.
        assumed_between: those that matter only to points on several hosts.
        forward: the part of a pass behind which nothing hides.
    """

    name: str
    source: str
    baseline: "Measured"
    host: "Measured | None"
    points: "tuple[Measured, ...]"
    fabric: Fabric
    num_bytes: float
    batch: int
    is_strong: bool
    exchange: str
    overlap: bool | None
    servers: Servers
    assumed: tuple[str, ...]
    assumed_between: tuple[str, ...]
    forward: float

    def inputs(self, point: "Measured") -> str:
        """Return how much of a prediction's input is published."""
        if point.is_fitted:
            return "fitted"
        on_several_hosts = point.workers > self.fabric.workers_per_host
        if self.assumed or (on_several_hosts and self.assumed_between):
            return "assumed"
        return "known"

    def share(self, workers: int) -> float:
        """Return the samples of one worker in a step."""
        return self.batch / workers if self.is_strong else self.batch


@dataclasses.dataclass(frozen=True)
class Measured:
    """A published rate in samples a second of all workers."""

    workers: int
    rate: float
    servers: int = 1
    is_fitted: bool = False

    @classmethod
    def of(cls, value: Mapping[str, Any], baseline: "Measured | None" = None) -> "Measured":
        """Return a figure that is published as a rate, as hours, or as an efficiency."""
        workers = value["workers"]
        if "rate" in value:
            rate = value["rate"]
        elif "hours" in value:
            rate = value["epochs"] * IMAGENET / (value["hours"] * 3600)
        else:
            assert baseline is not None, "an efficiency is relative to a baseline"
            rate = value["efficiency"] * workers * baseline.rate / baseline.workers
        return cls(workers, rate, value.get("servers", 1), value.get("fitted", False))


def read(path: Path = CASES) -> tuple[list[Series], list[str]]:
    """Return every series, and why others were left out."""
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    series = [_series(value, content["sources"]) for value in content["series"]]
    return series, content["left_out"]


def _series(value: Mapping[str, Any], sources: Mapping[str, str]) -> Series:
    baseline = Measured.of(value["baseline"])
    points = [Measured.of(point, baseline) for point in value["points"]]
    host = Measured.of(value["host"]) if "host" in value else None
    num_bytes = _num_bytes(value)
    return Series(
        name=value["name"],
        source=sources[value["source"]],
        baseline=baseline,
        host=host,
        points=tuple([host, *points] if host else points),
        fabric=_fabric(value),
        num_bytes=num_bytes,
        batch=value.get("global_batch") or value["batch"],
        is_strong="global_batch" in value,
        exchange=value["exchange"],
        overlap=value.get("overlap"),
        servers=OUR_SERVERS._replace(
            largest_share=value.get("largest_mb", 0.0) * 1e6 / num_bytes,
            bytes_per_s=value.get("server_gb_per_s", OUR_SERVERS.bytes_per_s / 1e9) * 1e9,
            beside_workers=value.get("beside_workers", False),
            fed_by_host=value.get("fed_by_host", False),
        ),
        assumed=tuple(value.get("assumed", ())),
        assumed_between=tuple(value.get("assumed_between", ())),
        forward=0.0 if value.get("hides_behind_forward") else USUAL_PROFILE.forward,
    )


def _num_bytes(value: Mapping[str, Any]) -> float:
    if "gradient_mb" in value:
        return float(value["gradient_mb"]) * 1e6
    precision = value.get("precision", "float32")
    return simulate.MODEL_PARAMETERS[value["model"]] * simulate.PRECISIONS[precision]


def _fabric(value: Mapping[str, Any]) -> Fabric:
    if value["network"] == "fitted to FireCaffe's rows of 32 GPUs":
        bandwidth = published.firecaffe().bandwidth_bytes_per_s
        return Fabric(Network(0.0, bandwidth), value["network"])
    fabric = fabric_named(value["network"])
    network = fabric.network
    if "bandwidth" in value:
        network = network._replace(bandwidth_bytes_per_s=parse_bandwidth(value["bandwidth"]))
    if "latency_us" in value:
        network = network._replace(latency_s=value["latency_us"] / 1e6)
    local = None
    if "local_gb_per_s" in value:
        local = Link(LOCAL_LATENCY_S, value["local_gb_per_s"] * 1e9)
    workers_per_host = value.get("workers_per_host", 1)
    return dataclasses.replace(
        fabric, network=network, workers_per_host=workers_per_host, local=local
    )


@dataclasses.dataclass(frozen=True)
class Case:
    """One published rate beside the simulator's, in samples a second.

    Attributes:
        series: which series it is of.
        workers: number of workers.
        servers: number of servers; 0: none.
        origin: number of workers of the rate that it is predicted from.
        inputs: ``known``, ``assumed`` or ``fitted``.
        published: the published rate.
        slow: the simulator's without overlap and with stragglers: its first figure.
        fast: the simulator's with full overlap and without stragglers.
    """

    series: str
    workers: int
    servers: int
    origin: int
    inputs: str
    published: float
    slow: float
    fast: float

    @property
    def error(self) -> float:
        """By which part the first figure is too fast (positive) or too slow (negative)."""
        return self.slow / self.published - 1

    @property
    def fast_error(self) -> float:
        """The same of the other end."""
        return self.fast / self.published - 1

    @property
    def place(self) -> str:
        """Where the published rate lies: inside the band, or on which side of it."""
        if self.published < self.slow:
            return "below"
        return "above" if self.published > self.fast else "inside"

    def to_json(self) -> dict[str, Any]:
        """Return the case as published.json holds it."""
        return dataclasses.asdict(self) | {"error": self.error, "place": self.place}


def evaluate(series: Series) -> list[Case]:
    """Predict every point of a series."""
    cases = []
    for point in series.points:
        origin = series.baseline
        if series.host is not None and point.workers > series.host.workers:
            origin = series.host
        rates = _rates(series, point, origin)
        cases.append(
            Case(
                series=series.name,
                workers=point.workers,
                servers=point.servers if series.exchange == "server" else 0,
                origin=origin.workers,
                inputs=series.inputs(point),
                published=point.rate,
                slow=min(rates),
                fast=max(rates),
            )
        )
    return cases


def _rates(series: Series, point: Measured, origin: Measured) -> list[float]:
    """Return the rates at the ends of the band, from the computation that the origin tells."""
    samples = series.share(point.workers) * point.workers
    rates = []
    for overlap in (False, True):
        if series.overlap in (None, overlap):
            for stragglers in (Stragglers(), USUAL_STRAGGLERS):
                compute = _compute(series, origin, stragglers, overlap)
                model = _model(series, _slowed(compute, point, stragglers), overlap)
                step_s = model.step_s(*_job(series, point))
                if not overlap and stragglers == USUAL_STRAGGLERS:
                    step_s += incast_s(_job(series, point)[0], point.workers, series.fabric)
                rates.append(samples / step_s)
    return rates


def _slowed(compute: ComputeCost, point: Measured, stragglers: Stragglers) -> ComputeCost:
    return compute.slowed(slowest_factor(point.workers, 0, stragglers))


def _model(series: Series, compute: ComputeCost, overlap: bool) -> StepModel:
    return StepModel(
        series.num_bytes,
        compute,
        series.fabric,
        overlap=overlap,
        profile=PassProfile(forward=series.forward),
        servers=series.servers,
    )


def _job(series: Series, point: Measured) -> tuple[Strategy, int, float]:
    """Return the strategy, the workers and the samples of each at a point."""
    text = f"server:{point.servers}" if series.exchange == "server" else series.exchange
    return Strategy.parse(text), point.workers, series.share(point.workers)


def _compute(
    series: Series, origin: Measured, stragglers: Stragglers, overlap: bool
) -> ComputeCost:
    """Return the computation with which the origin takes as long as was published."""
    share = series.share(origin.workers)
    longest = origin.workers / origin.rate  # seconds a sample of one worker, with the exchange

    def excess_s(sample_s: float) -> float:
        compute = _slowed(ComputeCost(sample_s), origin, stragglers)
        model = _model(series, compute, overlap)
        return model.step_s(*_job(series, origin)) - share * longest

    # Drawn stragglers are only near their mean.
    return ComputeCost(float(optimize.brentq(excess_s, 1e-3 * longest, 1.1 * longest)))


@dataclasses.dataclass(frozen=True)
class Summary:
    """The errors of the first figures of some cases, as fractions.

    ``inside``, ``below`` and ``above`` count where the published rates lie beside the band.
    """

    name: str
    count: int
    median: float
    worst: float
    inside: int
    below: int
    above: int

    @classmethod
    def of(cls, name: str, cases: Sequence[Case]) -> "Summary":
        """Summarise some cases, at least one."""
        errors = [abs(case.error) for case in cases]
        places = [case.place for case in cases]
        return cls(
            name=name,
            count=len(cases),
            median=statistics.median(errors),
            worst=max(errors),
            inside=places.count("inside"),
            below=places.count("below"),
            above=places.count("above"),
        )


class Speed(NamedTuple):
    """How long the simulator takes at its limit."""

    strategies: int
    cpu_s: float

    @property
    def is_met(self) -> bool:
        """True if every strategy together takes less than the target."""
        return self.cpu_s < SECONDS_TARGET


def speed() -> Speed:
    """Time every strategy at the most workers, on a fat tree and with segments to choose."""
    job = simulate.SimulatedJob(
        num_bytes=simulate.MODEL_BYTES["resnet50"],
        batch_size=32,
        compute=ComputeCost(0.003),
        network=fabric_named("fat-tree-10gbit"),
        mode="weak",
    )
    names = simulate.strategies()
    began = time.process_time()
    simulate.simulate(job, [MOST_WORKERS], names)
    return Speed(len(names), time.process_time() - began)


@click.command("published")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("benchmarks/results"),
    show_default=True,
    help="Where published.md and published.json go.",
)
def command(out: Path) -> None:
    """Hold the simulator against published scaling figures, and show every error.

    The figures and their sources lie in benchmarks/lab/published.yaml. Takes some seconds.

    \b
    Example:
      python -m benchmarks.lab published
    """
    series, left_out = read()
    cases = []
    for one in series:
        cases += evaluate(one)
    out.mkdir(parents=True, exist_ok=True)
    text = page(series, cases, left_out, speed())
    write_json(out / "published.json", {"cases": [case.to_json() for case in cases]})
    results.write(out / "published.md", text)
    click.echo(text)


def summaries(cases: Sequence[Case]) -> list[Summary]:
    """Return the errors by how much of the input is known, and of all predictions together."""
    rows = []
    for inputs in ("known", "assumed", "fitted"):
        chosen = [case for case in cases if case.inputs == inputs]
        if chosen:
            rows.append(Summary.of(inputs, chosen))
    predicted = [case for case in cases if case.inputs != "fitted"]
    return [*rows, Summary.of("all but fitted", predicted)]


def page(
    series: Sequence[Series], cases: Sequence[Case], left_out: Sequence[str], timed: Speed
) -> str:
    """Return the page in Markdown."""
    rows = summaries(cases)
    return markdown(
        "published.md",
        rows=rows,
        known=rows[0],
        median_target=MEDIAN_TARGET,
        worst_target=WORST_TARGET,
        far=[case for case in cases if abs(case.error) > WORST_TARGET],
        optimistic=sum(case.error > MEDIAN_TARGET for case in cases),
        pessimistic=sum(case.error < -MEDIAN_TARGET for case in cases),
        series=series,
        cases=cases,
        left_out=left_out,
        timed=timed,
        most_workers=MOST_WORKERS,
    )
