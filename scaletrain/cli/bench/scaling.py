"""How fast N workers are under each exchange, and why they are not faster."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from scaletrain.cli.options import directory_name, names, numbers
from scaletrain.cli.report import baseline_option
from scaletrain.units import plural

if TYPE_CHECKING:
    from scaletrain.scaling.measure import sweep as sweeps
    from scaletrain.scaling.measure.sweep import Sweep
    from scaletrain.scaling.model import Report, ReportHeader


def _varied(
    context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]
) -> dict[str, list[Any]]:
    """Return the values of each varied key, from texts such as ``batch_size=64,128``."""
    from scaletrain.config import parse_setting

    varied = {}
    for text in texts:
        key, equals, values = text.partition("=")
        if not equals or not key or not values:
            raise click.BadParameter(f"{text!r}: expected KEY=V1,V2", param_hint="--vary")
        parsed = [parse_setting(f"{key}={value}") for value in values.split(",")]
        varied[key.strip()] = [value for _, value in parsed]
    return varied


@click.command("scaling")
@click.argument(
    "configs", metavar="CONFIG...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option(
    "--workers", default="1,2", show_default=True, callback=numbers, help="Worker counts."
)
@click.option(
    "--exchange",
    "exchanges",
    default="native",
    show_default=True,
    callback=names,
    help="Exchanges, such as native,ring,none.",
)
@click.option(
    "--mode",
    type=click.Choice(["strong", "weak"]),
    default="strong",
    show_default=True,
    help="Global batch fixed, or growing with the workers.",
)
@click.option(
    "--repeats",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Runs of each cell, interleaved.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where everything goes [default: runs/scaling-TIME]. Given again: only missing cells run.",
)
@click.option(
    "--launcher",
    help="What starts the workers (see `scaletrain list`); rehearsal: emulated hosts and links.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a key of the config in every cell; repeatable.",
)
@click.option(
    "--vary",
    multiple=True,
    metavar="KEY=V1,V2",
    callback=_varied,
    help="Measure every cell at each value, such as batch_size=64,128 or"
    " launcher.bandwidth=1Gbit,100Mbit; repeatable.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Compute threads a worker, the same in every cell [default: cores / most workers].",
)
@click.option(
    "--bind/--no-bind",
    default=None,
    help="Keep each worker on its own cores"
    " [default: where the launcher is local and the cores suffice].",
)
@click.option(
    "--split/--no-split",
    default=True,
    show_default=True,
    help="Also run the short reference cells that the split of lost time needs.",
)
@click.option(
    "--cell-timeout",
    "cell_timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=600.0,
    show_default=True,
    help="Seconds a cell may take.",
)
@baseline_option
@click.option(
    "--against",
    metavar="COMMIT|DIR",
    help="Run each repeat also with another version of scaletrain, in turns, and compare; exit"
    " code 2 when a cell got slower beyond its intervals.",
)
@click.option(
    "--trace",
    is_flag=True,
    help="Also record and write a Chrome trace of each cell's first repeat.",
)
@click.option("--cold", is_flag=True, help="Let each worker of each run import torch itself.")
@click.option("--dry-run", is_flag=True, help="Print the command of every cell, and start nothing.")
def command(
    out: Path | None,
    baseline: Path | None,
    against: str | None,
    trace: bool,
    dry_run: bool,
    **request: Any,
) -> None:
    """Train CONFIG's job on each number of workers, and explain how it scales.

    \b
    Examples:
      scaletrain bench scaling examples/digits.yaml --workers 1,2 --exchange native,ring,none
      scaletrain bench scaling examples/digits.yaml --workers 1,2 --against main --repeats 10
    """
    from scaletrain.errors import UserError
    from scaletrain.run import claim
    from scaletrain.scaling.measure import sweep
    from scaletrain.scaling.show import publish

    # All other options have the names of the request's fields.
    plan = sweep.plan(sweep.Request(**request))
    if baseline and against:
        raise UserError("--against and --baseline are two ways to compare (allowed: one of them)")
    if baseline:
        before = _check_baseline(baseline, plan)
        click.echo(_power(plan, before))
    if against:
        click.echo(_power(plan, None))
    directory = out or directory_name("scaling")
    if dry_run:
        for cell in plan.cells():
            click.echo(shlex.join(plan.command(cell, sweep.run_dir(directory, cell, 0))))
        return
    out = out or claim.new_directory(directory)
    with claim.in_use(out, "--out"):
        sweep.claim(out, plan)
        header = dataclasses.replace(plan.header(), argv=shlex.join(["scaletrain", *sys.argv[1:]]))
        sweep.write_header(out, header)
        click.echo(f"{_cells(plan)}, {plural(plan.repeats, 'repeat')} each -> {out}")
        click.echo(f"{plural(plan.threads, 'thread')} a worker{_cores(plan)}")
        other = None
        if against:
            other = _claim_against(against, plan, out, header)
        sweep.run(plan, out, click.echo, trace=trace, against=other)
        publish.publish_sweep(out, trace=trace, console=publish.terminal())
        if other:
            publish.publish_sweep(other.out)
            baseline = other.out / "report.json"
    if baseline:
        publish.compare_and_exit(out / "report.json", baseline)


def _claim_against(text: str, plan: "Sweep", out: Path, header: "ReportHeader") -> "sweeps.Against":
    """Make the directory of the other version's runs, below that of ours.

    The headers of both say that the runs took turns.

    Raises:
        UserError: ``text`` names no version.
    """
    from scaletrain.scaling.measure import against, sweep

    directory = out / "against"
    version = against.find(text, out / "against-source")
    # References are for the split of this version's lost time.
    sweep.claim(directory, dataclasses.replace(plan, split=False))
    ours = dataclasses.replace(header, turns=header.created, source="this version")
    sweep.write_header(out, ours)
    sweep.write_header(directory, dataclasses.replace(ours, source=version.name))
    return sweep.Against(version, directory)


def _power(plan: "Sweep", before: "Report | None") -> str:
    """Return how many repeats show which slowdown. ``before``: None if both sides take turns."""
    from scaletrain.scaling.explain import compare

    cells = [cell for cell in plan.cells() if not cell.reference]
    return compare.power_in_words(plan.repeats, len(cells), in_turns=before is None, before=before)


def _cells(plan: "Sweep") -> str:
    """Return how many cells there are, of both kinds."""
    cells = plan.cells()
    references = sum(cell.reference for cell in cells)
    asked_for = len(cells) - references
    return f"{plural(asked_for, 'cell')} and {plural(references, 'short reference')}"


def _cores(plan: "Sweep") -> str:
    """Return on which cores each rank is kept; empty if workers are not bound."""
    if not plan.bind:
        return ""
    from scaletrain.host.cores import cores_of

    ranks = []
    for rank in range(max(plan.workers)):
        cores = ",".join(str(core) for core in cores_of(rank, plan.threads, max(plan.workers)))
        ranks.append(f"{rank} on {cores}")
    return f", bound to cores: rank {', '.join(ranks)}"


def _check_baseline(path: Path, plan: "Sweep") -> "Report":
    """Return the report of a baseline.

    Raises:
        UserError: nothing that is planned can be compared with it.
    """
    from scaletrain.errors import UserError
    from scaletrain.scaling.explain import compare
    from scaletrain.scaling.show import publish

    allowed = "(allowed: a report.json of `bench scaling`)"
    try:
        before = publish.read_report(path)
    except UserError as error:
        raise UserError(f"--baseline {error} {allowed}") from None
    if before.header.mode is None:
        raise UserError(f"--baseline {path}: not a scaling report {allowed}")
    compare.compare(_empty_report(plan), before)
    return before


def _empty_report(plan: "Sweep") -> "Report":
    """Return the report that the sweep will make, before anything is measured."""
    from scaletrain.scaling.model import Report, ReportHeader, Row

    rows = []
    for cell in plan.cells():
        if not cell.reference:
            batch_size = (
                cell.batch_size if plan.mode == "strong" else cell.batch_size * cell.workers
            )
            variant = dict(cell.variant)
            rows.append(Row(cell.config, cell.exchange, cell.workers, batch_size, variant))
    return Report(version=0, header=ReportHeader(mode=plan.mode), summary="", rows=tuple(rows))
