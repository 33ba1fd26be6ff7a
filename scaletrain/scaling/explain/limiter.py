"""Where the time went: what a step takes beyond its ideal, split by cause, from records alone."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from scaletrain.scaling.measure.intervals import MANY, ONE_RUN, enough

WELL = 0.98  # from this efficiency on, next to nothing is lost
LITTLE = 0.05  # half the width of the interval to which an efficiency that good must be known
WHOLE = 0.05  # share of the loss by which the causes may miss it before the report says so
CLEAR = 1.25  # times the second cause: what the largest must be to be called the limiter


@dataclasses.dataclass(frozen=True)
class MeanStep:
    """Mean seconds of a step and its parts, over ranks, steps and repeats."""

    step_s: float
    slowest_s: float  # of the slowest rank of each step
    input_s: float
    compute_s: float  # forward and backward
    update_s: float
    # Within ``compute_s``: from the rank's own last gradient until the means of all are there.
    waited_s: float | None = None  # None: the exchange does not say


@dataclasses.dataclass(frozen=True)
class Steps:
    """A cell of several workers and the three references that its lost time is split with."""

    real: MeanStep  # the cell
    alone: MeanStep  # the same workers with the exchange ``none``
    small: MeanStep  # one worker with one worker's share of the batch
    single: MeanStep  # one worker with the whole batch (strong scaling) or its share (weak scaling)
    workers: int
    strong: bool
    waits: bool = True  # whether a step waits for the slowest worker (synchronous exchanges)


class Cause(NamedTuple):
    """A reason why a step takes longer than its ideal."""

    name: str
    seconds: float  # a step; negative: it shortens the step (a smaller batch may fit a cache)


ADVICE = {
    "communication": "send less (16 bits, fewer or larger exchanges), another exchange, a faster link, or more work per step",
    "stragglers": "find the slow worker, give every worker the same share, or use backup workers or bounded staleness",
    "input": "more loader_workers, or data nearer to the workers",
    "optimizer": "it is the same on every worker however many there are: a fused or sharded optimizer, or a larger batch",
    "stolen cores": "fewer workers or threads a host: they share cores or memory bandwidth",
    "small batch": "a larger global batch (weak scaling): each worker's share is too small to run at full speed",
    "unexplained": "more repeats: the references and the cell were not measured under the same conditions",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What is known about the lost time of one cell, and how well."""

    causes: Sequence[Cause]
    efficiency: float
    ci95: float | None = None  # of the efficiency; None: not known
    lead_ci95: float | None = None  # of the seconds by which the largest cause leads the second
    repeats: int = 2  # of the least measured of the runs that it rests on

    @property
    def loss_s(self) -> float:
        """Seconds a step that are lost, net of what some causes gain."""
        return sum(cause.seconds for cause in self.causes)

    @property
    def costs(self) -> list[Cause]:
        """The causes that lengthen the step, the largest first."""
        costs = [cause for cause in self.causes if cause.seconds > 0]
        return sorted(costs, key=lambda cause: -cause.seconds)


def split(steps: Steps, loss_s: float | None = None) -> list[Cause]:
    """Return the loss as a sum of causes.

    The ideal step is the single worker's, divided by the workers in strong scaling.

    - small batch: forward and backward of a share on one worker, beyond 1/workers of the whole
      batch's;
    - stolen cores: the same work beside the other workers, which do not communicate;
    - input, optimizer: beyond their ideal share;
    - stragglers: the slowest rank less the mean rank where nobody waits, at most what an exchange
      adds to the step;
    - communication: the rest of what the exchange adds. If it is known how long a rank waited for
      gradients, forward and backward that take longer without this wait are stolen cores as well:
      the exchange's own work took them;
    - unexplained: what these leave over.

    Args:
        steps: the cell and its references.
        loss_s: seconds a step, if the loss was measured in another way (by throughput) than as the
            difference between the real step and the ideal one.
    """
    real, alone, small, single = steps.real, steps.alone, steps.small, steps.single
    share = 1 / steps.workers if steps.strong else 1.0
    added_s = real.step_s - alone.step_s
    stolen_s = 0.0
    if real.waited_s is not None:
        stolen_s = real.compute_s - real.waited_s - alone.compute_s
    straggling_s = 0.0
    if steps.waits:
        straggling_s = max(0.0, min(alone.slowest_s - alone.step_s, added_s - stolen_s))
    causes = [
        Cause("communication", added_s - stolen_s - straggling_s),
        Cause("stragglers", straggling_s),
        Cause("input", alone.input_s - single.input_s * share),
        Cause("optimizer", alone.update_s - single.update_s * share),
        Cause("stolen cores", alone.compute_s - small.compute_s + stolen_s),
        Cause("small batch", small.compute_s - single.compute_s * share),
    ]
    if loss_s is None:
        loss_s = real.step_s - single.step_s * share
    explained_s = sum(cause.seconds for cause in causes)
    return [*causes, Cause("unexplained", loss_s - explained_s)]


