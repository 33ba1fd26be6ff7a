"""The first sentences of a report: speed-up, limiter and doubts."""

from collections.abc import Sequence

from scaletrain.scaling.explain.limiter import capitalized
from scaletrain.scaling.measure.intervals import ONE_RUN, change, luck, typical
from scaletrain.scaling.model import Loss, Report, ReportHeader, Row
from scaletrain.units import plural

LUCK_WORTH = 0.002  # a smaller part of a figure is not worth a sentence


def oversubscribed(report: Report) -> str:
    """Return the remark on marked rows in figures and tables; empty if none is marked."""
    causes = dict.fromkeys(row.oversubscribed for row in report.rows if row.oversubscribed)
    return f"oversubscribed: {', '.join(causes)}" if causes else ""


def of(report: Report) -> str:
    """Return the first sentences of a report.

    They name the best that was reached, the most workers where they are no faster, the limiter and
    the failures.
    """
    # Doubts come first: no figure should be read before them.
    sentences = [*_cautions(report.header)]
    with_speedup = [row for row in report.rows if row.speedup is not None]
    # Workers with ``none`` train apart. Their speed-up counts only if there is no other.
    exchanging = [row for row in with_speedup if row.exchange != "none"]
    if with_speedup:
        sentences += _speedups(exchanging or with_speedup, report.losses)
    else:
        sentences += _speed_alone([row for row in report.rows if row.runs])
    sentences += _culprit(report.rows, sentences)
    sentences += _missing(report.header)
    sentences += _failures(report.rows)
    return " ".join(sentences) or "Nothing was measured."


def _culprit(rows: Sequence[Row], sentences: Sequence[str]) -> list[str]:
    """Return who held up the others in the row of most workers, unless a sentence says it."""
    held_up = [row for row in rows if row.culprit is not None]
    if not held_up:
        return []
    row = max(held_up, key=lambda row: row.workers)
    told = f"{capitalized(row.culprit or '')}."
    if any(told in sentence for sentence in sentences):
        return []
    return [f"{_name(row)}: {row.culprit}."]


def _cautions(header: ReportHeader) -> list[str]:
    cautions = []
    if header.emulated and header.emulation:
        cautions.append("EMULATED: " + "; ".join(header.emulation) + ".")
    if header.busy:
        cautions.append(header.busy)
    return cautions


def _speedups(rows: Sequence[Row], losses: Sequence[Loss]) -> list[str]:
    """Return sentences about the best row, the most workers beside it, and the limiter."""
    best = max(rows, key=_speedup)
    # Other configs and variants are other jobs: their worker counts say nothing here.
    comparable = [row for row in rows if _is_same_job(row, best)]
    most = max(row.workers for row in comparable)
    largest = max((row for row in comparable if row.workers == most), key=_speedup)

    sentences = [
        f"Fastest is {_name(best)}: {_times(best)} the speed of {best.baseline}"
        f" (efficiency {best.efficiency:.2f}, {_rate(best)})."
    ]
    equals = _maybe_equals(best, rows)
    if equals:
        names = " and ".join(row.exchange for row in equals)
        sentences.append(
            f"{names} may be as fast: {plural(len(best.runs), 'repeat')} cannot tell them apart."
        )
        sentences += _luck([best, *equals])
    # Scaling has turned: the most workers are slower than some number below.
    if _speedup(largest) < _speedup(best):
        crowded = f", {largest.oversubscribed}" if largest.oversubscribed else ""
        sentences.append(
            f"{_name(largest)}, the most measured, reaches {_times(largest)}"
            f" (efficiency {largest.efficiency:.2f}{crowded})."
        )
        if _may_be_as_fast(largest, best):
            sentences.append("The repeats cannot tell it from the fastest.")
    sentences += _limiter(best, largest, losses)
    return sentences + _oversubscription(best)


def _speed_alone(rows: Sequence[Row]) -> list[str]:
    """Return sentences about the fastest row, where there is nothing to be faster than."""
    if not rows:
        return []
    # An exchange goes before ``none``, which is faster only because it trains apart.
    best = max(rows, key=lambda row: (row.exchange != "none", row.samples_per_s))
    return [
        f"Fastest is {_name(best)}: {_rate(best)}.",
        "There is no other number of workers to compare with.",
        *_oversubscription(best),
    ]


def _limiter(best: Row, largest: Row, losses: Sequence[Loss]) -> list[str]:
    """Return the limiter of the best row; if its loss was not split, of the most workers."""
    for row in (best, largest):
        for loss in losses:
            if loss.label == row.label and (loss.config, loss.variant) == (row.config, row.variant):
                return [loss.sentence]
    return []


def _oversubscription(row: Row) -> list[str]:
    if not row.oversubscribed:
        return []
    return [f"There were {row.oversubscribed}: these figures are of an oversubscribed machine."]


def _missing(header: ReportHeader) -> list[str]:
    if not header.runs_missing:
        return []
    return [
        f"Unfinished: {header.runs_missing} of {header.runs_planned} runs are missing."
        " The same command runs them, with this report's directory as --out."
    ]


def _failures(rows: Sequence[Row]) -> list[str]:
    failed = [row for row in rows if row.failures]
    if not failed:
        return []
    names = ", ".join(row.label for row in failed)
    return [f"{len(failed)} of {len(rows)} cells had failures: {names}."]


def _may_be_as_fast(row: Row, best: Row) -> bool:
    """Whether the best row's lead, with its 95 % interval, may be none.

    False where there are no repeats: nothing is known then.
    """
    lead = change(typical(best.rates), typical(row.rates))
    return lead is not None and not lead.is_higher


def _maybe_equals(best: Row, rows: Sequence[Row]) -> list[Row]:
    """Return the rows that may be as fast as the best one with as many workers."""
    equals = []
    for row in rows:
        comparable = _is_same_job(row, best) and row.workers == best.workers
        if row is not best and comparable and _may_be_as_fast(row, best):
            equals.append(row)
    return equals


def _luck(alike: Sequence[Row]) -> list[str]:
    """Return how much of the winner's figure is luck: it was chosen for being the largest."""
    part = luck([typical(row.rates) for row in alike])
    if part < LUCK_WORTH:
        return []
    return [
        f"If all {len(alike)} are equally fast, the winner's figure is {part:.1%} too high by luck."
    ]


def _is_same_job(row: Row, other: Row) -> bool:
    return (row.config, row.variant) == (other.config, other.variant)


def _speedup(row: Row) -> float:
    """Return the speed-up of a row that has one."""
    assert row.speedup is not None
    return row.speedup


def _name(row: Row) -> str:
    return f"{row.exchange} on {plural(row.workers, 'worker')}"


def _rate(row: Row) -> str:
    """Return samples per second, and that they rest on one run if they do."""
    doubt = f"; {ONE_RUN}" if len(row.runs) < 2 else ""
    return f"{row.samples_per_s:,.0f} samples/s{doubt}"


def _times(row: Row) -> str:
    interval = "" if row.speedup_ci95 is None else f" ± {row.speedup_ci95:.2f}"
    return f"{row.speedup:.2f}{interval} times"
