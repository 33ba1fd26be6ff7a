"""Made-up synchronous runs, of which it is known who held up the others."""

import random

from scaletrain.run.culprit import Kind
from scaletrain.run.records import StepRecord
from scaletrain.run.slow_ranks import RankSteps

USUAL = {"input": 0.002, "forward": 0.010, "backward": 0.020, "optimizer": 0.003}


def made_up(
    size: int,
    steps: int,
    seed: int,
    slow: dict[int, tuple[Kind, float]] | None = None,
    since: int = 0,
    noise: float = 0.05,
    every: int = 1,
) -> list[RankSteps]:
    """Return the records of a synchronous run.

    Every rank's waits are what it has left until the slowest rank's last gradient is there, as in
    a real run: backward_s alone is longest on the ranks that are not slow.

    Args:
        size: of the job, with two ranks a host.
        steps: how many.
        seed: of the noise.
        slow: by rank: why and by how many seconds a step it is slower.
        since: from this step on.
        noise: standard deviation of a part's time, relative.
        every: only each so many steps are slower.
    """
    noises = random.Random(seed)
    records: list[list[StepRecord]] = [[] for _ in range(size)]
    for step in range(steps):
        own, gc_s, stolen_s = [], [0.0] * size, [0.0] * size
        taken: list[dict[str, float]] = [{} for _ in range(size)]
        for rank in range(size):
            parts = {name: s * noises.lognormvariate(0, noise) for name, s in USUAL.items()}
            kind, extra_s = (slow or {}).get(rank, (None, 0.0))
            if kind is not None and step >= since and step % every == 0:
                extra_s *= noises.lognormvariate(0, noise)
                if kind is Kind.GARBAGE:
                    gc_s[rank] = extra_s
                    taken[rank] = {"forward": extra_s}
                    parts["forward"] += extra_s
                elif kind is Kind.STOLEN_CORES:
                    stolen_s[rank] = extra_s
                    taken[rank] = {"forward": extra_s / 3, "backward": extra_s * 2 / 3}
                    parts["forward"] += extra_s / 3
                    parts["backward"] += extra_s * 2 / 3
                else:
                    parts[str(kind)] += extra_s
            own.append(parts)
        ready = [parts["input"] + parts["forward"] + parts["backward"] for parts in own]
        for rank, parts in enumerate(own):
            wait_s = max(ready) - ready[rank] + 0.004
            records[rank].append(
                StepRecord(
                    step=step,
                    rank=rank,
                    time=1e9 + 0.05 * step,
                    loss=1.0,
                    samples=8,
                    lr=0.1,
                    step_s=ready[rank] + wait_s + parts["optimizer"],
                    input_s=parts["input"],
                    forward_s=parts["forward"],
                    backward_s=parts["backward"] + wait_s,
                    update_s=parts["optimizer"],
                    exchange={"wait_in_backward_s": wait_s},
                    gc_s=gc_s[rank],
                    stolen_s=stolen_s[rank],
                    taken_s=taken[rank],
                )
            )
    return [RankSteps(rank, f"h{rank // 2}", records[rank]) for rank in range(size)]
