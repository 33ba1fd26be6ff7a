"""The culprit: which rank, host or link the others wait for, and why, from records alone.

``find`` is a pure function of what each rank wrote down by itself. ``scaletrain top`` calls it on
the last steps, the end of every run and the report on all of them.

1. Steps are looked at in windows of 20. In each step, the time that a rank itself took for a part
   (input, forward, backward, optimizer; waits are left out) is compared with the median of the
   other ranks. A rank is slow if the median of these differences costs a tenth of a step or more,
   beyond doubt: the interval of the median comes from order statistics, so a few odd steps of a
   busy machine do not matter.
2. What the garbage collector and other processes took from each part is measured, too. It is
   compared by itself, and left out of the parts: noise of a busy machine is no work of a rank.
3. A rank that is held up only now and then counts if it is the same rank again and again. If it is
   another rank each time, the slowness rotates, and no rank is to blame.
4. A link is slow if the kernel moved less over it, while it had data, than over the others.

Who waits shows the slow rank's time in its own waits, in step with it: that is why only what a rank
did itself is compared. A backward pass ends for itself with its last gradient.
"""

import dataclasses
import enum
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from scaletrain.run.links import Connection, LinkSample
from scaletrain.run.records import StepRecord

WINDOW = 20  # steps that are looked at together
SHARE = 0.1  # of a step: less is not worth a word
_FEWEST = 10  # steps: with fewer, one odd step could decide
_LEAST_S = 2e-4  # a step: less than this is bookkeeping
# One-sided error of the bounds of a median, for each rank, part and window. There are many of them.
_ERROR = 0.0005
# A rank is held up now and then if it takes this many times its usual time longer ...
_STALL = 0.5
_STALLS = 3  # ... in so many steps of a window, ...
_SAME = 0.8  # ... and this part of them is one rank's
_TURNS = 6  # steps: slowness rotates if so many stall, and ...
_MOST_OF_TURNS = 0.6  # ... no rank has more of them
_ROTATING_SHARE = 0.3  # of a step: noise that rotates is usual below
_SLOW_LINK = 2.5  # times slower than the median link: fan-out alone makes links unequal
_LINK_BYTES = 256 << 10  # moved in a window: less says nothing about a speed
_RETRANSMITS = 5  # segments, and ...
_LOSS_SHARE = 0.002  # ... this part of all: fewer are usual where queues are short
_LOSS_FACTOR = 5  # times the median link's part


class Kind(enum.StrEnum):
    """Why the others wait. Files hold the values."""

    INPUT = "input"
    FORWARD = "forward"
    BACKWARD = "backward"
    OPTIMIZER = "optimizer"
    STOLEN_CORES = "stolen cores"
    GARBAGE = "garbage collection"
    SLOW_LINK = "slow link"
    LOSS = "loss"
    STOPPED = "stopped"
    DEAD = "dead"
    SILENT = "silent"  # dead or stopped: it runs on another machine, which alone knows


_PARTS = {
    "input": Kind.INPUT,
    "forward": Kind.FORWARD,
    "backward": Kind.BACKWARD,
    "optimizer": Kind.OPTIMIZER,
}

