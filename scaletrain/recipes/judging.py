"""Judge a recipe's claims by the figures of its runs."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scaletrain.recipes.recipe import Claim
from scaletrain.run.layout import RunDir
from scaletrain.scaling.measure import intervals, trainings
from scaletrain.scaling.measure.intervals import Mean
from scaletrain.scaling.measure.run import model_bytes, sent_bytes

Figures = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A claim and what the runs say about it."""

    claim: Claim
    value: Mean | None  # None: it could not be judged
    reason: str = ""  # why not

    @property
    def is_met(self) -> bool:
        """Whether the whole interval lies within the claim's limits."""
        if self.value is None:
            return False
        at_least, at_most = self.claim.at_least, self.claim.at_most
        is_high_enough = at_least is None or self.value.low >= at_least
        is_low_enough = at_most is None or self.value.high <= at_most
        return is_high_enough and is_low_enough

    def to_json(self) -> dict[str, Any]:
        """Return the verdict for a file of results."""
        limits = {"at_least": self.claim.at_least, "at_most": self.claim.at_most}
        value = self.value._asdict() if self.value else None
        return {
            "says": self.claim.says,
            "rule": rule(self.claim),
            **limits,
            "value": value,
            "met": self.is_met,
            "reason": self.reason,
        }


def figures(run_dir: Path) -> dict[str, float]:
    """Return the figures of a run that claims may name, once it has finished or diverged.

    ``diverged`` is 1 for a run that ended since its loss, gradients or weights were not finite any
    more, and 0 for any other. A diverged network is wrong about every sample: its ``test_error`` is
    1, and it has no further figures.

    The others are the numbers of its summary, ``test_error`` (1 - ``test_accuracy``), and
    ``model_bytes``: the size of the model's tensors, four bytes a parameter. Where the exchange
    counts them, ``sent_bytes`` are those that rank 0 sends in a step. With the callback
    ``compress`` they are also ``compressed_bytes``, the size of its file, and ``compression``, the
    times that this is smaller.
    """
    if has_diverged(run_dir):
        return {"diverged": 1.0, "test_accuracy": 0.0, "test_error": 1.0}
    summary = json.loads(RunDir(run_dir).summary.read_text(encoding="utf-8"))
    found = {"diverged": 0.0, **numbers(summary)}
    size = model_bytes(run_dir)
    if size is not None:
        found["model_bytes"] = float(size)
    sent = sent_bytes(run_dir)
    if sent is not None:
        found["sent_bytes"] = sent
    compressed = RunDir(run_dir).compressed
    if compressed.exists():
        found["compressed_bytes"] = float(compressed.stat().st_size)
        if size is not None:
            found["compression"] = size / compressed.stat().st_size
    return found


def numbers(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a summary or an evaluation, and ``test_error``."""
    found = {}
    for key, value in summary.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            found[key] = float(value)
    if "test_accuracy" in found:
        found["test_error"] = 1 - found["test_accuracy"]
    return found


def has_diverged(run_dir: Path) -> bool:
    """Return True if a run ended since its loss, gradients or weights were not finite."""
    return not RunDir(run_dir).has_finished() and trainings.diverged(run_dir) is not None


def judge(claim: Claim, run_dirs: Mapping[str, Sequence[Path]]) -> Verdict:
    """Judge a claim.

    Args:
        claim: the claim.
        run_dirs: of each variant, by seed.
    """
    values: dict[str, list[float]] = {}
    for variant in (claim.of, claim.to):
        if variant is None:
            continue
        values[variant] = []
        for seed, run_dir in enumerate(run_dirs[variant]):
            reason = _fault(claim, run_dir)
            if reason:
                return Verdict(claim, None, f"{variant}, seed {seed}: {reason}")
            values[variant].append(figures(run_dir)[claim.figure])
    ours = values[claim.of]
    if claim.to is None:
        return Verdict(claim, intervals.mean(ours))
    theirs = values[claim.to]
    if claim.by == "difference":
        differences = [own - other for own, other in zip(ours, theirs, strict=True)]
        return Verdict(claim, intervals.mean(differences))
    if sum(theirs) == 0:
        return Verdict(claim, None, f"{claim.figure} of {claim.to} is 0")
    return Verdict(claim, intervals.ratio(ours, theirs))


def _fault(claim: Claim, run_dir: Path) -> str | None:
    """Return why a run cannot be judged; None if it can."""
    if not RunDir(run_dir).has_finished() and not has_diverged(run_dir):
        return trainings.read_failure(run_dir) or "has not run"
    known = figures(run_dir)
    if claim.figure not in known:
        return f"has no figure {claim.figure} (there are: {', '.join(sorted(known))})"
    return None


def rule(claim: Claim) -> str:
    """Return a claim's rule in a few words, such as ``test_error, a / b <= 0.9``."""
    measured = claim.of
    if claim.to is not None:
        sign = "/" if claim.by == "ratio" else "-"
        measured = f"{claim.of} {sign} {claim.to}"
    left = "" if claim.at_least is None else f"{claim.at_least:g} <= "
    right = "" if claim.at_most is None else f" <= {claim.at_most:g}"
    return f"{claim.figure}: {left}{measured}{right}"
