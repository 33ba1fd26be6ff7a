"""Two reports side by side: which cells became slower or faster by more than their noise."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from scaletrain.config import parse_setting
from scaletrain.errors import UserError
from scaletrain.scaling.measure.intervals import Change, change, mean
from scaletrain.scaling.model import Report, ReportHeader, Row

WORTH = 0.01  # a smaller change does not matter, however certain it is
KNOWN = 0.10  # an interval that reaches further than this does not show that nothing changed
# Keys of a config that every cell says of itself.
ASIDE = ("workers", "exchange", "batch_size", "batch_mode", "run_dir")
# Fields of the header that say how the machine was used.
MACHINE = ("launcher", "threads_per_worker", "bound_to_cores", "processor", "cores")


@dataclasses.dataclass(frozen=True)
class CellChange:
    """How one cell's samples per second changed."""

    label: str
    change: Change | None  # None: one side has a single repeat, or none
    failed: bool = False  # measured before, failed now

    @property
    def regressed(self) -> bool:
        if self.failed:
            return True
        change = self.change
        # Certain (the interval lies below 1) and large enough to matter.
        return change is not None and change.is_lower and change.ratio < 1 - WORTH

    @property
    def improved(self) -> bool:
        change = self.change
        return change is not None and change.is_higher and change.ratio > 1 + WORTH

    @property
    def verdict(self) -> str:
        if self.failed:
            return "REGRESSION: was measured before, failed now"
        if self.change is None:
            return "cannot tell (two or more repeats on both sides are needed)"
        if self.regressed:
            return "REGRESSION"
        if self.improved:
            return "faster"
        # So wide an interval would hide a real change: it does not show that there is none.
        if self.change.low < 1 - KNOWN or self.change.high > 1 + KNOWN:
            return "cannot tell (the interval is wide: more repeats, on a quiet machine)"
        return "no real change"


def compare(new: Report, old: Report) -> list[CellChange]:
    """Return the change of every cell that both reports have.

    A regression is real when the 95 % interval of new/old lies below 1, or when a cell fails that
    did not. The intervals hold for all cells together (Bonferroni): twenty cells without a change
    give a false alarm in one comparison of twenty, not in most.

    Raises:
        UserError: the reports have no cell in common, or scale in different modes.
    """
    if new.header.mode != old.header.mode:
        raise UserError(
            f"--baseline: is of {old.header.mode} scaling, the report of {new.header.mode} scaling"
        )
    # A cell without figures before is nothing to compare with; that it failed is no news.
    measured_before = {_identity(row): row for row in old.rows if row.runs}
    pairs = []
    for row in new.rows:
        before = measured_before.get(_identity(row))
        if before is not None:
            pairs.append((row, before))
    if not pairs:
        raise UserError("--baseline: has no cell in common with this report")
    return [_change_of(row, before, together=len(pairs)) for row, before in pairs]


def _change_of(row: Row, before: Row, together: int) -> CellChange:
    if not row.runs:  # failed, or not measured yet
        return CellChange(row.label, None, failed=bool(row.failures))
    rate_change = change(mean(row.rates), mean(before.rates), together=together)
    return CellChange(row.label, rate_change)


def _identity(row: Row) -> tuple[str, str, int, int, str]:
    """Return everything that makes two rows the same cell."""
    # Sorted: the order of --vary does not make another cell.
    variant = str(sorted(row.variant.items()))
    return row.config, row.exchange, row.workers, row.batch_size, variant


def lines(changes: Sequence[CellChange]) -> list[str]:
    """Return one line a cell, for people."""
    together = f" of all {len(changes)} together" if len(changes) > 1 else ""
    texts = []
    for cell in changes:
        amount = ""
        if cell.change is not None:
            percent = cell.change.ratio - 1
            low, high = cell.change.low - 1, cell.change.high - 1
            amount = f"{percent:+.1%} samples/s (95 %{together}: {low:+.1%} to {high:+.1%}): "
        texts.append(f"{cell.label}: {amount}{cell.verdict}")
    return texts


def differences(new: Report, old: Report) -> str | None:
    """Return in one line the settings in which two reports differ; None if in none.

    These are the keys of each config, and the use of the machine. Repeats and cells may differ.
    """
    before, now = _settings(old.header), _settings(new.header)
    changes = []
    # Ordered, unlike a set, so that the line reads the same each time.
    for config in dict.fromkeys([*now, *before]):
        if config not in now or config not in before:
            continue  # a config that only one of them has: its cells are not compared
        for key in sorted({*now[config], *before[config]}):
            value_before = json.dumps(before[config].get(key))
            value_now = json.dumps(now[config].get(key))
            if value_before != value_now:
                changes.append(f"{key} {value_before} -> {value_now}")
    if not changes:
        return None
    # Several configs often differ in the same key: it is named once.
    return f"measured with different settings: {', '.join(dict.fromkeys(changes))}"


def _settings(header: ReportHeader) -> dict[str, dict[str, object]]:
    """Return the dotted keys of each config, with the settings of every cell.

    The empty name holds the header's facts about the use of the machine.
    """
    overrides = dict(parse_setting(text) for text in header.settings or ())
    settings: dict[str, dict[str, object]] = {}
    for stem, text in header.config.items():
        # Settings of the sweep win over the file, as they do in the run itself.
        dotted = _dotted(yaml.safe_load(text) or {}) | overrides
        # The first part decides: ``exchange.transport`` belongs to ``exchange``.
        settings[stem] = {
            key: value for key, value in dotted.items() if key.partition(".")[0] not in ASIDE
        }
    settings[""] = {name: getattr(header, name) for name in MACHINE}
    return settings


def _dotted(value: Mapping[str, Any], prefix: str = "") -> dict[str, object]:
    """Return the leaves of nested mappings by their dotted keys."""
    keys: dict[str, object] = {}
    for key, inner in value.items():
        # An empty mapping is a leaf. It would vanish otherwise.
        if isinstance(inner, dict) and inner:
            keys |= _dotted(inner, f"{prefix}{key}.")
        else:
            keys[f"{prefix}{key}"] = inner
    return keys
