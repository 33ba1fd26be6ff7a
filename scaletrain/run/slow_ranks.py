"""Slow ranks: who took longer for its own work than the others did for theirs.

1. Steps are looked at in windows of 20. In each step, the time that a rank itself took for a part
   (input, forward, backward, optimizer; waits are left out) is compared with the median of the
   other ranks. A rank is slow if the median of these differences costs a tenth of a step or more,
   beyond doubt: the interval of the median comes from order statistics, so a few odd steps of a
   busy machine do not matter.
2. What the garbage collector and other processes took from each part is measured, too. It is
   compared by itself, and left out of the parts: noise of a busy machine is no work of a rank.
   Cores are stolen from a rank if it loses half as much again as is usual at that time.
3. A rank that is held up only now and then counts if it is the same rank again and again. If it is
   another rank each time, the slowness rotates, and no rank is to blame.

Who waits shows the slow rank's time in its own waits, in step with it: that is why only what a rank
did itself is compared. A backward pass ends for itself with its last gradient.
"""

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from scaletrain.run.culprit import Culprit, Kind
from scaletrain.run.links import LinkSample
from scaletrain.run.records import StepRecord

WINDOW = 20  # steps that are looked at together
SHARE = 0.1  # of a step: less is not worth a word
FEWEST = 10  # steps: with fewer, one odd step could decide
_LEAST_S = 2e-4  # a step: less than this is bookkeeping
# One-sided error of the bounds of a median, for each rank, part and window. There are many of them.
_ERROR = 0.0005
_MORE_STOLEN = 0.5  # of the time without a core that is usual: less is a busy machine's noise
# A rank is held up now and then if it takes this many times its usual time longer ...
_STALL = 0.5
_STALLS = 3  # ... in so many steps of a window, ...
_SAME = 0.8  # ... and this part of them is one rank's
_TURNS = 6  # steps: slowness rotates if so many stall, and ...
_MOST_OF_TURNS = 0.6  # ... no rank has more of them
_ROTATING_SHARE = 0.3  # of a step: noise that rotates is usual below

_PARTS = {
    "input": Kind.INPUT,
    "forward": Kind.FORWARD,
    "backward": Kind.BACKWARD,
    "optimizer": Kind.OPTIMIZER,
}


