"""``scaletrain report``: write reports again from measurements that are there."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import click

from scaletrain.errors import UserError

# An option of ``report`` and of ``bench scaling``.
baseline_option = click.option(
    "--baseline",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="A report.json to compare with; exit code 2 when a cell got slower beyond its intervals.",
)


@dataclasses.dataclass(frozen=True)
class Sources:
    """The directories to report on, by their content."""

    sweeps: list[Path]
    reports: list[Path]  # of sweeps whose measurements are gone
    runs: list[Path]  # single runs, which make one report together

    @classmethod
    def of(cls, directories: Sequence[Path]) -> "Sources":
        """Sort the directories.

        Raises:
            UserError: a directory holds nothing to report on.
        """
        from scaletrain.run.layout import RunDir

        sources = cls([], [], [])
        for directory in directories:
            summary = RunDir(directory).summary
            # Measurements come before the reports that were made from them: a sweep also holds its
            # report.json, and so may a run that was reported on before.
            if (directory / "sweep.json").exists():
                sources.sweeps.append(directory)
            elif summary.exists():
                sources.runs.append(directory)
            elif (directory / "report.json").exists():
                sources.reports.append(directory)
            else:
                raise UserError(
                    f"{directory}: neither a sweep (sweep.json), a finished run"
                    f" ({summary.name}) nor a report (report.json)"
                )
        return sources

    @property
    def count(self) -> int:
        """How many reports these directories make."""
        count = len(self.sweeps) + len(self.reports)
        if self.runs:
            count += 1
        return count


@click.command()
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
def command(
    directories: tuple[Path, ...],
    out: Path | None,
    formats: str,
    baseline: Path | None,
    trace: bool,
) -> None:
    """Render reports again, from the directories of sweeps or of single runs.

    Nothing is trained, and torch is not needed.

    \b
    Examples:
      scaletrain report runs/bench-1 --format html,md --trace
      scaletrain report runs/a runs/b --out runs/both
    """
    from scaletrain.scaling.explain import report as reports
    from scaletrain.scaling.show import publish
    from scaletrain.scaling.show import trace as traces

    sources = Sources.of(directories)
    # Each report would overwrite the one before.
    if out and sources.count > 1:
        raise UserError(
            f"--out {out}: these directories make several reports"
            " (allowed: one sweep, or single runs)"
        )
    wanted = [word.strip() for word in formats.split(",") if word.strip()]
    console = publish.terminal()
    target = out or directories[0]
    for directory in sources.sweeps:
        publish.publish_sweep(directory, out, trace=trace, formats=wanted, console=console)
    for directory in sources.reports:
        target = out or directory
        report = publish.read_report(directory / "report.json")
        publish.publish(report, target, formats=wanted, console=console)
    if sources.runs:
        target = out or sources.runs[0]
        publish.publish(reports.of_runs(sources.runs), target, formats=wanted, console=console)
        if trace:
            for directory in sources.runs:
                traces.write(directory, directory / "trace.json")
    # Last, since it ends the process with status 2 if something got slower.
    if baseline:
        publish.compare_and_exit(target / "report.json", baseline)
