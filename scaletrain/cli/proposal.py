"""``scaletrain proposal``: a page for a request for computing time."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from scaletrain.cli.report import Sources
from scaletrain.errors import UserError, unknown

if TYPE_CHECKING:
    from scaletrain.scaling.explain.proposal import Request
    from scaletrain.scaling.model import Report

FORMATS = ("html", "md", "pdf")


@click.command()
@click.argument(
    "directories",
    metavar="DIR...",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
)
@click.option(
    "--samples",
    type=click.FloatRange(min=1),
    required=True,
    help="Samples that one run trains on, all workers together: epochs x samples of the data set.",
)
@click.option(
    "--runs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many such runs are asked for.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Workers of a run [default: the knee, beyond which more of them do not pay].",
)
@click.option(
    "--workers-per-node",
    type=click.IntRange(min=1),
    help="Workers that share a node [default: the most that shared a host].",
)
@click.option("--exchange", help="What gradients travel by [default: the fastest measured].")
@click.option(
    "--mode",
    type=click.Choice(["strong", "weak"]),
    help="Which scaling gives the node hours [default: strong if it was measured].",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where the page goes [default: the first DIR].",
)
@click.option(
    "--format", "formats", default="html,md,pdf", show_default=True, help="Of html,md,pdf."
)
def command(
    directories: tuple[Path, ...],
    samples: float,
    runs: int,
    workers: int | None,
    workers_per_node: int | None,
    exchange: str | None,
    mode: str | None,
    out: Path | None,
    formats: str,
) -> None:
    """Write one page to request computing time with.

    DIR are sweeps of strong and weak scaling. The page has both with their bands, the knee, node
    hours, the environment, and how to reproduce it. Figures are measured; those of other numbers of
    workers are predicted, as far as the fit allows it, and say so. Nothing is trained.

    \b
    Examples:
      scaletrain proposal runs/strong runs/weak --samples 1.15e8 --runs 20
      scaletrain proposal runs/strong --samples 1.15e8 --workers 64 --workers-per-node 4
    """
    from scaletrain.scaling.explain import proposal as proposals

    request = proposals.Request(samples, runs, workers, workers_per_node, exchange, mode)
    _write(directories, request, out or directories[0], formats)


def _write(directories: tuple[Path, ...], request: "Request", out: Path, formats: str) -> None:
    from scaletrain.scaling.explain import proposal as proposals
    from scaletrain.scaling.show import proposal as pages

    wanted = [word.strip() for word in formats.split(",") if word.strip()]
    for form in wanted:
        if form not in FORMATS:
            raise unknown("--format", form, FORMATS)
    made = proposals.of(_reports(Sources.of(directories)), request)
    again = _command(directories, request)
    out.mkdir(parents=True, exist_ok=True)
    written = []
    if "html" in wanted:
        written.append(out / "proposal.html")
        written[-1].write_text(pages.html(made, again), encoding="utf-8")
    if "pdf" in wanted:
        written.append(out / "proposal.pdf")
        written[-1].write_bytes(pages.pdf(made, again))
    if "md" in wanted:
        written.append(out / "proposal.md")
        written[-1].write_text(pages.markdown(made, again), encoding="utf-8")
        for name, image in pages.images(made).items():
            written.append(out / name)
            written[-1].write_bytes(image)
    for sentence in pages.request(made):
        click.echo(sentence)
    for scaling in made.scalings:
        click.echo(f"{scaling.mode} scaling, knee: {scaling.knee.sentence}")
    click.echo(made.scalings[0].predicted)
    click.echo(f"written: {', '.join(map(str, written))}")


def _reports(sources: Sources) -> "dict[str, Report]":
    """Return the reports by mode. Sweeps of one mode make one report together."""
    from scaletrain.scaling.explain import report as reports
    from scaletrain.scaling.measure import sweep
    from scaletrain.scaling.show import publish

    sweeps: dict[str, list[Path]] = {}
    for directory in sources.sweeps:
        sweeps.setdefault(sweep.read(directory).mode, []).append(directory)
    found = [reports.of_sweep(*outs) for outs in sweeps.values()]
    found += [publish.read_report(directory / "report.json") for directory in sources.reports]
    if sources.runs:
        found.append(reports.of_runs(sources.runs))
    by_mode: dict[str, Report] = {}
    for report in found:
        mode = report.header.mode or "strong"
        if mode in by_mode:
            raise UserError(
                f"DIR: two reports of {mode} scaling (allowed: one of strong and one of weak"
                " scaling, or the directories of sweeps)"
            )
        by_mode[mode] = report
    return by_mode


def _command(directories: tuple[Path, ...], request: "Request") -> str:
    """Return the command that makes the page again."""
    words = ["scaletrain", "proposal", *map(str, directories)]
    options = {
        "--samples": f"{request.samples:.0f}",
        "--runs": request.runs,
        "--workers": request.workers,
        "--workers-per-node": request.workers_per_node,
        "--exchange": request.exchange,
        "--mode": request.mode,
    }
    for option, value in options.items():
        if value is not None:
            words += [option, str(value)]
    return shlex.join(words)
