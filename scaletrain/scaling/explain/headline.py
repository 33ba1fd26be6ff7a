"""The first sentences of a report: what was reached, what limits it, and what to doubt."""

from collections.abc import Mapping, Sequence
from typing import Any

from scaletrain.scaling.measure.intervals import ONE_RUN, change, mean

_CELL = ("config", "exchange", "workers", "variant")  # what tells rows of a report apart


def oversubscribed(report: Mapping[str, Any]) -> str:
    """What figures and tables say of their marked rows; empty: none is marked."""
    causes = dict.fromkeys(row["oversubscribed"] for row in report["rows"] if row["oversubscribed"])
    return f"oversubscribed: {', '.join(causes)}" if causes else ""


def of(report: Mapping[str, Any]) -> str:
    """The first sentences of the report: the best that was reached, the most workers where they are no faster, what limits it, what failed."""
    rows = report["rows"]
    done = [row for row in rows if row["efficiency"] is not None and row["exchange"] != "none"] or [
        row for row in rows if row["efficiency"] is not None
    ]
    alone = [
        row for row in rows if row["samples_per_s"] is not None and not done
    ]  # nothing to be faster than
    sentences = []
    if report["header"].get("emulated"):
        sentences.append("EMULATED: " + "; ".join(report["header"]["emulation"]) + ".")
    if report["header"].get("busy"):
        sentences.append(report["header"]["busy"])
    if done:
        best = max(done, key=lambda row: row["speedup"])
        alike = [row for row in done if all(row[key] == best[key] for key in ("config", "variant"))]
        most = max(row["workers"] for row in alike)
        largest = max(
            (row for row in alike if row["workers"] == most), key=lambda row: row["speedup"]
        )
        sentences.append(
            f"{_named(best)}: {_times(best)} the speed of {best['baseline']} (efficiency {best['efficiency']:.2f}, {_rate(best)}."
        )
        if equals := _not_told_apart(best, done):
            sentences.append(
                f"{' and '.join(equals)} may be as fast: {len(best['runs'])} repeats do not tell them apart."
            )
        if largest["speedup"] < best["speedup"]:
            crowded = f", {largest['oversubscribed']}" if largest["oversubscribed"] else ""
            apart = ", not told apart by the repeats" if _may_be_as_fast(largest, best) else ""
            sentences.append(
                f"{_named(largest)}, the most measured: {_times(largest)} (efficiency {largest['efficiency']:.2f}{crowded}){apart}."
            )
        losses = {
            tuple(str(loss[key]) for key in _CELL): loss["sentence"] for loss in report["losses"]
        }
        told = [losses.get(tuple(str(row[key]) for key in _CELL)) for row in (best, largest)]
        sentences += [text for text in told if text][:1]
        if best["oversubscribed"]:
            sentences.append(
                f"There were {best['oversubscribed']}: these figures are of an oversubscribed machine."
            )
    if alone:
        best = max(alone, key=lambda row: (row["exchange"] != "none", row["samples_per_s"]))
        sentences.append(
            f"{_named(best)}: no other number of workers to compare with ({_rate(best)}."
        )
        if best["oversubscribed"]:
            sentences.append(
                f"There were {best['oversubscribed']}: these figures are of an oversubscribed machine."
            )
    header = report["header"]
    if header.get("runs_missing"):
        sentences.append(
            f"Unfinished: {header['runs_missing']} of {header['runs_planned']} runs are missing"
            " (the same command, with this report's directory as --out, runs them)."
        )
    failed = [row for row in rows if row["failures"]]
    if failed:
        names = ", ".join(f"{row['exchange']} on {row['workers']}" for row in failed)
        sentences.append(f"{len(failed)} of {len(rows)} cells had failures: {names}.")
    return " ".join(sentences) or "Nothing was measured."


def _may_be_as_fast(row: Mapping[str, Any], best: Mapping[str, Any]) -> bool:
    """Whether the best one's lead, with its 95 % interval, does not leave the row behind. Without repeats nothing is said."""
    ahead, behind = (mean([run["samples_per_s"] for run in one["runs"]]) for one in (best, row))
    lead = change(ahead, behind)
    return lead is not None and not lead.is_higher


def _not_told_apart(best: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Exchanges that may be as fast as the best one of the same cell."""
    alike = [
        row
        for row in rows
        if row is not best and all(row[k] == best[k] for k in ("config", "workers", "variant"))
    ]
    return [str(row["exchange"]) for row in alike if _may_be_as_fast(row, best)]


def _rate(row: Mapping[str, Any]) -> str:
    return f"{row['samples_per_s']:,.0f} samples/s)" + (
        f"; {ONE_RUN}" if len(row["runs"]) < 2 else ""
    )


def _named(row: Mapping[str, Any]) -> str:
    return f"{row['exchange']} on {row['workers']} worker{'s' * (row['workers'] > 1)}"


def _times(row: Mapping[str, Any]) -> str:
    ci = "" if row["speedup_ci95"] is None else f" ± {row['speedup_ci95']:.2f}"
    return f"{row['speedup']:.2f}{ci} times"
