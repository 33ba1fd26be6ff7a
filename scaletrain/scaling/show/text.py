"""Figures and remarks of a report as text, for the terminal and for pages."""

from collections.abc import Iterable, Sequence

from scaletrain.scaling.explain import headline
from scaletrain.scaling.measure.intervals import ONE_RUN
from scaletrain.scaling.model import Prediction, Report, ReportHeader, Row
from scaletrain.units import plural

UNKNOWN = "–"  # in pages, where a figure is not known


def number(value: float | None, form: str = ".2f", ci95: float | None = None) -> str:
    """Return a figure with its interval, if it has one.

    >>> number(1.5, ci95=0.25), number(None)
    ('1.50 ± 0.25', '–')
    """
    if value is None:
        return UNKNOWN
    interval = "" if ci95 is None else f" ± {ci95:{form}}"
    # The z makes a zero of what would be shown as -0.00.
    return f"{value:z{form}}{interval}"


def ms(seconds: float | None, ci95: float | None = None) -> str:
    """Return seconds as milliseconds, with their interval if they have one."""
    if seconds is None:
        return UNKNOWN
    return number(1000 * seconds, ci95=None if ci95 is None else 1000 * ci95)


def cell_name(row: Row) -> str:
    """Return the config of a row and its variant, where rows differ in them."""
    varied = [f"{key}={value}" for key, value in row.variant.items()]
    return " ".join([row.config, *varied])


def to_target(row: Row) -> str:
    """Return the seconds until the target accuracy, over the repeats that reached it.

    An exclamation mark says that they rest on fewer samples than the reference allows.
    """
    seconds = number(row.target_s, ".1f", row.target_s_ci95)
    if row.is_too_fast:
        seconds = f"{seconds} !"
    if row.target_s is None or row.target_runs == row.repeats:
        return seconds
    return f"{seconds} ({row.target_runs} of {row.repeats} runs)"


def outcome(row: Row) -> str:
    """Return the fate of a cell without a finished run."""
    if not row.failures:
        return "not measured"
    return f"failed: {'; '.join(dict.fromkeys(row.failures))}"


def outlying(report: Report) -> list[str]:
    """Return a line about each row with outlying repeats: which, and how far off they are."""
    lines = []
    for row in report.rows:
        if not row.outliers or not row.samples_per_s:
            continue
        repeats = []
        for number in row.outliers:
            rate = row.rates[number - 1]
            repeats.append(f"repeat {number} ({rate / row.samples_per_s - 1:+.0%})")
        lines.append(
            f"{row.label}: {', '.join(repeats)} of {row.repeats} left out of the means as outlying,"
            " by samples/s."
        )
    return lines


def note(report: Report) -> str:
    """Return the meaning of ± in a report. Without repeats there is none."""
    repeats = report.header.repeats
    if repeats < 2:
        return f"{ONE_RUN.capitalize()}."
    return (
        f"± is the 95 % confidence interval of the mean over {repeats} repeats (Student's t),"
        " without outlying ones. A cell of one run has none. Speed-up is the ratio of the mean samples/s; its interval"
        " pairs each repeat with the baseline's."
    )


def watermark(report: Report) -> str:
    """Return the warning that stands on every figure of a report; empty if there is none."""
    marks = []
    if report.header.emulated:
        marks.append("EMULATED")
    oversubscribed = headline.oversubscribed(report)
    if oversubscribed:
        marks.append(oversubscribed)
    return ", ".join(marks)


def calibration(points: Sequence[Prediction]) -> str:
    """Return how far predictions test the model, which its own calibration cannot."""
    basis = (
        "The computation is that of the same workers without an exchange. The network is calibrated"
        " on this report's own steps."
    )
    tested = sum(not point.in_fit for point in points)
    if not tested:
        return (
            f"{basis} All of these rows were used for it: the errors are residuals, not a test of"
            " the model."
        )
    return (
        f"{basis} {tested} of {len(points)} were left out of the calibration: those are"
        " predictions, the others residuals."
    )


def environment(header: ReportHeader) -> dict[str, str]:
    """Return where and how a report was measured, by the names that people read.

    The command, the config files and what was emulated have places of their own.

    >>> environment(ReportHeader(cores=2, memory_bytes=2**34, bound_to_cores=True))
    {'Cores': '2', 'Memory': '16.0 GiB', 'Workers kept on cores': 'yes'}
    """
    versions = [f"{name} {version}" for name, version in header.versions.items() if version]
    varied = [f"{key}: {', '.join(map(str, each))}" for key, each in (header.vary or {}).items()]
    facts = {
        "Host": header.host,
        "Operating system": header.os,
        "Processor": header.processor,
        "Cores": header.cores,
        "Memory": _gibibytes(header.memory_bytes),
        "GPUs": _joined(header.devices),
        "Python": header.python,
        "Packages": _joined(versions),
        "Commit": header.commit,
        "Measured": (header.created or "").replace("T", " ").replace("Z", " UTC"),
        "Note": header.note,
        "Scaling": header.mode,
        "Speed-up over": header.baseline,
        "Runs": _runs(header),
        "Launcher": header.launcher,
        "Threads a worker": header.threads_per_worker,
        "Workers kept on cores": _yes_or_no(header.bound_to_cores),
        "Set for all runs": _joined(header.settings),
        "Varied": "; ".join(varied),
        "Took turns with": header.turns,
        "Runs of": header.source,
        "Load at the start": number(header.load_average, ".1f"),
        "Other processes": _used_by_others(header),
        "Emulated": _yes_or_no(header.emulated),
        "Samples of the references": _joined(header.reference_samples, ",.0f"),
        "Predictions calibrated on": header.calibrated_on,
    }
    return {name: str(fact) for name, fact in facts.items() if fact not in (None, "", UNKNOWN)}


def _joined(facts: Iterable[str | float] | None, form: str = "") -> str:
    return ", ".join(format(fact, form) for fact in facts or ())


def _yes_or_no(fact: bool | None) -> str | None:
    if fact is None:
        return None
    return "yes" if fact else "no"


def _gibibytes(num_bytes: int | None) -> str | None:
    return None if num_bytes is None else f"{num_bytes / 2**30:.1f} GiB"


def _runs(header: ReportHeader) -> str | None:
    """Return how many runs were asked for, and how many of them are missing."""
    if header.runs_planned is None:
        return f"{plural(header.repeats, 'repeat')} of each cell" if header.repeats else None
    missing = f", {header.runs_missing} missing" if header.runs_missing else ""
    return f"{header.runs_planned}, {plural(header.repeats, 'repeat')} of each cell{missing}"


def _used_by_others(header: ReportHeader) -> str | None:
    if header.used_by_others is None:
        return None
    share = f"used {header.used_by_others:.0%} of the cores"
    return f"{share}. {header.busy}" if header.busy else share
