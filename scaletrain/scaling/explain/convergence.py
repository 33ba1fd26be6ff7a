"""Samples to the target accuracy beside those of a reference: too few are no success.

More workers make a run faster, and leave what it learns from a sample as it is. A run that reaches
its accuracy in fewer samples than one worker trains something else: another batch or learning rate,
a lucky seed, a test set of which a part is missing. Its time to accuracy says nothing of scaling.

The idea is MLPerf's (Training Rules, section 13, "Reference Convergence Points"): the epochs of
runs are tested against those of reference runs, and must not be clearly fewer.
"""

import math
from collections.abc import Sequence

from scaletrain.scaling.measure.intervals import Mean, change, mean
from scaletrain.scaling.model import Convergence, Reached, Report, Row

# The standard deviation, as a fraction, that runs of different seeds are taken to have where
# repeats show none: they share a seed, or there is one. The median of the 21 references of MLPerf
# Training 3.1 (mlcommons/training_policies, CONTRIBUTING.md) is 0.038.
SCATTER = 0.04
_NORMAL_975 = 1.96  # quantile of the normal distribution


def of(report: Report, stated: Sequence[float] = ()) -> tuple[Convergence, ...]:
    """Return the samples of each row that has a reference.

    Rows whose repeats have not all reached the target have none: a mean of those that did would be
    of the fast ones alone.

    Args:
        report: rows whose repeats say when they reached the target.
        stated: the samples of reference runs from elsewhere; empty: one worker is the reference.
    """
    found = []
    for row in report.rows:
        # Workers without an exchange train a model each.
        if row.exchange == "none" and row.workers > 1:
            continue
        ours = _reached(row)
        theirs = _stated(stated) if stated else _reference(row, report.rows)
        if ours and theirs:
            found.append(_convergence(row, ours, *theirs))
    return tuple(found)


def too_fast(report: Report) -> list[str]:
    """Return a sentence if rows needed fewer samples than their reference allows."""
    flagged = [each for each in report.convergence if each.is_too_fast]
    if not flagged:
        return []
    parts = []
    for each in flagged:
        change = each.samples / each.reference_samples - 1
        parts.append(f"{each.label} ({change:+.0%} samples)")
    return [
        f"TOO FAST TO BE TRUE: {', '.join(parts)} reached the target accuracy in fewer samples than"
        f" {flagged[0].reference} allows. More workers do not teach faster: check batch, learning"
        " rate, seed and test set before quoting a time to accuracy."
    ]


def _reached(row: Row) -> list[Reached]:
    """Return when each repeat of a row reached the target; nothing if one did not."""
    reached = [run.reached for run in row.runs if run.reached is not None]
    return reached if len(reached) == len(row.runs) else []


def _stated(samples: Sequence[float]) -> tuple[str, list[Reached]]:
    return "the stated reference", [Reached(round(each), round(each)) for each in samples]


def _reference(row: Row, rows: Sequence[Row]) -> tuple[str, list[Reached]] | None:
    """Return the samples of one worker on the same job; None if no such run reached the target."""
    if row.workers == 1:
        return None
    alone = []
    for other in rows:
        is_same_job = (other.config, other.variant) == (row.config, row.variant)
        if other.workers == 1 and is_same_job and _reached(other):
            alone.append(other)
    if not alone:
        return None
    # Plain training first, as for speed-ups; then the same exchange.
    best = min(alone, key=lambda each: (each.exchange != "none", each.exchange != row.exchange))
    return f"1 worker, {best.exchange}", _reached(best)


def _convergence(
    row: Row, ours: Sequence[Reached], name: str, theirs: Sequence[Reached]
) -> Convergence:
    samples = mean([each.samples for each in ours])
    reference = mean([each.samples for each in theirs])
    # Nobody looks between two evaluations. The reference may have got there right after the one
    # before, so one evaluation earlier is no evidence.
    earliest = mean([each.samples_before for each in theirs])
    return Convergence(
        config=row.config,
        exchange=row.exchange,
        workers=row.workers,
        batch_size=row.batch_size,
        variant=row.variant,
        samples=samples.value,
        # Equal repeats share a seed. Their interval of 0 would claim a precision nobody measured.
        samples_ci95=samples.ci95 or None,
        reference=name,
        reference_samples=reference.value,
        reference_ci95=reference.ci95 or None,
        is_too_fast=_is_fewer(samples, earliest),
    )


def _is_fewer(ours: Mean, theirs: Mean) -> bool:
    """Whether the 95 % interval of the ratio of two means lies below 1."""
    if theirs.value <= 0:
        return False  # reached at the first evaluation, which may be at any time before
    if ours.ci95 and theirs.ci95:
        fewer = change(ours, theirs)
        return fewer is not None and fewer.is_lower
    return ours.value / theirs.value < math.exp(-_NORMAL_975 * SCATTER * math.sqrt(2))