def limiter(causes: Sequence[Cause]) -> Cause | None:
    """Return the cause that costs most; None if nothing is lost."""
    worst = max(causes, key=lambda cause: cause.seconds)
    return worst if worst.seconds > 0 else None


def unidentified(evidence: Evidence) -> str | None:
    """Return in a sentence why no cause can be called the limiter.

    None if one can be called so, or if nothing is lost.
    """
    costs = evidence.costs
    repeats = max(2, evidence.repeats)
    lost_share = 1 - evidence.efficiency
    wanted = lost_share / 2 if evidence.efficiency < WELL else LITTLE
    if evidence.ci95 is not None and evidence.ci95 > wanted:
        what, largest = "from none", ""
        if evidence.ci95 < lost_share:
            what = "to within half of it"
            largest = f" as measured, {_largest_two(costs)} cost most;"
        return (
            f"The repeats do not tell the loss {what}"
            f" (efficiency {evidence.efficiency:.2f} ± {evidence.ci95:.2f});{largest}"
            f" {_repeats_needed(repeats, evidence.ci95, wanted)}."
        )
    if not costs or evidence.efficiency >= WELL:
        return None
    gained_s = -sum(cause.seconds for cause in evidence.causes if cause.seconds < 0)
    if gained_s > evidence.loss_s:
        # What is left is smaller than what cancels: a difference of noises.
        return (
            f"No cause can be named: {_ms(evidence.loss_s + gained_s)} a step of losses and"
            f" {_ms(gained_s)} of gains nearly cancel; more repeats may tell."
        )
    if len(costs) < 2:
        return None
    lead_s = costs[0].seconds - costs[1].seconds
    if costs[0].seconds < CLEAR * costs[1].seconds:
        return f"No cause stands out: {_largest_two(costs)} cost about the same."
    if evidence.lead_ci95 is not None and lead_s <= evidence.lead_ci95:
        return (
            f"The repeats do not tell which costs more, {_largest_two(costs)}: their difference is"
            f" known to ± {_ms(evidence.lead_ci95)};"
            f" {_repeats_needed(repeats, evidence.lead_ci95, lead_s)}."
        )
    return None


def sentence(evidence: Evidence, alternative: str | None = None) -> str:
    """Return one sentence: the limiter, its share of the loss, and what to change.

    Or that the measurements do not identify one.

    Args:
        evidence: what is known about the lost time.
        alternative: a measured or predicted better exchange, in place of general advice.
    """
    doubt = f" ({ONE_RUN})" if evidence.repeats < 2 else ""
    reason = unidentified(evidence)
    if reason:
        return f"{reason.removesuffix('.')}{doubt}."
    worst = limiter(evidence.causes)
    if worst is None or evidence.efficiency >= WELL:
        return f"Nothing to speak of is lost (efficiency {evidence.efficiency:.2f}){doubt}."
    loss_s = evidence.loss_s
    if worst.seconds <= loss_s:
        share = f"{worst.seconds / loss_s:.0%} of the loss"
    else:
        share = (
            f"{_ms(worst.seconds)} a step, of which other parts gain some back"
            f" ({_ms(loss_s)} are lost)"
        )
    return (
        f"{worst.name.capitalize()}: {share}; {alternative or ADVICE[worst.name]}"
        f"{_gap(worst, evidence)}{doubt}."
    )


def _gap(worst: Cause, evidence: Evidence) -> str:
    """Return what to say if the causes do not add up to the loss; empty if they do."""
    rest = 0.0
    for cause in evidence.causes:
        if cause.name == "unexplained":
            rest = cause.seconds / evidence.loss_s
    if abs(rest) <= WHOLE or worst.name == "unexplained":
        return ""
    return f"; the causes add up to {1 - rest:.0%} of the loss"


def _largest_two(costs: Sequence[Cause]) -> str:
    first = f"{costs[0].name} ({_ms(costs[0].seconds)} a step)"
    if len(costs) < 2:
        return first
    return f"{first} and {costs[1].name} ({_ms(costs[1].seconds)})"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def _repeats_needed(repeats: int, ci95: float, wanted: float) -> str:
    needed = enough(repeats, ci95, wanted)
    if needed is None:
        return f"it would take more than {MANY} repeats to tell"
    return f"about {needed} repeats would tell"