_ADVICE = {
    Kind.INPUT: "more loader_workers, or data nearer to that worker",
    Kind.FORWARD: "a smaller share for it, or a look at its host (clocks, temperature)",
    Kind.BACKWARD: "a smaller share for it, or a look at its host (clocks, temperature)",
    Kind.OPTIMIZER: "a look at what runs between backward and the next step there",
    Kind.STOLEN_CORES: "end what else runs there, or use fewer threads",
    Kind.GARBAGE: "gc.freeze() after the start, or collect at the same step on all ranks",
    Kind.SLOW_LINK: "a look at its cable, port and neighbours, or an exchange that sends less",
    Kind.LOSS: "a look at its cable, port and queues: packets are sent again",
    Kind.STOPPED: "the process may be stopped, or hang",
    Kind.DEAD: "its log says more",
    Kind.SILENT: "it may be dead, stopped or hang: look at its process on that host",
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
class Culprit:
    """Who holds up the others, and why."""

    kind: Kind
    ranks: tuple[int, ...]  # empty: another rank each time, or all alike
    hosts: tuple[str, ...]  # of these ranks
    cost_s: float  # seconds a step that the others wait
    low_s: float  # with the next one, an interval of the cost: 99.9 % for a rank that stays slow
    high_s: float
    step_s: float  # of a median step in these steps
    first_step: int
    last_step: int
    rotates: bool = False  # another rank each time
    link: tuple[str, str] | None = None  # its two ends, such as ``rank 1 on h1``
    detail: str = ""  # further facts in words, such as a link's speed

    @property
    def share(self) -> float:
        """The part of a step that it costs."""
        return self.cost_s / self.step_s if self.step_s else 0.0

    @property
    def total_s(self) -> float:
        """Seconds that it cost in all of its steps."""
        return self.cost_s * (self.last_step - self.first_step + 1)

    @property
    def who(self) -> str:
        """The subject of a sentence, such as ``rank 1 on h1``."""
        if self.link is not None:
            return f"the link from {self.link[0]} to {self.link[1]}"
        if not self.ranks:
            return "another rank each time" if self.rotates else "all ranks"
        numbers = ", ".join(map(str, self.ranks))
        ranks = f"rank {numbers}" if len(self.ranks) == 1 else f"ranks {numbers}"
        on_hosts = ", ".join(host for host in self.hosts if host)
        return f"{ranks} on {on_hosts}" if on_hosts else ranks

    def sentence(self) -> str:
        """Return one plain line: who, what, how much, how sure, when, and what to do."""
        advice = _ADVICE[self.kind]
        if self.kind in (Kind.STOPPED, Kind.DEAD, Kind.SILENT):
            detail = f": {self.detail}" if self.detail else ""
            return f"{self.who}: {self.kind}{detail} ({advice})"
        facts = f"{_ms(self.cost_s)} a step longer"
        if self.high_s > self.low_s:
            facts += f" ({_number(self.low_s)} to {_number(self.high_s)})"
        facts += " than on the others"
        facts += f", {self.share:.0%} of a step, in steps {self.first_step:,} to {self.last_step:,}"
        detail = f"; {self.detail}" if self.detail else ""
        return f"{self.who}: {self.kind} takes {facts}{detail} ({advice})"

    def to_json(self) -> dict[str, object]:
        """Return it as a report holds it."""
        return {**dataclasses.asdict(self), "kind": str(self.kind), "sentence": self.sentence()}


def halted(kind: Kind, rank: int, host: str, detail: str) -> Culprit:
    """Return a rank that does no more steps, for which the others wait without end."""
    return Culprit(kind, (rank,), (host,), 0.0, 0.0, 0.0, 0.0, 0, 0, detail=detail)


def find(ranks: Sequence[RankSteps]) -> list[Culprit]:
    """Return who held up the others, the most expensive first; nothing if nobody did.

    Steps are compared by their numbers. Where ranks are not in step (asynchronous training), their
    newest steps are.

    Args:
        ranks: all ranks of a job, or those that are known. One alone has nobody to be compared
            with.
    """
    if len(ranks) < 2:
        return []
    ranks = sorted(ranks, key=lambda each: each.rank)
    table = _Table.of(ranks)
    culprits = []
    for window in table.windows():
        culprits += _slow_ranks(window)
    merged = _merge(culprits)
    merged += _slow_links(ranks, table)
    return sorted(merged, key=lambda culprit: -culprit.total_s)


# Steps


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step of all ranks, in the order of the ranks."""

    number: int
    step_s: float  # of the slowest rank
    by_kind: Mapping[Kind, Sequence[float]]  # work in each part, and what was taken from it
    own_s: Sequence[float]  # all of it together


@dataclasses.dataclass(frozen=True)
class _Table:
    """The steps that all ranks have done."""

    ranks: Sequence[int]
    hosts: Sequence[str]
    steps: Sequence[_Step]

    @classmethod
    def of(cls, ranks: Sequence[RankSteps]) -> "_Table":
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

    def windows(self) -> "list[_Table]":
        """Return the steps in windows; the last one overlaps, so that each is full."""
        windows = []
        for end in range(len(self.steps), 0, -WINDOW):
            begin = max(0, end - WINDOW)
            if end - begin >= _FEWEST:
                windows.append(dataclasses.replace(self, steps=self.steps[begin:end]))
        return windows[::-1]

    @property
    def median_step_s(self) -> float:
        return statistics.median(step.step_s for step in self.steps)

    def culprit(self, kind: Kind, ranks: Sequence[int], cost: "_Cost") -> Culprit:
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
class _Cost:
    """Seconds a step, with an interval."""

    value: float
    low: float
    high: float


def _slow_ranks(window: _Table) -> list[Culprit]:
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


def _slow_rank(window: _Table, place: int) -> Culprit | None:
    """Return a rank of a window as a culprit if it stays slower than the others."""
    floor_s = max(_LEAST_S, SHARE * window.median_step_s)
    excess = [_excess(step.own_s, place) for step in window.steps]
    # A rank that is slow in one part and as much faster in another holds up nobody.
    if statistics.median(excess) < floor_s:
        return None
    culprit = None
    for kind in window.steps[0].by_kind:
        cost = _median([_excess(step.by_kind[kind], place) for step in window.steps])
        if cost.low >= floor_s and (culprit is None or cost.value > culprit.cost_s):
            culprit = window.culprit(kind, [place], cost)
    return culprit


def _stalls(window: _Table) -> Culprit | None:
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
    cost = _mean([*costs, *[0.0] * (len(window.steps) - len(costs))])
    (most, count), *_ = Counter(place for place, _ in stalled).most_common(1)
    is_one_rank = count >= max(_STALLS, _SAME * len(stalled))
    kinds: Counter[Kind] = Counter()
    for place, step in stalled:
        kinds[max(step.by_kind, key=lambda each: _excess(step.by_kind[each], place))] += 1
    kind = kinds.most_common(1)[0][0]
    # Shares count against the mean: a step that stalls is far from the median.
    mean_s = statistics.fmean(step.step_s for step in window.steps)
    if cost.low <= 0:
        return None
    if is_one_rank and cost.value >= SHARE * mean_s:
        return window.culprit(kind, [most], cost)
    rotates = len(stalled) >= _TURNS and count <= _MOST_OF_TURNS * len(stalled)
    if rotates and cost.value >= _ROTATING_SHARE * mean_s:
        return dataclasses.replace(window.culprit(kind, [], cost), rotates=True)
    return None


def _excess(values: Sequence[float], place: int) -> float:
    """Return by how much one rank's value exceeds the median of the others'."""
    others = [*values[:place], *values[place + 1 :]]
    # The lower one of two: a second slow rank is no yardstick.
    return values[place] - statistics.median_low(others)


def _median(values: Sequence[float]) -> _Cost:
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
    return _Cost(statistics.median(ordered), ordered[cut], ordered[-1 - cut])


def _mean(values: Sequence[float]) -> _Cost:
    mean = statistics.fmean(values)
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    return _Cost(mean, max(0.0, mean - half), mean + half)


def _merge(culprits: Iterable[Culprit]) -> list[Culprit]:
    """Return culprits of single windows, with those that go on in the next window as one."""
    merged: list[Culprit] = []
    for culprit in culprits:
        before = next((each for each in reversed(merged) if _is_same(each, culprit)), None)
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


def _is_same(one: Culprit, other: Culprit) -> bool:
    return (one.kind, one.ranks, one.rotates) == (other.kind, other.ranks, other.rotates)


# Links


@dataclasses.dataclass(frozen=True)
class _Link:
    """What moved from one rank to a peer between two samples."""

    source: int  # rank
    peer: str  # the other end: a rank's number, or a server's address
    num_bytes: int
    busy_s: float
    segments: int
    retransmits: int

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / self.busy_s if self.busy_s else math.inf

    @property
    def loss(self) -> float:
        return self.retransmits / self.segments if self.segments else 0.0


def _slow_links(ranks: Sequence[RankSteps], table: _Table) -> list[Culprit]:
    """Return the link that is slow or loses packets, if there is one."""
    if len(table.steps) < _FEWEST:
        return []
    began, ended = _span_s(ranks)
    links = [link for link in _links(ranks) if link.num_bytes >= _LINK_BYTES]
    num_steps = _steps_between(ranks, began, ended)
    if len(links) < 2 or not num_steps:
        return []
    hosts = {str(each.rank): each.host for each in ranks}
    lossy = [link for link in links if _is_lossy(link, links)]
    slow = [link for link in links if _slowness(link, links) >= _SLOW_LINK]
    kind, found = (Kind.LOSS, lossy) if lossy else (Kind.SLOW_LINK, slow)
    if not found:
        return []
    usual = statistics.median(link.bytes_per_s for link in links)
    worst = max(found, key=lambda link: link.loss if lossy else -link.bytes_per_s)
    worst_cost_s = max(link.busy_s - link.num_bytes / usual for link in found) / num_steps
    step_s = table.median_step_s
    if worst_cost_s < SHARE * step_s:
        return []
    end = _common_end(found, links)
    involved = [end] if end is not None else [str(worst.source), worst.peer]
    culprits = [name for name in involved if name in hosts]
    detail = f"{_rate(worst.bytes_per_s)} against {_rate(usual)} of the median link"
    if lossy:
        detail = f"{worst.loss:.1%} of its segments were sent again; {detail}"
    return [
        Culprit(
            kind=kind,
            ranks=tuple(int(name) for name in culprits),
            hosts=tuple(dict.fromkeys(hosts[name] for name in culprits)),
            cost_s=worst_cost_s,
            low_s=worst_cost_s,
            high_s=worst_cost_s,
            step_s=step_s,
            first_step=table.steps[0].number,
            last_step=table.steps[-1].number,
            link=None
            if end is not None
            else (_end(str(worst.source), hosts), _end(worst.peer, hosts)),
            detail=detail,
        )
    ]


def _is_lossy(link: _Link, links: Sequence[_Link]) -> bool:
    if link.retransmits < _RETRANSMITS or link.loss < _LOSS_SHARE:
        return False
    others = [other.loss for other in links if other is not link]
    return link.loss >= _LOSS_FACTOR * statistics.median_low(others)


def _slowness(link: _Link, links: Sequence[_Link]) -> float:
    """Return how many times as long as over the median of the other links a byte takes."""
    others = [other.bytes_per_s for other in links if other is not link]
    # The lower one: of two links, the slower one is not its own yardstick.
    return statistics.median_low(others) / link.bytes_per_s


def _common_end(found: Sequence[_Link], links: Sequence[_Link]) -> str | None:
    """Return the one end that all links of some share, and all of whose links they are."""
    ends = set.intersection(*[{str(link.source), link.peer} for link in found])
    whole = []
    for end in ends:
        of_end = [link for link in links if end in (str(link.source), link.peer)]
        if len(of_end) >= 2 and all(link in found for link in of_end):
            whole.append(end)
    return whole[0] if len(whole) == 1 else None


def _end(name: str, hosts: Mapping[str, str]) -> str:
    if name not in hosts:
        return name
    return f"rank {name} on {hosts[name]}" if hosts[name] else f"rank {name}"


def _links(ranks: Sequence[RankSteps]) -> list[_Link]:
    """Return what moved between each two ends, between the first and the last samples."""
    owner = {}
    for each in ranks:
        for sample in each.links:
            for connection in sample.connections:
                owner[connection.local] = str(each.rank)
    links = []
    for each in ranks:
        if len(each.links) < 2:
            continue
        before = {(c.local, c.remote): c for c in each.links[0].connections}
        by_peer: dict[str, list[tuple[Connection | None, Connection]]] = {}
        for connection in each.links[-1].connections:
            peer = owner.get(connection.remote, connection.remote)
            if peer != str(each.rank):
                earlier = before.get((connection.local, connection.remote))
                by_peer.setdefault(peer, []).append((earlier, connection))
        for peer, pairs in by_peer.items():
            links.append(_moved(each.rank, peer, pairs))
    return links


def _moved(source: int, peer: str, pairs: Sequence[tuple[Connection | None, Connection]]) -> _Link:
    """Return what moved over the connections between two ends."""
    num_bytes, segments, retransmits = 0, 0, 0
    busy_s = 0.0
    for earlier, connection in pairs:
        num_bytes += connection.acked_bytes - (earlier.acked_bytes if earlier else 0)
        segments += connection.segments - (earlier.segments if earlier else 0)
        retransmits += connection.retransmits - (earlier.retransmits if earlier else 0)
        # Several connections between two ends send at the same time.
        busy_s = max(busy_s, connection.busy_s - (earlier.busy_s if earlier else 0.0))
    return _Link(source, peer, num_bytes, busy_s, segments, retransmits)


def _span_s(ranks: Sequence[RankSteps]) -> tuple[float, float]:
    """Return the unix times of the first and the last sample, by each rank's own clock."""
    firsts = [each.links[0].time for each in ranks if len(each.links) > 1]
    lasts = [each.links[-1].time for each in ranks if len(each.links) > 1]
    return (min(firsts), max(lasts)) if firsts else (0.0, 0.0)


def _steps_between(ranks: Sequence[RankSteps], began: float, ended: float) -> int:
    """Return how many steps the slowest rank did between two times."""
    counts = []
    for each in ranks:
        counts.append(len([record for record in each.records if began < record.time <= ended]))
    return min(counts)


# Words


def _ms(seconds: float) -> str:
    return f"{_number(seconds)} ms"


def _number(seconds: float) -> str:
    """Return seconds as a number of milliseconds with three digits."""
    return f"{1000 * seconds:.3g}" if seconds < 1 else f"{1000 * seconds:,.0f}"


def _rate(bytes_per_s: float) -> str:
    return f"{8 * bytes_per_s / 1e6:,.3g} Mbit/s"
