"""Predictions held against measurements and published figures."""

import dataclasses
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import click
import numpy as np

from benchmarks.lab import emulated, extrapolate, published
from benchmarks.lab.extrapolate import (
    BatchPrediction,
    Extrapolation,
    HostsPoint,
    MeasuredExchanges,
    TrafficPrediction,
)
from benchmarks.lab.pages import markdown
from scaletrain.rehearsal.links import burst_bytes
from scaletrain.run.atomic import write_json
from scaletrain.run.environment import Environment
from scaletrain.run.layout import RunDir
from scaletrain.scaling.measure.run import read_run
from scaletrain.scaling.predict.calibration import Estimate
from scaletrain.scaling.predict.network import fabric_named
from scaletrain.scaling.show import results
from scaletrain.scaling.show.publish import read_report
from scaletrain.units import bits_per_s

HOSTS = (2, 4, 8, 16)
FITTED_TO = 4
ROUNDS = 3  # all numbers of hosts take turns in each: the machine's speed drifts
COLLECTIVES = "ring,tree,star,halving_doubling,recursive_doubling,direct,double_tree,pipelined_tree"
FITTED_BATCH = 96
TRAFFIC_STEP_S = 0.5  # the emulated computation of squeezenet_alexnet.yaml
SUITES = Path(__file__).resolve().parents[1] / "suites"
REHEARSE = ("--launcher", "rehearsal")


@dataclasses.dataclass(frozen=True)
class Message:
    """The message of the collectives at one bandwidth."""

    num_bytes: int
    repeats: int  # in a round


MESSAGES = {"1Gbit": Message(12_500_000, 3), "100Mbit": Message(2_500_000, 1)}  # by bandwidth
SERVED_MODELS = {"1Gbit": "squeezenet", "100Mbit": "lenet"}  # bandwidth -> the servers' model


class Measurements:
    """The files below ``--data``."""

    def __init__(self, path: Path):
        self.path = path

    @property
    def header(self) -> Path:
        """The machine and the commits."""
        return self.path / "header.json"

    def exchanges(self, bandwidth: str, hosts: int, part: int) -> Path:
        """The exchanges of one number of hosts in one round."""
        return self.path / f"exchanges-{bandwidth}-{hosts}-{part}.json"

    def server(self, bandwidth: str, hosts: int) -> RunDir:
        """The run of one number of workers with a server."""
        return RunDir(self.path / f"server-{bandwidth}-{hosts}")

    def report(self, sweep: str) -> Path:
        """The report of the sweep ``training`` or ``traffic``."""
        return self.path / sweep / "report.json"


@dataclasses.dataclass(frozen=True)
class Results:
    """What the page shows."""

    header: Mapping[str, Any]  # of ``run.environment``
    extrapolations: dict[str, Extrapolation]  # by title
    training: list[BatchPrediction]
    firecaffe: published.FireCaffe
    backup_workers: dict[str, published.Backups]  # by assumption
    traffic: list[TrafficPrediction]

    def to_json(self) -> dict[str, Any]:
        """Return the results as prediction.json holds them."""
        extrapolations = {title: made.to_json() for title, made in self.extrapolations.items()}
        backups = {name: made.to_json() for name, made in self.backup_workers.items()}
        return {
            "extrapolations": extrapolations,
            "training": [dataclasses.asdict(point) for point in self.training],
            "firecaffe": self.firecaffe.to_json(),
            "backup_workers": backups,
            "traffic": [dataclasses.asdict(point) for point in self.traffic],
            "header": self.header,
        }


@click.command("prediction")
@results.options("prediction", "prediction.md and prediction.json")
def command(data: Path, out: Path, no_measure: bool) -> None:
    """Fit on few hosts and predict many; fit FireCaffe's 32 GPUs and predict its 128; and so on.

    Every miss is written as one. Measuring needs root (rehearsals build network namespaces) and
    about an hour on 2 cores, which nothing else may use. Stopped and started again, it measures
    what is missing.

    \b
    Example:
      python -m benchmarks.lab prediction
    """
    measurements = Measurements(data)
    data.mkdir(parents=True, exist_ok=True)
    if not no_measure:
        _measure(measurements)
    if measurements.header.exists():
        header = json.loads(measurements.header.read_text(encoding="utf-8"))
    else:
        header = results.noted(measurements.header)
    made = _results(measurements, header)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "prediction.json", made.to_json())
    text = page(made)
    results.write(out / "prediction.md", text)
    click.echo(text)


