"""``scaletrain report``: write reports again from measurements that are there."""

import dataclasses
import math
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
    "--reference-samples",
    metavar="N,...",
    help="Samples that reference runs needed to target_accuracy [default: those of one worker].",
)
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
    reference_samples: str | None,
    trace: bool,
) -> None:
    """Render reports again, from the directories of sweeps or of single runs.

    Nothing is trained, and torch is not needed.

    \b
    Examples:
      scaletrain report runs/bench-1 --format html,md --trace
      scaletrain report runs/a runs/b --out runs/both
      scaletrain report runs/bench-1 --reference-samples 41000,42500,40800
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
    stated = _samples(reference_samples)
    console = publish.terminal()
    target = out or directories[0]
    for directory in sources.sweeps:
        report = reports.with_reference(reports.of_sweep(directory), stated)
        publish.publish(report, out or directory, formats=wanted, console=console)
        if trace:
            publish.write_traces(directory)
    for directory in sources.reports:
        target = out or directory
        report = publish.read_report(directory / "report.json")
        if stated:
            report = reports.with_reference(report, stated)
        publish.publish(report, target, formats=wanted, console=console)
    if sources.runs:
        target = out or sources.runs[0]
        report = reports.with_reference(reports.of_runs(sources.runs), stated)
        publish.publish(report, target, formats=wanted, console=console)
        if trace:
            for directory in sources.runs:
                traces.write(directory, directory / "trace.json")
    # Last, since it ends the process with status 2 if something got slower.
    if baseline:
        publish.compare_and_exit(target / "report.json", baseline)


def _samples(text: str | None) -> list[float]:
    """Return the samples of reference runs; none if none are stated."""
    if text is None:
        return []
    try:
        samples = [float(word) for word in text.split(",")]
    except ValueError:
        samples = []
    if not samples or not all(0 < each < math.inf for each in samples):
        raise UserError(
            f"--reference-samples: {text!r} is not allowed (allowed: numbers with commas, such as"
            " 41000,42500)"
        )
    return samples
