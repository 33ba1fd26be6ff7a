"""Two reports side by side: which cells became slower or faster by more than their noise."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scaletrain.errors import UserError
from scaletrain.scaling.intervals import Change, change, mean

WORTH = 0.01  # a change smaller than this is no news, however sure it is


class CellChange(NamedTuple):
    """How one cell's samples per second changed. ``change`` is None where one side has a single repeat, or none."""

    label: str
    change: Change | None
    failed: bool = False  # measured before, failed now

    @property
    def regressed(self) -> bool:
        return self.failed or bool(self.change and self.change.is_lower and self.change.ratio < 1 - WORTH)

    @property
    def improved(self) -> bool:
        return bool(self.change and self.change.is_higher and self.change.ratio > 1 + WORTH)


def compare(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[CellChange]:
    """Cells that both reports have. A regression is real when the 95 % interval of new/old lies below 1, or a cell fails that did not.

    Raises:
        UserError: the reports have no cell in common, or scale in different modes.
    """
    if new["header"]["mode"] != old["header"]["mode"]:
        raise UserError(
            f"--baseline: is of {old['header']['mode']} scaling, the report of {new['header']['mode']} scaling"
        )
    before = {_key(row): row for row in old["rows"]}
    changes = []
    for row in new["rows"]:
        was = before.get(_key(row))
        if was is None or not was["runs"]:
            continue
        label = f"{row['exchange']} on {row['workers']}"
        if not row["runs"]:
            changes.append(CellChange(label, None, failed=True))
            continue
        sides = [mean([run["samples_per_s"] for run in side["runs"]]) for side in (row, was)]
        changes.append(CellChange(label, change(*sides)))
    if not changes:
        raise UserError("--baseline: has no cell in common with this report")
    return changes


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return row["config"], row["exchange"], row["workers"], row["batch_size"], str(sorted(row["variant"].items()))


def lines(changes: Sequence[CellChange]) -> list[str]:
    """One line a cell, for people."""
    told = []
    for cell in changes:
        if cell.failed:
            told.append(f"{cell.label}: REGRESSION: was measured before, failed now")
        elif cell.change is None:
            told.append(f"{cell.label}: cannot tell (two or more repeats on both sides are needed)")
        else:
            verdict = "REGRESSION" if cell.regressed else "faster" if cell.improved else "no real change"
            low, high = cell.change.low, cell.change.high
            told.append(
                f"{cell.label}: {cell.change.ratio - 1:+.1%} samples/s (95 %: {low - 1:+.1%} to {high - 1:+.1%}): {verdict}"
            )
    return told
