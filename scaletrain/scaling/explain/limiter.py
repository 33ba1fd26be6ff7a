"""Where the time went: a step's time beyond its ideal, split by cause, from records alone."""

import dataclasses
import enum
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from scaletrain.run.culprit import Culprit
from scaletrain.scaling.measure.intervals import MANY, ONE_RUN, enough
from scaletrain.units import plural

WELL = 0.98  # from this efficiency on, next to nothing is lost
LITTLE = 0.05  # half the width of the interval to which an efficiency that good must be known
WHOLE = 0.05  # share of the loss by which the causes may miss it before the report says so
CLEAR = 1.25  # times the second cause: only a larger cause is called the limiter


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


@dataclasses.dataclass(frozen=True)
class Wording:
    """How the report speaks of a cause."""

    verdict: str
    advice: str


WORDINGS = {
    "communication": Wording(
        "Communication is the bottleneck",
        "Send less (16 bits, fewer or larger exchanges), try another exchange or a faster link,"
        " or do more work per step.",
    ),
    "stragglers": Wording(
        "Stragglers are the bottleneck",
        "Find the slow worker, give every worker the same share, or use backup workers or bounded"
        " staleness.",
    ),
    "input": Wording(
        "Input is the bottleneck",
        "Use more loader_workers, or bring the data nearer to the workers.",
    ),
    "optimizer": Wording(
        "The optimizer is the bottleneck",
        "It costs the same on every worker, however many there are: use a fused or sharded"
        " optimizer, or a larger batch.",
    ),
    "stolen cores": Wording(
        "Stolen cores are the bottleneck",
        "Use fewer workers or threads a host: they share cores or memory bandwidth.",
    ),
    "small batch": Wording(
        "The small batch is the bottleneck",
        "Use a larger global batch (weak scaling): each worker's share is too small to run at full"
        " speed.",
    ),
    "unexplained": Wording(
        "The largest loss is unexplained",
        "Measure more repeats: the references and the cell were not measured under the same"
        " conditions.",
    ),
}


