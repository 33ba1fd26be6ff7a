"""Two reports side by side: which cells became slower or faster by more than their noise.

Reports are of two sessions, or their runs took turns (``bench scaling --against``). A machine is a
little faster in one session than in another, which the repeats of neither show.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import yaml

from scaletrain.config import parse_setting
from scaletrain.errors import UserError
from scaletrain.scaling.measure.intervals import (
    MANY,
    POWER,
    SESSION,
    Change,
    change,
    paired_change,
    relative_deviation,
    repeats_to_see,
    typical,
)
from scaletrain.scaling.model import Report, ReportHeader, Row
from scaletrain.units import plural

WORTH = 0.01  # a smaller change does not matter, however certain it is
SMALL = 0.05  # "no real change" is said where a change of this size, either way, is excluded
USUAL = 0.01  # the deviation of a repeat, as a fraction, where nothing was measured yet
AMOUNTS = (0.01, 0.02, 0.05, 0.10)  # slowdowns for which the repeats that show them are told
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
        # A wide interval would hide a real change: it does not show that there is none.
        if self.change.low <= 1 - SMALL:
            return f"cannot tell (a slowdown of {SMALL:.0%} is not excluded: more repeats)"
        if self.change.high >= 1 + SMALL:
            return f"not slower by {SMALL:.0%}; whether it is faster, more repeats would tell"
        return "no real change"


def compare(new: Report, old: Report) -> list[CellChange]:
    """Return the change of every cell that both reports have.

    A regression is real when the 95 % interval of new/old lies below 1, or when a cell fails that
    did not. The intervals hold for all cells together (Bonferroni): twenty cells without a change
    give a false alarm in one comparison of twenty, not in most. Between sessions, they allow for
    what a machine's speed differs by (``intervals.SESSION``).

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
    in_turns = took_turns(new, old)
    return [_change_of(row, before, len(pairs), in_turns) for row, before in pairs]


def took_turns(new: Report, old: Report) -> bool:
    """Return True if the runs of two reports took turns in one session."""
    session = new.header.turns
    return session is not None and session == old.header.turns


def _change_of(row: Row, before: Row, together: int, in_turns: bool) -> CellChange:
    if not row.runs:  # failed, or not measured yet
        return CellChange(row.label, None, failed=bool(row.failures))
    if not in_turns:
        rate_change = change(typical(row.rates), typical(before.rates), together, SESSION)
    elif len(row.runs) == len(before.runs):
        rate_change = paired_change(row.rates, before.rates, together)
    else:
        # A repeat has failed: the others are of one session, but of no pairs.
        rate_change = change(typical(row.rates), typical(before.rates), together)
    return CellChange(row.label, rate_change)


def power_in_words(
    repeats: int, cells: int, *, in_turns: bool, before: Report | None = None
) -> str:
    """Return how many repeats show which slowdown, before anything is measured.

    Args:
        repeats: that are planned, of each side.
        cells: that are compared.
        in_turns: whether both sides run in turns, or ``before`` is of another session.
        before: says how repeats scatter; None: ``USUAL`` is assumed.
    """
    deviation = None if before is None else _scatter(before)
    if deviation is None:
        scatter = f"If repeats scatter by {USUAL:.1%}"
        deviation = USUAL
    else:
        scatter = f"Repeats scattered by {deviation:.1%}"
    session = None if in_turns else SESSION
    needs = []
    for amount in AMOUNTS:
        needed = repeats_to_see(amount, deviation, together=cells, session=session)
        count = f"more than {MANY}" if needed is None else str(needed)
        needs.append(f"{amount:.0%} by {count}")
    if in_turns:
        limit = ""
    else:
        limit = f" Sessions differ by {SESSION:.0%}, which no repeats remove; --against does."
    return (
        f"{scatter}: a slowdown of {', '.join(needs)} repeats is seen in {POWER:.0%} of the"
        f" comparisons of {plural(cells, 'cell')} (planned: {repeats}).{limit}"
    )


def _scatter(report: Report) -> float | None:
    """Return the median deviation of a repeat over the cells; None if no cell has repeats."""
    deviations = []
    for row in report.rows:
        if len(row.runs) > 1:
            rate = typical(row.rates)
            if rate.ci95 is not None:
                deviations.append(relative_deviation(rate))
    return float(np.median(deviations)) if deviations else None


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
