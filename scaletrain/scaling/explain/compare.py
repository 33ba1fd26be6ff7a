"""Two reports side by side: which cells became slower or faster by more than their noise."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import yaml

from scaletrain.config import parse_setting
from scaletrain.errors import UserError
from scaletrain.scaling.measure.intervals import Change, change, mean

WORTH = 0.01  # a change smaller than this is no news, however sure it is
KNOWN = 0.10  # an interval that reaches further than this does not tell that nothing changed
ASIDE = ("workers", "exchange", "batch_size", "batch_mode", "run_dir")  # what a cell says of itself
MACHINE = (
    "launcher",
    "threads_per_worker",
    "bound_to_cores",
    "processor",
    "cores",
)  # of a report's header


class CellChange(NamedTuple):
    """How one cell's samples per second changed. ``change`` is None where one side has a single repeat, or none."""

    label: str
    change: Change | None
    failed: bool = False  # measured before, failed now

    @property
    def regressed(self) -> bool:
        return self.failed or bool(
            self.change and self.change.is_lower and self.change.ratio < 1 - WORTH
        )

    @property
    def improved(self) -> bool:
        return bool(self.change and self.change.is_higher and self.change.ratio > 1 + WORTH)

    @property
    def verdict(self) -> str:
        if self.failed:
            return "REGRESSION: was measured before, failed now"
        if self.change is None:
            return "cannot tell (two or more repeats on both sides are needed)"
        if self.regressed or self.improved:
            return "REGRESSION" if self.regressed else "faster"
        wide = self.change.low < 1 - KNOWN or self.change.high > 1 + KNOWN
        return (
            "cannot tell (the interval is wide: more repeats, on a quiet machine)"
            if wide
            else "no real change"
        )


def compare(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[CellChange]:
    """Cells that both reports have. A regression is real when the 95 % interval of new/old lies below 1, or a cell fails that did not.
    Intervals hold for all cells together (Bonferroni): twenty cells without a change give a false alarm in one comparison of twenty, not in most.

    Raises:
        UserError: the reports have no cell in common, or scale in different modes.
    """
    if new["header"]["mode"] != old["header"]["mode"]:
        raise UserError(
            f"--baseline: is of {old['header']['mode']} scaling, the report of {new['header']['mode']} scaling"
        )
    before = {_key(row): row for row in old["rows"]}
    both = []
    for row in new["rows"]:
        was = before.get(_key(row))
        if was is None or not was["runs"]:
            continue
        label = f"{row['exchange']} on {row['workers']}"
        both.append((label, row, was))
    if not both:
        raise UserError("--baseline: has no cell in common with this report")
    changes = []
    for label, row, was in both:
        if not row["runs"]:  # failed, or not measured yet
            changes.append(CellChange(label, None, failed=bool(row["failures"])))
            continue
        now, then = (mean([run["samples_per_s"] for run in side["runs"]]) for side in (row, was))
        changes.append(CellChange(label, change(now, then, together=len(both))))
    return changes


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return (
        row["config"],
        row["exchange"],
        row["workers"],
        row["batch_size"],
        str(sorted(row["variant"].items())),
    )


def lines(changes: Sequence[CellChange]) -> list[str]:
    """One line a cell, for people."""
    told, of_all = [], f" of all {len(changes)} together" if len(changes) > 1 else ""
    for cell in changes:
        by = ""
        if cell.change is not None:
            ratio, low, high = cell.change
            by = f"{ratio - 1:+.1%} samples/s (95 %{of_all}: {low - 1:+.1%} to {high - 1:+.1%}): "
        told.append(f"{cell.label}: {by}{cell.verdict}")
    return told


def differences(new: Mapping[str, Any], old: Mapping[str, Any]) -> str | None:
    """One line: the settings in which the reports differ, and the machine's; None when they do not. Repeats and cells may differ."""
    before, now = (_settings(report["header"]) for report in (old, new))
    told = []
    for name in dict.fromkeys([*now, *before]):
        if name not in now or name not in before:
            continue  # a config that only one of them has: its cells are not compared
        for key in sorted({*now[name], *before[name]}):
            values = [json.dumps(side[name].get(key)) for side in (before, now)]
            if values[0] != values[1]:
                told.append(f"{key} {values[0]} -> {values[1]}")
    return f"not measured alike: {', '.join(dict.fromkeys(told))}" if told else None


def _settings(header: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Dotted keys of each config with what was set in every cell, and under "" what the header says of the machine."""
    over = dict(parse_setting(text) for text in header.get("settings", ()))
    found = {
        stem: {
            key: value
            for key, value in (_dotted(yaml.safe_load(text) or {}) | over).items()
            if key.partition(".")[0] not in ASIDE
        }
        for stem, text in header.get("config", {}).items()
    }
    return found | {"": {key: header[key] for key in MACHINE if key in header}}


def _dotted(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    keys: dict[str, Any] = {}
    for key, inner in value.items():
        keys |= (
            _dotted(inner, f"{prefix}{key}.")
            if isinstance(inner, dict) and inner
            else {f"{prefix}{key}": inner}
        )
    return keys