@dataclasses.dataclass(frozen=True)
class Evidence:
    """The lost time of one cell, and how well it is known."""

    causes: Sequence[Cause]
    efficiency: float
    ci95: float | None = None  # of the efficiency; None: not known
    lead_ci95: float | None = None  # of the seconds by which the largest cause leads the second
    repeats: int = 2  # of the least measured of the runs that it rests on
    workers: int = 2
    culprit: str | None = None  # who held up the others, in words; None: nobody stood out

    @property
    def loss_s(self) -> float:
        """Seconds a step that are lost, after the gains of some causes."""
        return sum(cause.seconds for cause in self.causes)

    @property
    def wanted_ci95(self) -> float:
        """The interval of the efficiency beyond which no cause is named."""
        # Half of the lost part: with a wider interval, most of the loss may be noise.
        # Near efficiency 1, that would ask for more repeats than anybody runs.
        return (1 - self.efficiency) / 2 if self.efficiency < WELL else LITTLE

    @property
    def is_efficiency_known(self) -> bool:
        """Whether the efficiency is known well enough to name a cause. One run shows no noise."""
        return self.ci95 is None or self.ci95 <= self.wanted_ci95

    @property
    def costs(self) -> list[Cause]:
        """The causes that lengthen the step, the largest first."""
        costs = [cause for cause in self.causes if cause.seconds > 0]
        return sorted(costs, key=lambda cause: -cause.seconds)

    @property
    def gained_s(self) -> float:
        """Seconds a step by which some causes shorten the step."""
        return -sum(cause.seconds for cause in self.causes if cause.seconds < 0)

    @property
    def lead_s(self) -> float:
        """Seconds a step by which the largest of several causes leads the second."""
        first, second, *_ = self.costs
        return first.seconds - second.seconds

    def efficiency_without(self, cause: Cause) -> float:
        """Return the efficiency that is left to reach if a cause were gone."""
        # The ideal step takes ``efficiency`` of the step, and the lost time the rest.
        step_s = self.loss_s / (1 - self.efficiency)
        ideal_s = self.efficiency * step_s
        # Where other causes are gains, one may cost more than the whole loss.
        return ideal_s / max(ideal_s, step_s - cause.seconds)


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
    - unexplained: the rest.

    Args:
        steps: the cell and its references.
        loss_s: seconds a step, if the loss was measured in another way (by throughput) than as the
            difference between the real step and the ideal one.
    """
    real, alone, small, single = steps.real, steps.alone, steps.small, steps.single
    # The single worker did the work of all in strong scaling, of one in weak scaling.
    share = 1 / steps.workers if steps.strong else 1.0
    added_s = real.step_s - alone.step_s
    stolen_s = 0.0
    if real.waited_s is not None:
        stolen_s = real.compute_s - real.waited_s - alone.compute_s
    straggling_s = 0.0
    if steps.waits:
        # Noise can make the exchange seem to shorten a step. Then nobody was waited for.
        straggling_s = max(0.0, min(alone.slowest_s - alone.step_s, added_s - stolen_s))
    # The references cancel: where parts add up to steps, the sum of the causes is
    # ``real.step_s - single.step_s * share``.
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


class HeldUp(NamedTuple):
    """Who held up the others, in words."""

    culprit: str  # who, why, how much and how sure
    remedy: str  # who, what to do, and the gain


def culprit_of(repeats: Sequence[Sequence[Culprit]]) -> HeldUp | None:
    """Return who held up the others in most repeats; None if nobody did.

    Args:
        repeats: the culprits of each repeat.
    """
    seen: Counter[tuple[object, ...]] = Counter()
    for culprits in repeats:
        # Once a repeat: a fault may come and go.
        seen.update({each.key for each in culprits})
    for key, count in seen.most_common():
        if 2 * count > len(repeats):
            same = [each for culprits in repeats for each in culprits if each.key == key]
            worst = max(same, key=lambda each: each.total_s)
            times = "" if len(repeats) == 1 else f", in {count} of {len(repeats)} repeats"
            return HeldUp(f"{worst.sentence()}{times}", worst.remedy())
    return None


def capitalized(text: str) -> str:
    """Return a text with its first letter as a capital; the others stay."""
    return text[:1].upper() + text[1:]


def limiter(causes: Sequence[Cause]) -> Cause | None:
    """Return the cause that costs most; None if nothing is lost."""
    worst = max(causes, key=lambda cause: cause.seconds)
    return worst if worst.seconds > 0 else None


class Doubt(enum.Enum):
    """Why no cause can be called the limiter, from the coarsest doubt to the finest."""

    LOSS = enum.auto()  # whether anything is lost
    GAINS = enum.auto()  # they cancel the losses: the rest is a difference of noises
    ORDER = enum.auto()  # the two largest causes cost about the same
    LEAD = enum.auto()  # noise hides which of the two costs more


def doubt(evidence: Evidence) -> Doubt | None:
    """Return why no cause can be called the limiter.

    None if one can be called so, or if nothing is lost.
    """
    costs = evidence.costs
    if not evidence.is_efficiency_known:
        return Doubt.LOSS
    if not costs or evidence.efficiency >= WELL:
        return None
    if evidence.gained_s > evidence.loss_s:
        return Doubt.GAINS
    # A single cause has no rival that it could be mistaken for.
    if len(costs) < 2:
        return None
    if costs[0].seconds < CLEAR * costs[1].seconds:
        return Doubt.ORDER
    if evidence.lead_ci95 is not None and evidence.lead_s <= evidence.lead_ci95:
        return Doubt.LEAD
    return None


def unidentified(evidence: Evidence) -> str | None:
    """Return in plain words why no cause can be called the limiter.

    None if one can be called so, or if nothing is lost.
    """
    why = doubt(evidence)
    if why is None:
        return None
    if why is Doubt.LOSS:
        return _too_noisy(evidence)
    if why is Doubt.GAINS:
        return (
            f"No cause can be named: losses of {_ms(evidence.loss_s + evidence.gained_s)} and gains"
            f" of {_ms(evidence.gained_s)} a step nearly cancel. More repeats may help."
        )
    two = _largest_two(evidence.costs)
    if why is Doubt.ORDER:
        return f"No cause stands out: {two} cost about the same."
    assert evidence.lead_ci95 is not None
    return (
        f"Too noisy to say which costs more, {two}: their difference is known"
        f" to ± {_ms(evidence.lead_ci95)}."
        f" {_repeats_needed(evidence, evidence.lead_ci95, evidence.lead_s)}"
    )


def _too_noisy(evidence: Evidence) -> str:
    """Return the sentences for an efficiency that is not known well enough to name a cause."""
    assert evidence.ci95 is not None
    efficiency = (
        f"efficiency {evidence.efficiency:.2f} ± {evidence.ci95:.2f}"
        f" after {evidence.repeats} repeats"
    )
    needed = _repeats_needed(evidence, evidence.ci95, evidence.wanted_ci95)
    # The interval reaches efficiency 1, at which nothing is lost.
    if evidence.ci95 >= 1 - evidence.efficiency:
        return f"Too noisy to say whether anything is lost: {efficiency}. {needed}"
    largest = f"As measured, {_largest_two(evidence.costs)} cost most."
    return f"Too noisy to name a cause: {efficiency}. {largest} {needed}"


def sentence(evidence: Evidence, alternative: str | None = None) -> str:
    """Return the limiter, its share of the lost time and some advice, for people.

    Or that the measurements do not identify a limiter.

    Args:
        evidence: the lost time, and how well it is known.
        alternative: a sentence about a measured or predicted better exchange, in place of general
            advice.
    """
    return " ".join(filter(None, [finding(evidence), advice(evidence, alternative)]))


def finding(evidence: Evidence) -> str:
    """Return the limiter and its share of the lost time, or why none can be named."""
    sentences = [unidentified(evidence) or _verdict(evidence)]
    # Whoever holds up the others is known from their own times, however noisy the repeats are.
    if evidence.culprit is not None:
        sentences.append(f"{capitalized(evidence.culprit)}.")
    if evidence.repeats < 2:
        sentences.append(f"{ONE_RUN.capitalize()}.")
    return " ".join(sentences)


def advice(evidence: Evidence, alternative: str | None = None) -> str:
    """Return what to change, with the gain; or what to do before anything is changed."""
    why = doubt(evidence)
    if why in (Doubt.LOSS, Doubt.GAINS):
        return "Add repeats before changing anything (a larger --repeats with the same --out)."
    costs = evidence.costs
    if not costs or evidence.efficiency >= WELL:
        return "Nothing has to change: more workers may pay."
    worst = costs[0]
    if why is not None:
        second = costs[1]
        return (
            f"Either of two changes may help. For {worst.name}: {_advice_on(worst)} For {second.name}:"
            f" {_advice_on(second)} Efficiency would be {evidence.efficiency_without(worst):.2f}"
            f" without the first loss, {evidence.efficiency_without(second):.2f} without the"
            f" second, instead of {evidence.efficiency:.2f}."
        )
    if alternative is not None:
        return alternative
    return (
        f"{WORDINGS[worst.name].advice} Without this loss, efficiency would be"
        f" {evidence.efficiency_without(worst):.2f} instead of {evidence.efficiency:.2f}."
    )


def _advice_on(cause: Cause) -> str:
    """Return the advice on a cause as it goes on after a colon."""
    text = WORDINGS[cause.name].advice
    return text[:1].lower() + text[1:]


def _verdict(evidence: Evidence) -> str:
    """Return the limiter and its share of the lost time."""
    on_workers = f"on {plural(evidence.workers, 'worker')}"
    worst = limiter(evidence.causes)
    if worst is None or evidence.efficiency >= WELL:
        return f"Next to nothing is lost {on_workers}: efficiency {evidence.efficiency:.2f}."
    wording = WORDINGS[worst.name]
    loss_s = evidence.loss_s
    # A cause can cost more than is lost, if others gain time. A share above 100 % would
    # puzzle the reader, so this one is told in milliseconds.
    if worst.seconds <= loss_s:
        share = f"{_percent(worst.seconds / loss_s)} of the lost time."
    else:
        share = f"{_ms(worst.seconds)} a step. Other parts gain some back: {_ms(loss_s)} are lost."
    sentences = [f"{wording.verdict} {on_workers}: {share}"]
    rest = dict(evidence.causes).get("unexplained", 0.0) / loss_s
    if abs(rest) > WHOLE and worst.name != "unexplained":
        sentences.append(f"The causes add up to {_percent(1 - rest)} of the lost time.")
    return " ".join(sentences)


def _largest_two(costs: Sequence[Cause]) -> str:
    first = f"{costs[0].name} ({_ms(costs[0].seconds)} a step)"
    if len(costs) < 2:
        return first
    return f"{first} and {costs[1].name} ({_ms(costs[1].seconds)})"


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _repeats_needed(evidence: Evidence, ci95: float, wanted: float) -> str:
    """Return how many repeats would narrow an interval to the wanted width."""
    needed = enough(max(2, evidence.repeats), ci95, wanted)
    if needed is None:
        return f"More than {MANY} repeats would be needed."
    return f"About {needed} repeats would be enough."
