"""The first sentences of a report: speed-up, limiter and doubts."""

from collections.abc import Sequence

from scaletrain.scaling.explain import convergence
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
    """Return the first lines of a report, each with its name before a colon.

    They say how fast it is, what limits it and who, what to change, and how sure that is.
    """
    asked_for = _asked_for(report.rows)
    rows = [row for row in asked_for if row.runs]
    best = fastest(report)
    if best is None:
        lines = {"Result": _nothing(asked_for)}
    else:
        loss = _loss_of(best, rows, report.losses)
        held_up = _held_up(best, report.rows)
        lines = {
            "Result": _result(best, rows),
            "Cause": _cause(best, held_up, loss),
            "Change": _change(best, held_up, loss),
        }
        lines["How sure"] = _certainty(best, rows, report)
    if report.header.emulated and report.header.emulation:
        # Before every figure: nobody may take it for a measurement of a cluster.
        lines["Result"] = f"EMULATED: {'; '.join(report.header.emulation)}. {lines['Result']}"
    lines["How sure"] = " ".join([*filter(None, [lines.get("How sure")]), *doubts(report)])
    return "\n".join(f"{name}: {text}" for name, text in lines.items() if text)


def _asked_for(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that the first line may be about, measured or not.

    One worker is no answer where several were asked for. Workers with ``none`` train apart: they
    count only if there is no other exchange.
    """
    several = [row for row in rows if row.workers > 1]
    candidates = several or list(rows)
    return [row for row in candidates if row.exchange != "none"] or candidates


def _nothing(asked_for: Sequence[Row]) -> str:
    """Return which cells have no finished run, and why if that is known."""
    if not asked_for:
        return "Nothing was measured."
    reasons: dict[str, None] = {}
    for row in asked_for:
        reasons.update(dict.fromkeys(row.failures))
    because = f": {'; '.join(reasons)}" if reasons else ""
    return f"No run of {', '.join(map(_name, asked_for))} has finished{because}."


def _speed(row: Row) -> tuple[float, float]:
    """Return what rows are ranked by: the speed-up if there is one, then samples/s."""
    return row.speedup or 0.0, row.samples_per_s or 0.0


def _result(best: Row, rows: Sequence[Row]) -> str:
    """Return the best row's speed, and that of the most workers if they are slower."""
    if best.speedup is None:
        return (
            f"Fastest is {_name(best)}: {_rate(best)}. No other number of workers to compare with."
        )
    # Scaling that does not pay is the first thing to know.
    lead = "Fastest is"
    if best.workers > 1 and best.speedup < 1:
        lead = "More workers are slower than one. The fastest of them,"
    if not _is_told(best, rows):
        lead = f"Too noisy to name a fastest: none is surely faster than {best.baseline}. The highest mean,"
    crowded = f"; {best.oversubscribed}" if best.oversubscribed else ""
    verb = ":" if lead == "Fastest is" else ", reaches"
    sentences = [
        f"{lead} {_name(best)}{verb} {_times(best)} the speed of {best.baseline}"
        f" (efficiency {best.efficiency:.2f}, {_rate(best)}{crowded})."
    ]
    # Other configs and variants are other jobs: their worker counts say nothing here.
    largest = max(_same_job(best, rows), key=lambda row: (row.workers, _speed(row)))
    if _speed(largest) < _speed(best) and largest.workers > best.workers:
        crowded = f", {largest.oversubscribed}" if largest.oversubscribed else ""
        sentences.append(
            f"{_name(largest)}, the most measured, reaches {_times(largest)}"
            f" (efficiency {largest.efficiency:.2f}{crowded})."
        )
    return " ".join(sentences)


def _is_told(best: Row, rows: Sequence[Row]) -> bool:
    """Return False if the best row's speed-up may be 1, and no other's is above it for sure."""
    if best.workers < 2 or best.speedup is None or best.speedup_ci95 is None:
        return True
    if abs(best.speedup - 1) > best.speedup_ci95:
        return True
    return any(map(_is_surely_faster_than_one, _same_job(best, rows)))


def _is_surely_faster_than_one(row: Row) -> bool:
    if row.speedup is None or row.speedup_ci95 is None:
        return False
    return row.speedup - row.speedup_ci95 > 1


def _same_job(best: Row, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if _is_same_job(row, best) and row.speedup is not None]


def _loss_of(best: Row, rows: Sequence[Row], losses: Sequence[Loss]) -> Loss | None:
    """Return the loss of the best row; if it was not split, that of the most workers."""
    largest = max(_same_job(best, rows) or [best], key=lambda row: row.workers)
    for row in (best, largest):
        for loss in losses:
            if loss.label == row.label and (loss.config, loss.variant) == (row.config, row.variant):
                return loss
    return None


def _held_up(best: Row, rows: Sequence[Row]) -> Row | None:
    """Return the row whose culprit to name: the best, or the one of the most workers."""
    rows = [row for row in rows if row.culprit is not None]
    return max(rows, key=lambda row: (row is best, row.workers), default=None)


def _cause(best: Row, held_up: Row | None, loss: Loss | None) -> str:
    """Return what limits the best row, and who held up the others there or on more workers."""
    finding = "" if loss is None else loss.finding
    culprit = ""
    if held_up is not None:
        assert held_up.culprit is not None
        if f"{capitalized(held_up.culprit)}." not in finding:
            culprit = f"{_name(held_up)}: {held_up.culprit}."
    elif len(best.ranks) > 1:
        culprit = "No rank or link stands out as slow."
    if not finding and held_up is None:
        finding = "Not known: the short references of --split were not measured."
        if best.workers == 1:
            finding = "One worker exchanges nothing and waits for nobody."
    return " ".join(filter(None, [finding, culprit]))


def _change(best: Row, held_up: Row | None, loss: Loss | None) -> str:
    """Return what to change, or what to do before anything is changed."""
    remedy = held_up.remedy if held_up is not None else None
    sentences = []
    if remedy:
        sentences.append(f"{capitalized(remedy)}.")
    # Advice on stragglers is to look for the one that is named already.
    has_cause = loss is not None and loss.limiter not in (None, "stragglers")
    if loss is not None and loss.advice and (has_cause or not remedy):
        sentences.append(loss.advice)
    elif not remedy and best.workers > 1:
        sentences.append("Measure the references of --split before changing anything.")
    if best.workers == 1:
        sentences.append("Measure several numbers of workers, such as --workers 1,2,4.")
    elif _is_slower_than_one(best) and not has_cause:
        sentences.append("Until the cause is known, one worker is faster.")
    return " ".join(sentences)


def _is_slower_than_one(row: Row) -> bool:
    return row.speedup is not None and row.speedup + (row.speedup_ci95 or 0.0) < 1


def _certainty(best: Row, rows: Sequence[Row], report: Report) -> str:
    """Return how well the first line is known."""
    repeats = len(best.runs) - len(best.outliers)
    if repeats < 2:
        sentences = [f"{capitalized(ONE_RUN)}."]
    elif best.speedup_ci95 is None:
        sentences = [f"{plural(repeats, 'repeat')}."]
    else:
        share = best.speedup_ci95 / (best.speedup or 1.0)
        sentences = [f"The speed-up is known to ± {share:.0%} (95 %, {plural(repeats, 'repeat')})."]
    if best.outliers:
        sentences.append(f"{plural(len(best.outliers), 'outlying repeat')} left out.")
    equals = _maybe_equals(best, rows)
    if equals:
        names = " and ".join(row.exchange for row in equals)
        sentences.append(f"{capitalized(names)} may be as fast.")
        sentences += _luck([best, *equals])
    largest = max(_same_job(best, rows) or [best], key=lambda row: (row.workers, _speed(row)))
    if largest is not best and _may_be_as_fast(largest, best):
        sentences.append(f"{capitalized(_name(largest))} may be as fast.")
    return " ".join(sentences)


def fastest(report: Report) -> Row | None:
    """Return the row that the first line is about; None if nothing that was asked for has run."""
    rows = [row for row in _asked_for(report.rows) if row.runs]
    return max(rows, key=_speed) if rows else None


def doubts(report: Report) -> list[str]:
    """Return what makes all figures of a report doubtful, a sentence each."""
    return [
        *filter(None, [report.header.busy]),
        *convergence.too_fast(report),
        *_missing(report.header),
        *_failures(report.rows),
    ]


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
    all_of_them = "both" if len(alike) == 2 else f"all {len(alike)}"
    return [
        f"If {all_of_them} are equally fast, the winner's figure is {part:.1%} too high by luck."
    ]


def _is_same_job(row: Row, other: Row) -> bool:
    return (row.config, row.variant) == (other.config, other.variant)


def _name(row: Row) -> str:
    return f"{row.exchange} on {plural(row.workers, 'worker')}"


def _rate(row: Row) -> str:
    """Return samples per second, and that they rest on one run if they do."""
    doubt = f"; {ONE_RUN}" if len(row.runs) < 2 else ""
    return f"{row.samples_per_s:,.0f} samples/s{doubt}"


def _times(row: Row) -> str:
    interval = "" if row.speedup_ci95 is None else f" ± {row.speedup_ci95:.2f}"
    return f"{row.speedup:.2f}{interval} times"
