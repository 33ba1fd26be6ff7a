"""The verbs ``report``, ``simulate`` and ``fit``, as click commands. Nothing here imports torch; figures need it as little."""

from pathlib import Path

import click
from click.core import ParameterSource

EXAMPLE = "scaletrain simulate --model nin --batch 1024 --sample-ms 8.3 --network gemini"

# Of ``report`` and of ``bench scaling``.
baseline_option = click.option(
    "--baseline",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A report.json to compare with; exit code 2 when a cell got slower beyond its intervals.",
)


@click.command("report")
@click.argument(
    "directories",
    metavar="DIR...",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the report goes [default: the first DIR].",
)
@click.option(
    "--format",
    "formats",
    default="html",
    show_default=True,
    help="Of html,md,csv,svg,png; report.json is always written.",
)
@baseline_option
@click.option(
    "--trace",
    is_flag=True,
    help="Also write Chrome traces of all ranks (runs with trace: true recorded the most).",
)
def report(
    directories: tuple[Path, ...],
    out: Path | None,
    formats: str,
    baseline: Path | None,
    trace: bool,
) -> None:
    """Render reports again, from a sweep's directories or from single run directories. Trains nothing, needs no torch."""
    from scaletrain.errors import UserError
    from scaletrain.scaling.explain import report as reports
    from scaletrain.scaling.show import publish
    from scaletrain.scaling.show import trace as traces

    wanted = [word.strip() for word in formats.split(",") if word.strip()]
    console = publish.terminal()
    sweeps = [d for d in directories if (d / "sweep.json").exists()]
    runs = [d for d in directories if d not in sweeps and (d / "summary.json").exists()]
    finished = [
        d for d in directories if d not in sweeps and d not in runs and (d / "report.json").exists()
    ]
    neither = [d for d in directories if d not in (*sweeps, *runs, *finished)]
    if neither:
        raise UserError(
            f"{neither[0]}: neither a sweep (sweep.json), a finished run (summary.json) nor a report (report.json)"
        )
    if out and len(sweeps) + len(finished) + bool(runs) > 1:
        raise UserError(
            f"--out {out}: these directories make several reports (allowed: one sweep, or single runs)"
        )
    last = None
    for directory in sweeps:
        last = out or directory
        publish.publish(reports.of_sweep(directory), last, formats=wanted, console=console)
        if trace:
            publish.write_traces(directory)
    for directory in finished:
        last = out or directory
        publish.publish(
            publish.read_report(directory / "report.json"), last, formats=wanted, console=console
        )
    if runs:
        last = out or runs[0]
        publish.publish(reports.of_runs(runs), last, formats=wanted, console=console)
        if trace:
            for directory in runs:
                traces.write(directory, directory / "trace.json")
    if baseline and last:
        publish.compare_and_exit(last / "report.json", baseline)


@click.command("fit")
@click.argument("path", metavar="REPORT", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--model",
    "model",
    help="Whose gradients: a preset (nin, alexnet, ...) or bytes, such as 30.4MB [default: as the report says].",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the calibration goes [default: fit.json beside the report].",
)
@click.option(
    "--max-workers",
    type=click.IntRange(min=2),
    help="Calibrate on rows up to here only; the others test the prediction.",
)
@click.option("--no-overlap", is_flag=True, help="Communication does not hide behind backward.")
def fit(
    path: Path, model: str | None, out: Path | None, max_workers: int | None, no_overlap: bool
) -> None:
    """Calibrate the models of computation and network from REPORT (a report.json, or its directory); show the residuals and intervals."""
    from scaletrain.errors import UserError
    from scaletrain.run.atomic import write_json
    from scaletrain.scaling.predict import fit as fits
    from scaletrain.scaling.show import publish

    path = path / "report.json" if path.is_dir() else path
    report = publish.read_report(path).to_json()
    rows = [row for row in report["rows"] if row["runs"]]
    if not rows:
        raise UserError(f"{path}: nothing in it was measured")
    if not fits.alike_but_for_exchange(rows):
        raise UserError(
            f"{path}: its rows are of several configs or --vary values, which one calibration cannot explain"
            " (allowed: a report of one job whose exchanges and workers differ)"
        )
    known = rows[0]["gradient_bytes"]
    if model is None and known is None:
        raise UserError(
            "fit: the report does not say how many bytes the gradients have (give --model)"
        )
    num_bytes = float(known) if model is None else _model_bytes(model)
    made = fits.fit_report(report, num_bytes, overlap=not no_overlap, max_workers=max_workers)
    out = out or path.with_name("fit.json")
    write_json(out, made.as_json() | {"num_bytes": num_bytes, "batch_size": rows[0]["batch_size"]})
    click.echo(
        f"compute: {1e3 * made.compute.sample_s:.4g} ms a sample + {1e3 * made.compute.fixed_s:.4g} ms a step"
    )
    for label, parameter, unit, scale in (
        ("latency", made.latency_s, "us", 1e6),
        ("bandwidth", made.bandwidth_bytes_per_s, "MB/s", 1e-6),
    ):
        if not parameter.is_told or parameter.low is None or parameter.high is None:
            click.echo(
                f"{label}: not told by these measurements (more worker counts, exchanges or repeats may tell it)"
            )
            continue
        low, high = scale * parameter.low, scale * parameter.high
        click.echo(f"{label}: {scale * parameter.value:.4g} {unit} (95 %: {low:.4g} to {high:.4g})")
    for r in made.residuals:
        error = r["predicted_s"] / r["measured_s"] - 1
        click.echo(
            f"  {r['exchange']:<18} {r['workers']:>4} workers: measured {1e3 * r['measured_s']:.2f} ms, residual {error:+.1%}"
        )
    click.echo(f"written: {out}")


