"""``scaletrain simulate``: predict how a job scales on a machine that is not there."""

import contextlib
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import pydantic
from click.core import ParameterSource

from scaletrain.errors import UserError

if TYPE_CHECKING:
    from scaletrain.scaling.predict.calibration import Calibration
    from scaletrain.scaling.predict.layers import ModelTimes
    from scaletrain.scaling.predict.network import Fabric
    from scaletrain.scaling.predict.simulate import Point, SimulatedJob
    from scaletrain.scaling.predict.step_time import Stragglers

EXAMPLE = "scaletrain simulate --model nin --batch 1024 --sample-ms 8.3 --network gemini"
MOST_WORKERS = 32_768


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of ``simulate``, as a person types them (see the help texts below)."""

    model: str | None
    batch: int | None
    sample_ms: float | None
    samples_per_s: float | None
    precision: str | None
    layers: Path | None
    network: str
    bandwidth: str | None
    latency_us: float | None
    workers_per_host: int | None
    local_bandwidth: str | None
    fit: Path | None
    half_duplex: bool
    workers: str
    strategy: str | None
    servers_fed_by: str
    mode: str
    overlap: bool | None
    straggler_variation: float | None
    slow_probability: float
    slow_factor: float
    epoch_samples: int
    price: float | None
    far: bool
    out: Path | None


@click.command()
@click.option(
    "--model",
    help="A preset (resnet50, vgg16, bert_large, gpt2, ...) or the size of the gradients, such as"
    " 100MB.",
)
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    help="Samples a step: of all workers (strong) or of each (weak).",
)
@click.option(
    "--sample-ms",
    type=click.FloatRange(min=0, min_open=True),
    help="Milliseconds of computation a sample, on one worker.",
)
@click.option(
    "--samples-per-s",
    type=click.FloatRange(min=0, min_open=True),
    help="Samples (images, sentences) a second of one worker alone, in place of --sample-ms.",
)
@click.option(
    "--precision",
    type=click.Choice(["float32", "float16", "bfloat16"]),
    help="Of gradients on the wire [default: float32, as torch.autocast keeps them].",
)
@click.option(
    "--layers",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A file of `bench model --out`, in place of --model and --sample-ms. It also tells when"
    " each layer's gradient can leave.",
)
@click.option(
    "--network",
    default="10gbit",
    show_default=True,
    help="A known network (see --networks).",
)
@click.option("--bandwidth", help="A bandwidth in place of the network's, such as 25Gbit.")
@click.option(
    "--latency-us",
    type=click.FloatRange(min=0),
    help="Microseconds of a message, in place of the network's.",
)
@click.option(
    "--workers-per-host",
    type=click.IntRange(min=1),
    help="Workers that share a host's port [default: the network's, mostly 1].",
)
@click.option(
    "--local-bandwidth",
    help="Between workers of a host, such as 20GB [default: the network's, mostly the port's].",
)
@click.option(
    "--fit",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A calibration (fit.json) in place of --sample-ms and --network. Of --network, it takes"
    " only what was not measured.",
)
@click.option("--half-duplex", is_flag=True, help="Links do not send while they receive.")
@click.option(
    "--workers",
    default="1,2,4,8,16,32,64,128",
    show_default=True,
    help="Worker counts, up to 32768.",
)
@click.option(
    "--strategy",
    help="Such as ring,tree,server,server:4,server+3 (backup workers) [default: all].",
)
@click.option(
    "--mode",
    type=click.Choice(["strong", "weak"]),
    default="strong",
    show_default=True,
    help="Strong: the global batch is fixed. Weak: it grows with the workers.",
)
@click.option(
    "--servers-fed-by",
    type=click.Choice(["worker", "host"]),
    default="worker",
    show_default=True,
    help="Servers get each worker's gradients, as ours do, or each host's sum, as TensorFlow's do.",
)
@click.option(
    "--overlap/--no-overlap",
    default=None,
    help="Communication hides behind backward, or does not [default: the range between both].",
)
@click.option(
    "--straggler-variation",
    type=click.FloatRange(min=0),
    help="Standard deviation / mean of a worker's computation (lognormal)"
    " [default: from 0 to 0.036, as TensorFlow's on a shared cluster].",
)
@click.option(
    "--slow-probability",
    type=click.FloatRange(min=0, max=1),
    default=0.0,
    help="Probability that a worker's step is slow.",
)
@click.option(
    "--slow-factor",
    type=click.FloatRange(min=1),
    default=2.0,
    show_default=True,
    help="How many times as long a slow step takes.",
)
@click.option(
    "--epoch-samples",
    type=click.IntRange(min=1),
    default=1_281_167,
    show_default=True,
    help="Samples an epoch (ImageNet's).",
)
@click.option(
    "--price",
    type=click.FloatRange(min=0),
    help="Price of a machine (worker, backup worker, server) and hour; shows the cost of an epoch.",
)
@click.option("--far", is_flag=True, help="Predict beyond 8 times the workers that --fit measured.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Also write simulation.json, .csv, .svg and .png there.",
)
@click.option(
    "--networks", is_flag=True, help="List the known networks with their sources, and exit."
)
def command(networks: bool, **values: Any) -> None:
    """Predict step time, speed-up and cost of every strategy at up to 32,768 workers.

    Predictions are computed from the schedules themselves. Nothing is started. A range lies between
    no overlap of communication with backward and late workers (the first figure, to plan with) and
    full overlap without stragglers.

    \b
    Examples:
      scaletrain simulate --model nin --batch 1024 --sample-ms 8.3 --network gemini
      scaletrain simulate --model resnet50 --batch 64 --samples-per-s 360 --mode weak
      scaletrain simulate --fit runs/mine/fit.json --workers 1,2,4,8 --strategy ring,server
    """
    if networks:
        _list_networks()
        return
    _simulate(Options(**values))


def _list_networks() -> None:
    from scaletrain.scaling.predict.network import FABRICS

    for name, fabric in FABRICS.items():
        megabytes_per_s = fabric.network.bandwidth_bytes_per_s / 1e6
        microseconds = 1e6 * fabric.network.latency_s
        click.echo(
            f"{name:<16} {megabytes_per_s:>8,.0f} MB/s {microseconds:>6.1f} us  {fabric.source}"
        )


def _simulate(options: Options) -> None:
    from scaletrain.scaling.predict import simulate
    from scaletrain.scaling.predict.calibration import Calibration
    from scaletrain.scaling.predict.layers import ModelTimes
    from scaletrain.scaling.predict.network import fabric_named
    from scaletrain.scaling.show import publish, simulation

    counts = _worker_counts(options.workers)
    # Also with --fit, which takes from it the figures that were not measured.
    fabric = fabric_named(options.network)
    calibration = None
    if options.fit:
        calibration = Calibration.read(options.fit)
        # The counts are sorted: the last is the farthest from what was measured.
        calibration.fit.check_reach(counts[-1], options.far)
        fabric = _fitted_fabric(options, calibration, assumed=fabric)
    # After the fit: --bandwidth and --half-duplex are a person's word, and come before any other.
    fabric = _adjusted(fabric, options)
    layers = ModelTimes.read(options.layers) if options.layers else None
    job = _job(options, fabric, calibration, layers)
    if options.strategy:
        names = [word.strip() for word in options.strategy.split(",")]
    else:
        names = simulate.strategies()
    points = simulate.simulate(job, counts, names)
    if calibration and not _names_network():
        _check_decided(options, calibration, job, points)
    # The counts as they were asked for: those that the batch is too small for are listed.
    simulation.show_simulation(job, points, publish.terminal(), counts)
    if options.out:
        measured_workers = calibration.fit.max_workers if calibration else None
        simulation.write_simulation(options.out, job, points, measured_workers)
        click.echo(f"written: {options.out / 'simulation.json'}")


def _worker_counts(text: str) -> list[int]:
    """Return the numbers of workers, the smallest first."""
    try:
        counts = sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise UserError(
            f"--workers: {text!r} is not allowed (allowed: numbers with commas, such as 1,8,64)"
        ) from None
    if counts[0] < 1 or counts[-1] > MOST_WORKERS:
        raise UserError(f"--workers: {text!r} is not allowed (allowed: 1 to {MOST_WORKERS})")
    return counts


def _fitted_fabric(options: Options, calibration: "Calibration", assumed: "Fabric") -> "Fabric":
    """Return the fitted network. Figures that the measurements do not tell are assumed.

    Raises:
        UserError: a figure is missing, and no option gives one to assume.
    """
    missing = []
    for figure in calibration.fit.unidentified:
        # `_adjusted` puts that one in.
        if figure == "bandwidth" and options.bandwidth:
            continue
        missing.append(figure)
    figures = " and ".join(missing)
    # The default network is a guess of ours. Only one that a person names may stand in for a
    # measurement.
    if missing and not _names_network():
        if calibration.fit.plausible:
            return calibration.fit.fabric  # `_check_decided` judges the predictions themselves
        raise UserError(
            f"--fit {options.fit}: its measurements do not tell the network's {figures}"
            " (give --network, to assume that network's)"
        )
    fabric = calibration.fit.fabric_or(assumed.network)
    if missing:
        # Tables and files show it, so that nobody takes an assumption for a measurement.
        note = (
            f"fitted, but its {figures} assumed: that of {options.network};"
            " the measurements do not tell it"
        )
        fabric = dataclasses.replace(fabric, source=note)
    return fabric


def _names_network() -> bool:
    """Return True if a person has named a network, to assume what was not measured."""
    source = click.get_current_context().get_parameter_source("network")
    return source is not ParameterSource.DEFAULT


def _check_decided(
    options: Options, calibration: "Calibration", job: "SimulatedJob", points: "Sequence[Point]"
) -> None:
    """Check that what the calibration does not tell of the network decides no prediction.

    Raises:
        UserError: networks that explain the measurements equally well disagree about a step.
    """
    from scaletrain.scaling.predict import simulate
    from scaletrain.scaling.predict.calibration import DECIDES

    undecided = []
    for point in points:

        def step_s(fabric: "Fabric", point: "Point" = point) -> float:
            on_fabric = job._replace(network=_adjusted(fabric, options))
            return simulate.simulate_one(on_fabric, point.strategy, point.workers).step_s

        low, high = calibration.fit.step_range(step_s)
        if high > DECIDES * low:
            undecided.append((point, low, high))
    if not undecided:
        return
    fewest = min(point.workers for point, _, _ in undecided)
    worst, low, high = max(undecided, key=lambda each: each[2] / each[1])
    decided = [point.workers for point in points if 1 < point.workers < fewest]
    up_to = f"--workers up to {max(decided)}, or " if decided else ""
    raise UserError(
        f"--fit {options.fit}: a step of {worst.strategy} on {worst.workers} workers takes"
        f" {1e3 * low:,.3g} to {1e3 * high:,.3g} ms: the measurements do not tell the network well"
        f" enough (allowed: {up_to}--network, to assume that network's; measure more hosts and"
        " sizes)"
    )


def _adjusted(fabric: "Fabric", options: Options) -> "Fabric":
    """Return the network with the figures that a person gives.

    Raises:
        UserError: there is a bandwidth inside hosts, but one worker a host.
    """
    from scaletrain.collectives.cost import Link
    from scaletrain.scaling.predict.network import LOCAL_LATENCY_S, parse_bandwidth

    network = fabric.network
    given = []
    if options.bandwidth:
        bandwidth = parse_bandwidth(options.bandwidth)
        network = network._replace(bandwidth_bytes_per_s=bandwidth)
        given.append("bandwidth")
    if options.latency_us is not None:
        network = network._replace(latency_s=options.latency_us / 1e6)
        given.append("latency")
    if options.half_duplex:
        network = network._replace(duplex=False)
    local = fabric.local
    workers_per_host = options.workers_per_host or fabric.workers_per_host
    if options.local_bandwidth:
        if workers_per_host == 1:
            raise UserError(
                "--local-bandwidth: there is one worker a host (give --workers-per-host, too)"
            )
        latency_s = local.latency_s if local else LOCAL_LATENCY_S
        local = Link(latency_s, parse_bandwidth(options.local_bandwidth, "--local-bandwidth"))
    source = fabric.source
    if given:
        # A reader must not take a source for that of another figure.
        source = f"{' and '.join(given)} as given; else {source}"
    return dataclasses.replace(
        fabric, network=network, source=source, workers_per_host=workers_per_host, local=local
    )


def _job(
    options: Options,
    fabric: "Fabric",
    calibration: "Calibration | None",
    layers: "ModelTimes | None",
) -> "SimulatedJob":
    """Put the job together.

    An option of its own (--model, --batch, --sample-ms) comes before the calibration and the timed
    layers.

    Raises:
        UserError: none of them gives the model's size, the batch or the computation.
    """
    from scaletrain.scaling.predict.network import Servers
    from scaletrain.scaling.predict.simulate import PRECISIONS, SimulatedJob
    from scaletrain.scaling.predict.step_time import (
        USUAL_PROFILE,
        ComputeCost,
        PassProfile,
    )

    num_bytes: float | None = None
    compute: ComputeCost | None = None
    batch = options.batch
    overlap = options.overlap
    profile = USUAL_PROFILE
    servers = Servers(fed_by_host=options.servers_fed_by == "host")
    if calibration:
        num_bytes = calibration.num_bytes
        compute = calibration.fit.compute
        batch = batch or calibration.batch_size
        # A fit without overlap has put all communication into the step, one with overlap what does
        # not hide. Its figures only predict steps of the same kind.
        if overlap is None:
            overlap = calibration.fit.overlap
        overlap = overlap and calibration.fit.overlap
        # The fitted bandwidth includes what the processes at its ends move.
        servers = servers._replace(bytes_per_s=math.inf)
    if layers:
        num_bytes = float(layers.weight_bytes)
        profile = PassProfile.of_layers(layers)
        # A fit comes from whole training steps, so it knows input, update and fixed costs as well.
        # Layers are timed at one batch size, where all of it counts as seconds a sample.
        if compute is None:
            compute = ComputeCost(layers.pass_s / layers.batch)
    if options.model:
        num_bytes = model_bytes(options.model)
    if options.precision:
        if num_bytes is None or is_size(options.model):
            raise UserError(
                "--precision: needs a model by name or --layers (a size in bytes says it already)"
            )
        num_bytes *= PRECISIONS[options.precision] / PRECISIONS["float32"]
    if options.sample_ms and options.samples_per_s:
        raise UserError("--samples-per-s: --sample-ms says the same (give one of them)")
    if options.sample_ms:
        compute = ComputeCost(options.sample_ms / 1e3)
    if options.samples_per_s:
        compute = ComputeCost(1 / options.samples_per_s)
    if num_bytes is None or batch is None or compute is None:
        required = {"--model": num_bytes, "--batch": batch, "--sample-ms": compute}
        missing = [option for option, value in required.items() if value is None]
        raise UserError(
            f"simulate: give {', '.join(missing)} (or --layers, or --fit with a calibration),"
            f" for example: {EXAMPLE}"
        )
    return SimulatedJob(
        num_bytes=num_bytes,
        batch_size=batch,
        compute=compute,
        network=fabric,
        mode=options.mode,
        overlap=overlap,
        profile=profile,
        stragglers=_stragglers(options, is_measured=calibration is not None),
        epoch_samples=options.epoch_samples,
        price_per_worker_hour=options.price,
        servers=servers,
    )


def _stragglers(options: Options, *, is_measured: bool) -> "Stragglers | None":
    """Return how workers vary; None: nobody has said or measured it."""
    from scaletrain.scaling.predict.step_time import Stragglers

    is_typed = options.straggler_variation is not None or options.slow_probability > 0
    # A calibration has the stragglers of its own measurements.
    if not (is_typed or is_measured):
        return None
    return Stragglers(
        options.straggler_variation or 0.0, options.slow_probability, options.slow_factor
    )


def is_size(text: str | None) -> bool:
    """Return True for a model that is given by its size, not by its name."""
    from scaletrain.scaling.predict.simulate import MODEL_BYTES

    return text is not None and text.lower() not in MODEL_BYTES


def model_bytes(text: str) -> float:
    """Return the size of a model's gradients: a preset's, or a size with its unit.

    >>> model_bytes("30.4MB")
    30400000.0

    Raises:
        UserError: the text is neither.
    """
    from scaletrain.errors import unknown
    from scaletrain.scaling.predict.simulate import MODEL_BYTES

    # Presets first: none of them reads as a size.
    if not is_size(text):
        return MODEL_BYTES[text.lower()]
    with contextlib.suppress(pydantic.ValidationError):
        size = pydantic.TypeAdapter(pydantic.ByteSize).validate_python(text)
        # A size of 0 falls through to the same message as one that does not parse.
        if size > 0:
            return float(size)
    raise unknown("--model", text, [*MODEL_BYTES, "bytes such as 30.4MB"])