def _measure(measurements: Measurements) -> None:
    """Measure whatever is missing, one after another. A failure is reported and left out."""
    for bandwidth in MESSAGES:
        for part, hosts in itertools.product(range(ROUNDS), HOSTS):
            _measure_exchanges(measurements, bandwidth, hosts, part)
    for hosts in HOSTS:
        for bandwidth in SERVED_MODELS:
            _measure_server(measurements, bandwidth, hosts)
    training = "--workers 1,2 --exchange native,ring,none --vary batch_size=96,192 --repeats 5"
    _measure_sweep(measurements, "training", SUITES / "digits_batches.yaml", training)
    traffic = (
        "--workers 1,4 --exchange ring --mode weak --repeats 1 --no-split --launcher rehearsal"
        " --set launcher.bandwidth=1Gbit --vary model.preset=squeezenet,alexnet"
    )
    _measure_sweep(measurements, "traffic", SUITES / "squeezenet_alexnet.yaml", traffic)


def _measure_exchanges(measurements: Measurements, bandwidth: str, hosts: int, part: int) -> None:
    message = MESSAGES[bandwidth]
    measured = measurements.exchanges(bandwidth, hosts, part)
    launch = ("launch", "-n", str(hosts), *REHEARSE, "--set", f"bandwidth={bandwidth}")
    where = ("--timeout", "280", "--run-dir", measurements.path / f"run-{measured.stem}")
    script = (SUITES / "time_exchanges.py", measured.resolve())
    arguments = (str(message.num_bytes), str(message.repeats), COLLECTIVES)
    results.once(measured, *launch, *where, "--", *script, *arguments, header=measurements.header)


def _measure_server(measurements: Measurements, bandwidth: str, hosts: int) -> None:
    run = measurements.server(bandwidth, hosts)
    if not run.summary.exists():  # half a run, from a measurement that was stopped
        shutil.rmtree(run.path, ignore_errors=True)
    train = ("train", SUITES / "server.yaml", "--workers", str(hosts), *REHEARSE)
    link = ("--set", f"launcher.bandwidth={bandwidth}")
    model = ("--set", f"model.preset={SERVED_MODELS[bandwidth]}")
    where = ("--run-dir", run.path)
    results.once(run.summary, *train, *link, *model, *where, header=measurements.header)


def _measure_sweep(measurements: Measurements, name: str, config: Path, options: str) -> None:
    report = measurements.report(name)
    if report.exists() and any(row.failures for row in read_report(report).rows):
        report.unlink()  # the sweep tries again what failed
    arguments = ["bench", "scaling", str(config), *options.split(), "--out", str(report.parent)]
    results.once(report, *arguments, header=measurements.header)


def _results(measurements: Measurements, header: Mapping[str, Any]) -> Results:
    """Compare everything that was measured with its prediction."""
    extrapolations = {}
    for bandwidth, message in MESSAGES.items():
        exchanges = _extrapolate_exchanges(measurements, bandwidth, header["cores"])
        if exchanges:
            size = f"{message.num_bytes / 1e6:g} MB"
            extrapolations[f"collectives, {bandwidth}/s, {size}"] = exchanges
    for bandwidth in SERVED_MODELS:
        runs = {}
        for hosts in HOSTS:
            run = measurements.server(bandwidth, hosts)
            if run.summary.exists():
                runs[hosts] = read_run(run.path, 2)
        if len(runs) > 2:
            steps_s = {hosts: float(np.median(run.steps)) for hosts, run in runs.items()}
            num_bytes = next(run.gradient_bytes for run in runs.values() if run.gradient_bytes)
            title = f"parameter server, {bandwidth}/s, {num_bytes / 1e6:.1f} MB"
            extrapolations[title] = extrapolate.extrapolate_server(steps_s, num_bytes, FITTED_TO)
    training = measurements.report("training")
    traffic = measurements.report("traffic")
    batches: list[BatchPrediction] = []
    models: list[TrafficPrediction] = []
    if training.exists():
        batches = extrapolate.other_batch(read_report(training), FITTED_BATCH)
    if traffic.exists():
        models = extrapolate.traffic(read_report(traffic), TRAFFIC_STEP_S, fabric_named("1gbit"))
    return Results(
        header=header,
        extrapolations=extrapolations,
        training=batches,
        firecaffe=published.firecaffe(),
        backup_workers=published.backup_workers(),
        traffic=models,
    )


