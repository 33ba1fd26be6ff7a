"""Slow links: over which connections the kernel moved less, while it had data, than over others."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

from scaletrain.run.culprit import Culprit, Kind
from scaletrain.run.links import Connection
from scaletrain.run.slow_ranks import FEWEST, SHARE, RankSteps, StepTable

_SLOW_LINK = 2.5  # times slower than the median link: fan-out alone makes links unequal
_LINK_BYTES = 256 << 10  # moved in a window: less says nothing about a speed
_RETRANSMITS = 5  # segments, and ...
_LOSS_SHARE = 0.002  # ... this part of all: fewer are usual where queues are short
_LOSS_FACTOR = 5  # times the median link's part


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


def slow_links(ranks: Sequence[RankSteps], table: StepTable) -> list[Culprit]:
    """Return the link that is slow or loses packets, if there is one."""
    if len(table.steps) < FEWEST:
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


def _rate(bytes_per_s: float) -> str:
    return f"{8 * bytes_per_s / 1e6:,.3g} Mbit/s"
