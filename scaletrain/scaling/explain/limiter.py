"""Where the time went: what a step takes beyond its ideal, split by cause, from records alone."""

from typing import NamedTuple

from scaletrain.scaling.measure.intervals import MANY, ONE_RUN, enough

WELL = 0.98  # an efficiency from which on nothing to speak of is lost
LITTLE = 0.05  # how well an efficiency that good must be known
WHOLE = 0.05  # of the loss: what the causes may leave over, or take too much
CLEAR = 1.25  # times the second cause: what the largest must be to be called the limiter


class Step(NamedTuple):
    """Mean seconds of a step and its parts, over ranks, steps and repeats; ``slowest_s``: of the slowest rank of each step."""

    step_s: float
    slowest_s: float
    input_s: float
    compute_s: float  # forward and backward
    update_s: float
    waited_s: float | None = (
        None  # within ``compute_s``: after the last gradient of its own; None: not known
    )


class Cause(NamedTuple):
    """A reason, and by how much it lengthens the step. Negative: it shortens it (a smaller batch may fit a cache better)."""

    name: str
    seconds: float


ADVICE = {
    "communication": "send less (16 bits, fewer or larger exchanges), another exchange, a faster link, or more work per step",
    "stragglers": "find the slow worker, give every worker the same share, or use backup workers or bounded staleness",
    "input": "more loader_workers, or data nearer to the workers",
    "optimizer": "it is the same on every worker however many there are: a fused or sharded optimizer, or a larger batch",
    "stolen cores": "fewer workers or threads a host: they share cores or memory bandwidth",
    "small batch": "a larger global batch (weak scaling): each worker's share is too small to run at full speed",
    "unexplained": "more repeats: the references and the cell were not measured under the same conditions",
}


def split(
    real: Step,
    alone: Step,
    small: Step,
    single: Step,
    *,
    workers: int,
    strong: bool,
    waits: bool = True,
    loss_s: float | None = None,
) -> list[Cause]:
    """The loss as a sum of causes; what they leave over is called unexplained. ``loss_s``: the loss, where it was measured in another way
    (by throughput) than as ``real.step_s - ideal``.

    ``real``: the cell. ``alone``: the same workers with the exchange ``none``. ``small``: one worker with one worker's share of the
    batch. ``single``: one worker with the whole batch (strong) or its share (weak); the ideal is its step divided by the workers
    (strong) or its step (weak). ``waits``: whether a step waits for the slowest worker (synchronous exchanges).

    - small batch: a share's forward and backward on one worker beyond 1/workers of the whole batch's;
    - stolen cores: the same work beside the other workers, which do not communicate;
    - input, optimizer: beyond their ideal share;
    - stragglers: slowest rank less the mean rank where nobody waits, at most what an exchange adds to the step;
    - communication: the rest of what the exchange adds. Where it is known how long a rank waited for gradients, forward and backward that
      take longer without this wait are stolen cores as well: the exchange's own work took them.
    """
    share = 1 / workers if strong else 1.0
    added = real.step_s - alone.step_s
    stolen = 0.0 if real.waited_s is None else real.compute_s - real.waited_s - alone.compute_s
    straggling = max(0.0, min(alone.slowest_s - alone.step_s, added - stolen)) if waits else 0.0
    causes = [
        Cause("communication", added - stolen - straggling),
        Cause("stragglers", straggling),
        Cause("input", alone.input_s - single.input_s * share),
        Cause("optimizer", alone.update_s - single.update_s * share),
        Cause("stolen cores", alone.compute_s - small.compute_s + stolen),
        Cause("small batch", small.compute_s - single.compute_s * share),
    ]
    loss = real.step_s - single.step_s * share if loss_s is None else loss_s
    return [*causes, Cause("unexplained", loss - sum(cause.seconds for cause in causes))]


def limiter(causes: list[Cause]) -> Cause | None:
    """The cause that costs most; None when nothing is lost."""
    worst = max(causes, key=lambda cause: cause.seconds)
    return worst if worst.seconds > 0 else None


