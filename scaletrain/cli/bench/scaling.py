"""How fast N workers are, for each exchange; what is lost, and to what: table, report.json, report.html."""

import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from scaletrain.cli.report import baseline_option

if TYPE_CHECKING:
    from scaletrain.scaling.measure.sweep import Sweep


def _numbers(context: click.Context, parameter: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        values = tuple(dict.fromkeys(int(word) for word in text.split(",")))
    except ValueError:
        raise click.BadParameter(f"{text!r}: expected numbers with commas, such as 1,2,4") from None
    if min(values) < 1:
        raise click.BadParameter(f"{text!r}: worker counts start at 1")
    return values


def _names(context: click.Context, parameter: click.Parameter, text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


@click.command("scaling")
@click.argument(
    "configs", metavar="CONFIG...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
@click.option(
    "--workers", default="1,2", show_default=True, callback=_numbers, help="Worker counts."
)
@click.option(
    "--exchange",
    "exchanges",
    default="native",
    show_default=True,
    callback=_names,
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
    help="Measure every cell at each value, such as batch_size=64,128 or launcher.bandwidth=1Gbit,100Mbit; repeatable.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="Compute threads a worker, the same in every cell [default: cores / most workers].",
)
@click.option(
    "--bind/--no-bind",
    default=None,
    help="Keep each worker on its own cores [default: where the launcher is local and the cores suffice].",
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
    "--trace",
    is_flag=True,
    help="Also record and write a Chrome trace of each cell's first repeat.",
)
@click.option("--dry-run", is_flag=True, help="Print the command of every cell, and start nothing.")
def command(
    configs: tuple[Path, ...], workers: tuple[int, ...], exchanges: tuple[str, ...],
    mode: str, repeats: int, out: Path | None, launcher: str | None,
    settings: tuple[str, ...], vary: tuple[str, ...], threads: int | None, bind: bool | None, split: bool, cell_timeout_s: float,
    baseline: Path | None, trace: bool, dry_run: bool,
) -> None:  # fmt: skip
    """Train the job of CONFIG on each number of workers under each exchange; say how it scales and what limits it."""
    from scaletrain.run.atomic import write_json
    from scaletrain.scaling.measure import sweep
    from scaletrain.scaling.show import publish

    plan = sweep.plan(
        configs, workers, exchanges, mode=mode, repeats=repeats, settings=settings, vary=dict(_vary(text) for text in vary),
        launcher=launcher, threads=threads, bind=bind, split=split, cell_timeout_s=cell_timeout_s,
    )  # fmt: skip
    if baseline:
        _check_baseline(baseline, plan)
    out = out or Path("runs") / f"scaling-{time.strftime('%Y%m%d-%H%M%S')}"
    cells = plan.cells()
    if dry_run:
        for cell in cells:
            click.echo(shlex.join(plan.command(cell, sweep.run_dir(out, cell, 0))))
        return
    sweep.claim(out, plan)
    write_json(
        out / "header.json", plan.header() | {"argv": shlex.join(["scaletrain", *sys.argv[1:]])}
    )
    references = sum(cell.reference for cell in cells)
    asked = len(cells) - references
    click.echo(
        f"{asked} cell{'s' * (asked != 1)} and {references} short reference{'s' * (references != 1)},"
        f" {repeats} repeat{'s' * (repeats > 1)} each -> {out}"
    )
    click.echo(f"{plan.threads} thread{'s' * (plan.threads > 1)} a worker{_cores(plan)}")
    sweep.run(plan, out, click.echo, trace=trace)
    publish.publish_sweep(out, trace=trace, console=publish.terminal())
    if baseline:
        publish.compare_and_exit(out / "report.json", baseline)


def _cores(plan: "Sweep") -> str:
    """On which cores each rank is kept, where workers are bound."""
    if not plan.bind:
        return ""
    from scaletrain.host.cores import cores_of

    ranks = (
        f"{rank} on {','.join(map(str, cores_of(rank, plan.threads)))}"
        for rank in range(max(plan.workers))
    )
    return f", bound to cores: rank {', '.join(ranks)}"


def _check_baseline(path: Path, plan: "Sweep") -> None:
    """Raises ``UserError``, before anything is measured, if nothing that is planned can be compared with this report."""
    from scaletrain.errors import UserError
    from scaletrain.scaling.explain import compare
    from scaletrain.scaling.show import publish

    rows = [
        {**cell._asdict(), "batch_size": cell.batch_size * (1 if plan.mode == "strong" else cell.workers),
         "variant": dict(cell.variant), "runs": [], "failures": []}
        for cell in plan.cells() if not cell.reference
    ]  # fmt: skip
    try:
        before = publish.read_report(path)
    except UserError as error:
        raise UserError(f"--baseline {error} (allowed: a report.json of `bench scaling`)") from None
    try:
        compare.compare({"header": {"mode": plan.mode}, "rows": rows}, before)
    except (KeyError, TypeError):
        raise UserError(
            f"--baseline {path}: not a scaling report (allowed: a report.json of `bench scaling`)"
        ) from None


def _vary(text: str) -> tuple[str, list[Any]]:
    from scaletrain.config import parse_setting

    key, equals, values = text.partition("=")
    if not equals or not key or not values:
        raise click.BadParameter(f"{text!r}: expected KEY=V1,V2", param_hint="--vary")
    return key.strip(), [parse_setting(f"{key}={value}")[1] for value in values.split(",")]
