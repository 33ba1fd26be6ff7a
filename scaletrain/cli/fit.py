"""``scaletrain fit``: calibrate the models of computation and network from a report."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from scaletrain.errors import UserError

if TYPE_CHECKING:
    from scaletrain.scaling.predict.calibration import Estimate, Fit


@click.command()
@click.argument("path", metavar="REPORT", type=click.Path(path_type=Path, exists=True))
@click.option(
    "--model",
    help="Whose gradients: a preset (nin, alexnet, ...) or a size, such as 30.4MB"
    " [default: as the report says].",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Where the calibration goes [default: fit.json beside the report].",
)
@click.option(
    "--max-workers",
    type=click.IntRange(min=2),
    help="Calibrate on rows up to this number only; the others test the prediction.",
)
@click.option("--no-overlap", is_flag=True, help="Communication does not hide behind backward.")
def command(
    path: Path, model: str | None, out: Path | None, max_workers: int | None, no_overlap: bool
) -> None:
    """Calibrate the models of computation and network from REPORT.

    REPORT is a report.json or its directory. The residuals and intervals are shown.

    \b
    Examples:
      scaletrain fit runs/mine
      scaletrain fit runs/mine/report.json --max-workers 4 --out four.json
    """
    from scaletrain.cli.simulate import model_bytes
    from scaletrain.scaling.predict import fit as fits
    from scaletrain.scaling.predict.calibration import Calibration
    from scaletrain.scaling.show import publish

    if path.is_dir():
        path = path / "report.json"
    report = publish.read_report(path)
    # A cell whose repeats all failed stands in the report as well, without figures.
    rows = [row for row in report.rows if row.runs]
    if not rows:
        raise UserError(f"{path}: nothing in it was measured")
    if not fits.alike_but_for_exchange(rows):
        raise UserError(
            f"{path}: its rows are of several configs or --vary values, which one calibration"
            " cannot explain (allowed: a report of one job whose exchanges and workers differ)"
        )
    if model is not None:
        num_bytes = model_bytes(model)
    elif rows[0].gradient_bytes is not None:
        num_bytes = float(rows[0].gradient_bytes)
    else:
        raise UserError(
            "fit: the report does not say how many bytes the gradients have (give --model)"
        )
    fitted = fits.fit_report(report, num_bytes, overlap=not no_overlap, max_workers=max_workers)
    out = out or path.with_name("fit.json")
    # The job's size and batch go along: `simulate --fit` then needs no --model and no --batch.
    Calibration(fitted, num_bytes, rows[0].batch_size).write(out)
    _show(fitted)
    click.echo(f"written: {out}")


def _show(fitted: "Fit") -> None:
    """Print the fitted figures, and how far each measurement is from them."""
    sample_ms = 1e3 * fitted.compute.sample_s
    step_ms = 1e3 * fitted.compute.fixed_s
    click.echo(f"compute: {sample_ms:.4g} ms a sample + {step_ms:.4g} ms a step")
    click.echo(f"latency: {_in_words(fitted.latency_s, 'us', scale=1e6)}")
    click.echo(f"bandwidth: {_in_words(fitted.bandwidth_bytes_per_s, 'MB/s', scale=1e-6)}")
    if fitted.workers_per_host > 1:
        click.echo(
            f"hosts: {fitted.workers_per_host} workers each; inside a host {_inside(fitted)}"
        )
    for residual in fitted.residuals:
        click.echo(
            f"  {residual.exchange:<18} {residual.workers:>4} workers:"
            f" measured {1e3 * residual.measured_s:.2f} ms, residual {residual.error:+.1%}"
        )


def _inside(fitted: "Fit") -> str:
    """Return the rate between workers of a host in words."""
    from scaletrain.scaling.predict.calibration import Estimate

    bandwidths = []
    for network in [fitted.fabric, *map(fitted.fabric_on, fitted.plausible)]:
        bandwidths.append(network.local_link.bandwidth_bytes_per_s)
    value, low, high = bandwidths[0], min(bandwidths), max(bandwidths)
    # Nobody knows an upper end where no measured row lies on one host.
    return _in_words(Estimate(value, low, high if high < 1e12 else None), "MB/s", scale=1e-6)


def _in_words(estimate: "Estimate", unit: str, scale: float) -> str:
    # A fit returns a number in any case. One that no measurement depends on must not be shown.
    if not estimate.is_identified:
        bounds = []
        if estimate.low is not None:
            bounds.append(f"at least {scale * estimate.low:.3g} {unit}")
        if estimate.high is not None:
            bounds.append(f"at most {scale * estimate.high:.3g} {unit}")
        known = f"{' and '.join(bounds)}, no more is " if bounds else "not "
        return (
            f"{known}told by these measurements (more worker counts, exchanges or repeats may tell"
            " it)"
        )
    assert estimate.low is not None and estimate.high is not None
    low = scale * estimate.low
    high = scale * estimate.high
    return f"{scale * estimate.value:.4g} {unit} (95 %: {low:.4g} to {high:.4g})"