def untold(
    causes: list[Cause],
    efficiency: float,
    ci95: float | None = None,
    lead_ci95: float | None = None,
    repeats: int = 2,
) -> str | None:
    """Why no cause can be called the limiter, in a sentence; None where one can, or where nothing is lost.

    ``ci95``: of the efficiency. ``lead_ci95``: of what the largest cause costs beyond the second. None: not known.
    """
    lost_share, loss_s = 1 - efficiency, sum(cause.seconds for cause in causes)
    costs = sorted(
        (cause for cause in causes if cause.seconds > 0), key=lambda cause: -cause.seconds
    )
    both = " and ".join(
        f"{cause.name} ({1000 * cause.seconds:.3g} ms{' a step' * (cause is costs[0])})"
        for cause in costs[:2]
    )
    wanted = lost_share / 2 if efficiency < WELL else LITTLE
    if ci95 is not None and ci95 > wanted:
        what, largest = "from none", ""
        if ci95 < lost_share:
            what, largest = "to within half of it", f" as measured, {both} cost most;"
        return (
            f"The repeats do not tell the loss {what} (efficiency {efficiency:.2f} ± {ci95:.2f});{largest}"
            f" {_would_tell(repeats, ci95, wanted)}."
        )
    if not costs or efficiency >= WELL:
        return None
    gained = -sum(cause.seconds for cause in causes if cause.seconds < 0)
    if gained > loss_s:  # what is left is smaller than what cancels: a difference of noises
        return (
            f"No cause can be named: {1000 * (loss_s + gained):.3g} ms a step of losses and {1000 * gained:.3g} ms of gains"
            " nearly cancel; more repeats may tell."
        )
    if len(costs) < 2:
        return None
    worst, second, *_ = costs
    if worst.seconds < CLEAR * second.seconds:
        return f"No cause stands out: {both} cost about the same."
    lead = worst.seconds - second.seconds
    if lead_ci95 is not None and lead <= lead_ci95:
        return (
            f"The repeats do not tell which costs more, {both}: their difference is known to ± {1000 * lead_ci95:.3g} ms;"
            f" {_would_tell(repeats, lead_ci95, lead)}."
        )
    return None


def _would_tell(repeats: int, ci95: float, wanted: float) -> str:
    needed = enough(repeats, ci95, wanted)
    return (
        f"about {needed} repeats would tell"
        if needed
        else f"it would take more than {MANY} repeats to tell"
    )


def sentence(
    causes: list[Cause],
    efficiency: float,
    better: str | None = None,
    repeats: int = 2,
    *,
    ci95: float | None = None,
    lead_ci95: float | None = None,
) -> str:
    """One sentence: the limiter, its share of the loss, and what to change; or that the measurements do not tell (``untold``).

    ``better``: a measured or predicted alternative. ``repeats``: of the least measured of the runs that it rests on; with one it says
    that noise is not known.
    """
    doubt = f" ({ONE_RUN})" if repeats < 2 else ""
    if why := untold(causes, efficiency, ci95, lead_ci95, max(2, repeats)):
        return f"{why.removesuffix('.')}{doubt}."
    worst = limiter(causes)
    if worst is None or efficiency >= WELL:
        return f"Nothing to speak of is lost (efficiency {efficiency:.2f}){doubt}."
    loss_s = sum(cause.seconds for cause in causes)
    share = (
        f"{worst.seconds / loss_s:.0%} of the loss" if worst.seconds <= loss_s
        else f"{1000 * worst.seconds:.3g} ms a step, of which other parts gain some back ({1000 * loss_s:.3g} ms are lost)"
    )  # fmt: skip
    rest = next((cause.seconds for cause in causes if cause.name == "unexplained"), 0.0) / loss_s
    gap = (
        f"; the causes add up to {1 - rest:.0%} of the loss"
        if abs(rest) > WHOLE and worst.name != "unexplained"
        else ""
    )
    return f"{worst.name.capitalize()}: {share}; {better or ADVICE[worst.name]}{gap}{doubt}."