@click.command("simulate")
@click.option(
    "--model",
    "model",
    help="A preset (lenet, squeezenet, googlenet, nin, alexnet, vgg16, vgg19, resnet50) or bytes, such as 100MB.",
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
    "--layers",
    "layers",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="What `bench model --out` wrote, in place of --model and --sample-ms: when each layer's gradient can leave is then known, too.",
)
@click.option(
    "--network",
    "network",
    default="10gbit",
    show_default=True,
    help="A known network: see --networks.",
)
@click.option("--bandwidth", help="Instead of the network's: such as 25Gbit.")
@click.option(
    "--fit",
    "fitted",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A calibration (fit.json) in place of --sample-ms and of --network, but for what it does not tell.",
)
@click.option("--half-duplex", is_flag=True, help="Links do not send while they receive.")
@click.option(
    "--workers",
    default="1,2,4,8,16,32,64,128",
    show_default=True,
    help="Worker counts, up to 4096.",
)
@click.option(
    "--strategy",
    "names",
    help="Such as ring,tree,server,server:4,server+3 (backup workers) [default: all].",
)
@click.option(
    "--mode",
    type=click.Choice(["strong", "weak"]),
    default="strong",
    show_default=True,
    help="Global batch fixed, or growing with the workers.",
)
@click.option("--no-overlap", is_flag=True, help="Communication does not hide behind backward.")
@click.option(
    "--straggler-variation",
    type=click.FloatRange(min=0),
    default=0.0,
    help="Standard deviation / mean of a worker's computation (lognormal).",
)
@click.option(
    "--slow-probability",
    type=click.FloatRange(min=0, max=1),
    default=0.0,
    help="Of a worker's step being slow.",
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
    help="Per machine (worker, backup worker, server) and hour: shows the cost of an epoch.",
)
@click.option("--far", is_flag=True, help="Predict beyond 8 times the workers that --fit measured.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Also write simulation.json, .csv, .svg and .png there.",
)
@click.option(
    "--networks", is_flag=True, help="List the known networks with their sources, and end."
)
def simulate(
    model: str | None, batch: int | None, sample_ms: float | None, layers: Path | None, network: str, bandwidth: str | None,
    fitted: Path | None, half_duplex: bool, workers: str,
    names: str | None, mode: str, no_overlap: bool, straggler_variation: float, slow_probability: float, slow_factor: float,
    epoch_samples: int, price: float | None, far: bool, out: Path | None, networks: bool,
) -> None:  # fmt: skip
    """Predict step time, speed-up and cost of every strategy at up to 4,096 workers, from the schedules themselves. Starts nothing."""
    import dataclasses
    import json

    from scaletrain.errors import UserError
    from scaletrain.scaling.predict import fit as fits
    from scaletrain.scaling.predict import network as net
    from scaletrain.scaling.predict import simulate
    from scaletrain.scaling.predict.step_time import USUAL, Compute, Profile, Stragglers
    from scaletrain.scaling.show import publish

    if networks:
        for name, preset in net.PRESETS.items():
            n = preset.network
            click.echo(
                f"{name:<16} {n.bandwidth_bytes_per_s / 1e6:>8,.0f} MB/s {1e6 * n.latency_s:>6.1f} us  {preset.source}"
            )
        return
    try:
        counts = sorted({int(word) for word in workers.split(",")})
    except ValueError:
        raise UserError(
            f"--workers: {workers!r} is not allowed (allowed: numbers with commas, such as 1,8,64)"
        ) from None
    if counts[0] < 1 or counts[-1] > 4096:
        raise UserError(f"--workers: {workers!r} is not allowed (allowed: 1 to 4096)")
    on, num_bytes, compute, overlap, measured = (
        net.preset(network),
        None,
        None,
        not no_overlap,
        None,
    )
    if fitted:
        try:
            value = json.loads(fitted.read_text(encoding="utf-8"))
            made, num_bytes, batch = (
                fits.Fit.from_json(value),
                value["num_bytes"],
                batch or value["batch_size"],
            )
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"--fit {fitted}: no calibration (allowed: what `scaletrain fit` wrote, such as fit.json)"
            ) from None
        made.check_reach(counts[-1], far)
        untold = [name for name in made.untold if not (name == "bandwidth" and bandwidth)]
        chosen = (
            click.get_current_context().get_parameter_source("network")
            is not ParameterSource.DEFAULT
        )
        if untold and not chosen:
            raise UserError(
                f"--fit {fitted}: its measurements do not tell the network's {' and '.join(untold)}"
                " (give --network, to assume that network's)"
            )
        on = made.network_or(on.network)
        if untold:
            source = f"fitted, but its {' and '.join(untold)} assumed: that of {network}; the measurements do not tell it"
            on = dataclasses.replace(on, source=source)
        compute, overlap, measured = made.compute, made.overlap and overlap, made.max_workers
    if bandwidth:
        on = dataclasses.replace(
            on, network=on.network._replace(bandwidth_bytes_per_s=net.parse_bandwidth(bandwidth))
        )
    if half_duplex:
        on = dataclasses.replace(on, network=on.network._replace(duplex=False))
    profile = USUAL
    if layers:
        try:
            timed = json.loads(layers.read_text(encoding="utf-8"))
            profile, num_bytes = Profile.of_layers(timed), float(timed["weight_bytes"])
            compute = compute or Compute(
                (timed["forward_s"] + timed["backward_s"]) / timed["header"]["batch"]
            )
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"--layers {layers}: no layers (allowed: what `scaletrain bench model --out` wrote)"
            ) from None
    if model:
        num_bytes = _model_bytes(model)
    if sample_ms:
        compute = Compute(sample_ms / 1e3)
    missing = [
        o
        for o, v in (("--model", num_bytes), ("--batch", batch), ("--sample-ms", compute))
        if v is None
    ]
    if missing or num_bytes is None or batch is None or compute is None:
        raise UserError(
            f"simulate: give {', '.join(missing)} (or --layers, or --fit with a calibration), for example: {EXAMPLE}"
        )
    job = simulate.Job(
        num_bytes, batch, compute, on, mode, overlap, profile, Stragglers(straggler_variation, slow_probability, slow_factor), epoch_samples, price,
    )  # fmt: skip
    wanted = [word.strip() for word in names.split(",")] if names else simulate.strategies()
    points = simulate.simulate(job, counts, wanted)
    publish.show_simulation(job, points, publish.terminal(), counts)
    if out:
        publish.write_simulation(out, job, points, measured)
        click.echo(f"written: {out / 'simulation.json'}")


def _model_bytes(text: str) -> float:
    """A preset's name or a size with its unit."""
    from scaletrain.errors import unknown
    from scaletrain.scaling.predict.simulate import MODEL_BYTES

    if text.lower() in MODEL_BYTES:
        return MODEL_BYTES[text.lower()]
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("KB", 1e3), ("B", 1.0), ("", 1.0)):
        if text.endswith(unit):
            try:
                value = float(text.removesuffix(unit)) * scale
            except ValueError:
                break
            if value > 0:
                return value
    raise unknown("--model", text, [*MODEL_BYTES, "bytes such as 30.4MB"])