def _extrapolate_exchanges(
    measurements: Measurements, bandwidth: str, cores: int
) -> Extrapolation | None:
    """Return the prediction of more hosts; None if too few numbers of hosts were measured."""
    measured = []
    for hosts, part in itertools.product(HOSTS, range(ROUNDS)):
        path = measurements.exchanges(bandwidth, hosts, part)
        if path.exists():
            measured.append(MeasuredExchanges.read(path))
    rounds = Counter(exchanges.workers for exchanges in measured)
    if len(rounds) <= 2:
        return None
    timings = []
    busy = []
    for exchanges in measured:
        timings += exchanges.timings
        busy += exchanges.busy
    known = emulated.EmulatedLinks(0.0, 0.0, 0.0, burst_bytes(bits_per_s(bandwidth)), cores)
    made = extrapolate.extrapolate(
        extrapolate.medians(timings), FITTED_TO, known, extrapolate.medians(busy)
    )
    return dataclasses.replace(made, rounds=min(rounds.values()))


def page(made: Results) -> str:
    """Return the page in Markdown."""
    points: list[HostsPoint] = []
    for extrapolation in made.extrapolations.values():
        points += extrapolation.points
    sizes = {point.model: point.gradient_bytes for point in made.traffic}
    times_smaller = None  # SqueezeNet's gradients than AlexNet's
    if {"squeezenet", "alexnet"} <= set(sizes):
        times_smaller = sizes["alexnet"] / sizes["squeezenet"]
    odds = made.backup_workers["few"].delay["odds"]
    return markdown(
        "prediction.md",
        measured_on=results.measured_on(cast(Environment, made.header)),
        extrapolations=made.extrapolations,
        hosts=HOSTS[2:],
        fitted_to=FITTED_TO,
        rounds=ROUNDS,
        in_words=_in_words,
        all_rates=_all_rates(points),
        fitted_batch=FITTED_BATCH,
        training=made.training,
        firecaffe=made.firecaffe,
        everyone=made.backup_workers["everyone"],
        few=made.backup_workers["few"],
        late_probability=odds / (1 + odds),
        traffic=made.traffic,
        traffic_step_s=TRAFFIC_STEP_S,
        times_smaller=times_smaller,
    )


@dataclasses.dataclass(frozen=True)
class Mean:
    """The mean error of one exchange."""

    exchange: str
    error: float
    predictions: int


def _all_rates(points: Iterable[HostsPoint]) -> list[Mean]:
    """Return the mean error of each exchange, over all the predictions of it."""
    errors: dict[str, list[float]] = {}
    for point in points:
        errors.setdefault(point.exchange, []).append(point.error)
    return [Mean(name, sum(each) / len(each), len(each)) for name, each in errors.items()]


_UNITS = {  # figure -> name, factor, unit
    "latency_s": ("latency", 1e3, "ms"),
    "bandwidth_bytes_per_s": ("bandwidth", 1e-6, "MB/s"),
    "add_bytes_per_s": ("adding", 1e-9, "GB/s"),
}


def _in_words(estimates: Mapping[str, Estimate]) -> str:
    """Return the fitted figures with their intervals."""
    figures = []
    for key, estimate in estimates.items():
        name, scale, unit = _UNITS[key]
        interval = "no interval"
        if estimate.low is not None and estimate.high is not None:
            interval = f"{scale * estimate.low:.3g} to {scale * estimate.high:.3g}"
        figures.append(f"{name} {scale * estimate.value:.3g} {unit} ({interval})")
    return "; ".join(figures)
