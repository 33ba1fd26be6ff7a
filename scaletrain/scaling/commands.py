"""The verbs ``report``, ``simulate`` and ``fit``, as click commands. Nothing here imports torch; figures need it as little."""

from pathlib import Path

import click


@click.command("report")
@click.argument(
    "directories",
    metavar="DIR...",
    nargs=-1,
    required=True,
    type=click.Path(path_type=Path, exists=True, file_okay=False),
)
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), help="Where the report goes [default: the first DIR]."
)
@click.option(
    "--format",
    "formats",
    default="html",
    show_default=True,
    help="Of html,md,csv,svg,png; report.json is always written.",
)
@click.option(
    "--baseline",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A report.json to compare with; exit code 2 when a cell got slower beyond its intervals.",
)
@click.option("--trace", is_flag=True, help="Also write Chrome traces of all ranks.")
def report(directories: tuple[Path, ...], out: Path | None, formats: str, baseline: Path | None, trace: bool) -> None:
    """Render reports again, from a sweep's directories or from single run directories. Trains nothing, needs no torch."""
    from scaletrain.errors import UserError
    from scaletrain.metrics import write_json
    from scaletrain.scaling import publish
    from scaletrain.scaling import report as reports
    from scaletrain.scaling import trace as traces

    wanted = [word.strip() for word in formats.split(",") if word.strip()]
    console = publish.terminal()
    sweeps = [d for d in directories if (d / "sweep.json").exists()]
    runs = [d for d in directories if d not in sweeps and (d / "summary.json").exists()]
    finished = [d for d in directories if d not in sweeps and d not in runs and (d / "report.json").exists()]
    neither = [d for d in directories if d not in (*sweeps, *runs, *finished)]
    if neither:
        raise UserError(
            f"{neither[0]}: neither a sweep (sweep.json), a finished run (summary.json) nor a report (report.json)"
        )
    if out and len(sweeps) + len(finished) + bool(runs) > 1:
        raise UserError(f"--out {out}: these directories make several reports (allowed: one sweep, or single runs)")
    last = None
    for directory in sweeps:
        last = out or directory
        publish.publish(reports.of_sweep(directory), last, formats=wanted, console=console)
        if trace:
            publish.write_traces(directory)
    for directory in finished:
        last = out or directory
        publish.publish(publish.read_report(directory / "report.json"), last, formats=wanted, console=console)
    if runs:
        last = out or runs[0]
        publish.publish(reports.of_runs(runs), last, formats=wanted, console=console)
        if trace:
            for directory in runs:
                write_json(directory / "trace.json", traces.of_run(directory))
    if baseline and last:
        publish.compare_and_exit(last / "report.json", baseline)