@dataclasses.dataclass(frozen=True)
class RankSteps:
    """What one rank wrote down."""

    rank: int
    host: str
    records: Sequence[StepRecord]
    links: Sequence[LinkSample] = ()
    # Whether the wait inside backward was measured; not so on GPUs.
    knows_backward: bool = True

    def newest(self, count: int) -> "RankSteps":
        """Return the same with its newest steps alone."""
        return dataclasses.replace(self, records=self.records[-count:])


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step of all ranks, in the order of the ranks."""

    number: int
    step_s: float  # of the slowest rank
    by_kind: Mapping[Kind, Sequence[float]]  # work in each part, and what was taken from it
    own_s: Sequence[float]  # all of it together


@dataclasses.dataclass(frozen=True)
class StepTable:
    """The steps that all ranks have done."""

    ranks: Sequence[int]
    hosts: Sequence[str]
    steps: Sequence[_Step]

    @classmethod
    def of(cls, ranks: Sequence[RankSteps]) -> "StepTable":
        parts = [part for part in _PARTS if part != "backward"]
        if all(each.knows_backward for each in ranks):
            parts = [*_PARTS]
        steps = []
        for number, records in _side_by_side([each.records for each in ranks]):
            work = [record.work_s() for record in records]
            own = [record.own_s() for record in records]
            by_kind = {_PARTS[part]: [each[part] for each in work] for part in parts}
            by_kind[Kind.GARBAGE] = [record.gc_s for record in records]
            by_kind[Kind.STOLEN_CORES] = [record.stolen_s or 0.0 for record in records]
            steps.append(
                _Step(
                    number=number,
                    step_s=max(record.step_s for record in records),
                    by_kind=by_kind,
                    own_s=[sum(each[part] for part in parts) for each in own],
                )
            )
        return cls([each.rank for each in ranks], [each.host for each in ranks], steps)

    def windows(self) -> "list[StepTable]":
        """Return the steps in windows; the last one overlaps, so that each is full."""
        windows = []
        for end in range(len(self.steps), 0, -WINDOW):
            begin = max(0, end - WINDOW)
            if end - begin >= FEWEST:
                windows.append(dataclasses.replace(self, steps=self.steps[begin:end]))
        return windows[::-1]

    @property
    def median_step_s(self) -> float:
        return statistics.median(step.step_s for step in self.steps)

    @property
    def mean_step_s(self) -> float:
        return statistics.fmean(step.step_s for step in self.steps)

    def culprit(self, kind: Kind, ranks: Sequence[int], cost: "Cost") -> Culprit:
        """Return the culprit of this window. ``ranks`` are places in this table."""
        return Culprit(
            kind=kind,
            ranks=tuple(self.ranks[place] for place in ranks),
            hosts=tuple(dict.fromkeys(self.hosts[place] for place in ranks)),
            cost_s=cost.value,
            low_s=cost.low,
            high_s=cost.high,
            step_s=self.median_step_s,
            first_step=self.steps[0].number,
            last_step=self.steps[-1].number,
        )


def _side_by_side(
    ranks: Sequence[Sequence[StepRecord]],
) -> list[tuple[int, list[StepRecord]]]:
    """Return steps with the record of each rank, in the order of the steps.

    Ranks in step have the same numbers. Others have, at the end of their files, other ones.
    """
    by_number = [{record.step: record for record in records} for records in ranks]
    common = sorted(set.intersection(*[set(records) for records in by_number]))
    shortest = min(len(records) for records in by_number)
    if 2 * len(common) >= shortest:
        return [(number, [records[number] for records in by_number]) for number in common]
    newest = [sorted(records)[-shortest:] for records in by_number]
    rows = []
    for numbers in zip(*newest, strict=True):
        row = [records[number] for records, number in zip(by_number, numbers, strict=True)]
        rows.append((min(numbers), row))
    return rows


@dataclasses.dataclass(frozen=True)
class Cost:
    """Seconds a step, with an interval."""

    value: float
    low: float
    high: float


def slow_ranks(table: StepTable) -> list[Culprit]:
    """Return the ranks that stay slow for a while, or that stall again and again."""
    culprits = []
    for window in table.windows():
        culprits += _of_window(window)
    return _merge(culprits)


def _of_window(window: StepTable) -> list[Culprit]:
    """Return the ranks of a window that stay slow, else those that stall."""
    culprits = []
    for place in range(len(window.ranks)):
        culprit = _slow_rank(window, place)
        if culprit is not None:
            culprits.append(culprit)
    if culprits:
        return culprits
    stall = _stalls(window)
    return [] if stall is None else [stall]


def _slow_rank(window: StepTable, place: int) -> Culprit | None:
    """Return a rank of a window as a culprit if it stays slower than the others."""
    floor_s = max(_LEAST_S, SHARE * window.median_step_s)
    excess = [_excess(step.own_s, place) for step in window.steps]
    # A rank that is slow in one part and as much faster in another holds up nobody.
    if statistics.median(excess) < floor_s:
        return None
    culprit = None
    for kind in window.steps[0].by_kind:
        least_s = floor_s
        if kind is Kind.STOLEN_CORES:
            # On a busy machine, all ranks lose their cores for a while, and some more than others.
            usual = [statistics.median_low(step.by_kind[kind]) for step in window.steps]
            least_s = max(floor_s, _MORE_STOLEN * statistics.median(usual))
        cost = _median([_excess(step.by_kind[kind], place) for step in window.steps])
        if cost.low >= least_s and (culprit is None or cost.value > culprit.cost_s):
            culprit = window.culprit(kind, [place], cost)
    return culprit


def _stalls(window: StepTable) -> Culprit | None:
    """Return the culprit of steps that take much longer than the median one, if there is one."""
    if len(window.steps) < WINDOW:
        return None  # a start has odd steps
    # The usual own time of the usual rank: where every step stalls, so does the median step.
    usual_s = statistics.median(statistics.median_low(step.own_s) for step in window.steps)
    stalled: list[tuple[int, _Step]] = []  # (place of the slowest rank, step)
    for step in window.steps:
        place = max(range(len(step.own_s)), key=lambda each: step.own_s[each])
        if _excess(step.own_s, place) >= max(_LEAST_S, _STALL * usual_s):
            stalled.append((place, step))
    if len(stalled) < _STALLS:
        return None
    costs = [_excess(step.own_s, place) for place, step in stalled]
    cost = mean_cost([*costs, *[0.0] * (len(window.steps) - len(costs))])
    (most, count), *_ = Counter(place for place, _ in stalled).most_common(1)
    is_one_rank = count >= max(_STALLS, _SAME * len(stalled))
    kinds: Counter[Kind] = Counter()
    for place, step in stalled:
        kinds[max(step.by_kind, key=lambda each: _excess(step.by_kind[each], place))] += 1
    kind = kinds.most_common(1)[0][0]
    # Shares count against the mean: a step that stalls is far from the median.
    mean_s = window.mean_step_s
    if cost.low <= 0:
        return None
    if is_one_rank and cost.value >= SHARE * mean_s:
        return dataclasses.replace(window.culprit(kind, [most], cost), step_s=mean_s)
    rotates = len(stalled) >= _TURNS and count <= _MOST_OF_TURNS * len(stalled)
    if rotates and cost.value >= _ROTATING_SHARE * mean_s:
        return dataclasses.replace(window.culprit(kind, [], cost), step_s=mean_s, rotates=True)
    return None


def _excess(values: Sequence[float], place: int) -> float:
    """Return by how much one rank's value exceeds the median of the others'."""
    others = [*values[:place], *values[place + 1 :]]
    # The lower one of two: a second slow rank is no yardstick.
    return values[place] - statistics.median_low(others)


def _median(values: Sequence[float]) -> Cost:
    """Return the median, and an interval of it by order statistics (Conover, 1999, section 3.2)."""
    ordered = sorted(values)
    count = len(ordered)
    # The largest number of values below the median that is still too unlikely.
    cut = 0
    below = 0.5**count
    while cut < count // 2:
        next_below = below + math.comb(count, cut + 1) * 0.5**count
        if next_below > _ERROR:
            break
        below = next_below
        cut += 1
    return Cost(statistics.median(ordered), ordered[cut], ordered[-1 - cut])


def mean_cost(values: Sequence[float]) -> Cost:
    """Return the mean and its 95 % interval; of one value, that value alone."""
    mean = statistics.fmean(values)
    freedom = len(values) - 1
    if freedom < 1:
        return Cost(mean, mean, mean)
    half = _student(freedom) * statistics.stdev(values) / math.sqrt(len(values))
    return Cost(mean, max(0.0, mean - half), mean + half)


def _student(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t distribution, to 2 %."""
    few = {1: 12.706, 2: 4.303, 3: 3.182}
    if freedom in few:
        return few[freedom]
    # The expansion of Cornish and Fisher.
    return 1.96 + 2.372 / freedom + 2.824 / freedom**2


def _merge(culprits: Iterable[Culprit]) -> list[Culprit]:
    """Return culprits of single windows, with those that go on in the next window as one."""
    merged: list[Culprit] = []
    for culprit in culprits:
        before = next((each for each in reversed(merged) if each.key == culprit.key), None)
        if before is None or culprit.first_step - before.last_step > WINDOW:
            merged.append(culprit)
            continue
        steps = before.last_step - before.first_step + 1
        new_steps = max(0, culprit.last_step - before.last_step)
        old, new = steps / (steps + new_steps), new_steps / (steps + new_steps)
        together = dataclasses.replace(
            before,
            cost_s=old * before.cost_s + new * culprit.cost_s,
            low_s=min(before.low_s, culprit.low_s),
            high_s=max(before.high_s, culprit.high_s),
            step_s=old * before.step_s + new * culprit.step_s,
            last_step=max(before.last_step, culprit.last_step),
        )
        merged[merged.index(before)] = together
    return merged
