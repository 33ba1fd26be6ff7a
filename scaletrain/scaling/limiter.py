"""Where the time went: what a step takes beyond its ideal, split by cause, from records alone."""

from typing import NamedTuple

from scaletrain.scaling.intervals import ONE_RUN


class Step(NamedTuple):
    """Mean seconds of a step and its parts, over ranks, steps and repeats; ``slowest_s``: of the slowest rank of each step."""

    step_s: float
    slowest_s: float
    input_s: float
    compute_s: float  # forward and backward
    update_s: float


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
    - communication: the rest of what the exchange adds.
    """
    share = 1 / workers if strong else 1.0
    added = real.step_s - alone.step_s
    straggling = max(0.0, min(alone.slowest_s - alone.step_s, added)) if waits else 0.0
    causes = [
        Cause("communication", added - straggling),
        Cause("stragglers", straggling),
        Cause("input", alone.input_s - single.input_s * share),
        Cause("optimizer", alone.update_s - single.update_s * share),
        Cause("stolen cores", alone.compute_s - small.compute_s),
        Cause("small batch", small.compute_s - single.compute_s * share),
    ]
    loss = real.step_s - single.step_s * share if loss_s is None else loss_s
    return [*causes, Cause("unexplained", loss - sum(cause.seconds for cause in causes))]


def limiter(causes: list[Cause]) -> Cause | None:
    """The cause that costs most; None when nothing is lost."""
    worst = max(causes, key=lambda cause: cause.seconds)
    return worst if worst.seconds > 0 else None


def sentence(causes: list[Cause], efficiency: float, better: str | None = None, repeats: int = 2) -> str:
    """One sentence: the limiter, its share of what is lost, and what to change. ``better``: a measured or predicted alternative.
    ``repeats``: of the least measured of the runs that it rests on; with one it says that noise is not known."""
    doubt = f" ({ONE_RUN})" if repeats < 2 else ""
    worst = limiter(causes)
    lost = sum(cause.seconds for cause in causes if cause.seconds > 0)
    if worst is None or efficiency >= 0.98:
        return f"Nothing to speak of is lost (efficiency {efficiency:.2f}){doubt}."
    gained = -sum(cause.seconds for cause in causes if cause.seconds < 0)
    if gained > lost / 2:  # what is left is smaller than what cancels: a difference of noises
        return (
            f"No cause can be named: {1000 * lost:.3g} ms a step of losses and {1000 * gained:.3g} ms of gains nearly cancel;"
            f" more repeats, on a machine that does nothing else{doubt}."
        )
    share = worst.seconds / lost
    return f"{worst.name.capitalize()}: {share:.0%} of the loss; {better or ADVICE[worst.name]}{doubt}."
