"""Slow links: over which connections the kernel moved less, while it had data, than over others.

1. Connections between two processes make up a link. Where processes lie on several hosts, only
   links between hosts count, and its ends are hosts: memory is faster than any network.
2. A host is slow if everything that it sends and receives is slower than the links that do not
   touch it. Those alone are a yardstick: in a tree, most links may end at the slow host. In a ring,
   the link before them waits for the slow one, and is slower than the others as well.
3. Else a link by itself is slow if it is slower than the median of the others, and so is all that
   goes through its port: links that share a port wait for each other.
4. A link loses packets if many more of its segments were sent again than of the others'.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from scaletrain.run.culprit import Culprit, Kind
from scaletrain.run.links import Connection, LinkSample
from scaletrain.run.slow_ranks import FEWEST, SHARE, Cost, RankSteps, StepTable, mean_cost

_SLOW = 2.5  # times slower than others: fan-out alone makes links unequal
_APART = 1.25  # times slower than each link that may only wait for it
_TIMES = 2  # between samples; less often, it may be the machine
_LEAST_BYTES = 256 << 10  # moved in a window: less says nothing about a speed
_RETRANSMITS = 5  # segments, and ...
_LOSS_SHARE = 0.002  # ... this part of all: fewer are usual where queues are short
_LOSS_FACTOR = 5  # times the median link's part


@dataclasses.dataclass(frozen=True)
class ServerLinks:
    """What one parameter server wrote down."""

    index: int
    links: Sequence[LinkSample]


def slow_links(
    ranks: Sequence[RankSteps], servers: Sequence[ServerLinks], table: StepTable
) -> list[Culprit]:
    """Return the host or link that is slow or loses packets, if there is one.

    Args:
        ranks: all ranks of a job, or those that are known.
        servers: its parameter servers, if it has any.
        table: the steps of these ranks. Only what moved while they were done is looked at.
    """
    if len(table.steps) < FEWEST:
        return []
    began = min(each.records[0].time for each in ranks)
    links = _comparable(_links(ranks, servers, began))
    suspicion = _lossy(links) or _slow_host(links) or _slow_link(links)
    if suspicion is None or suspicion.share.value < SHARE:
        return []
    # Packets that were sent again are seen one by one. That a link is slow is an inference.
    if suspicion.kind is Kind.SLOW_LINK and suspicion.share.low <= 0:
        return []
    mean_step_s = table.mean_step_s
    ends = suspicion.ends
    return [
        Culprit(
            kind=suspicion.kind,
            ranks=tuple(sorted(end.rank for end in ends if end.rank is not None)),
            servers=tuple(sorted(end.server for end in ends if end.server is not None)),
            hosts=tuple(dict.fromkeys(end.host for end in ends)),
            cost_s=suspicion.share.value * mean_step_s,
            low_s=suspicion.share.low * mean_step_s,
            high_s=suspicion.share.high * mean_step_s,
            step_s=mean_step_s,
            first_step=table.steps[0].number,
            last_step=table.steps[-1].number,
            link=suspicion.link,
            detail=suspicion.detail,
        )
    ]


# Links


@dataclasses.dataclass(frozen=True)
class _End:
    """A process at one end of links."""

    name: str  # with its host; an address, if it is none of the job's known processes
    host: str  # empty: not known
    rank: int | None = None
    server: int | None = None

    @classmethod
    def of_rank(cls, rank: int, host: str) -> "_End":
        return cls(f"rank {rank} on {host}" if host else f"rank {rank}", host, rank=rank)

    @classmethod
    def of_server(cls, index: int, host: str) -> "_End":
        return cls(f"server {index} on {host}" if host else f"server {index}", host, server=index)


class _Moved(NamedTuple):
    """What moved over the connections between two processes, between two samples."""

    num_bytes: int
    busy_s: float
    segments: int
    retransmits: int
    elapsed_s: float

    @classmethod
    def of(
        cls, pairs: Sequence[tuple[Connection | None, Connection]], elapsed_s: float
    ) -> "_Moved":
        """Return what the counters say: earlier ones, if the connection was there, and later."""
        num_bytes, segments, retransmits = 0, 0, 0
        busy_s = 0.0
        for before, connection in pairs:
            num_bytes += connection.acked_bytes - (before.acked_bytes if before else 0)
            segments += connection.segments - (before.segments if before else 0)
            retransmits += connection.retransmits - (before.retransmits if before else 0)
            # Several connections between two ends send at the same time.
            busy_s = max(busy_s, connection.busy_s - (before.busy_s if before else 0.0))
        return cls(num_bytes, busy_s, segments, retransmits, elapsed_s)

    def lost_share(self, usual: float) -> float:
        """Return the part of the time that it took longer than at the usual speed."""
        return (self.busy_s - self.num_bytes / usual) / self.elapsed_s


@dataclasses.dataclass(frozen=True)
class _Link:
    """What moved from one process to another."""

    source: _End
    target: _End
    moved: Sequence[_Moved]  # from one sample to the next
    between_hosts: bool = False  # and its ends count as hosts

    @property
    def num_bytes(self) -> int:
        return sum(each.num_bytes for each in self.moved)

    @property
    def busy_s(self) -> float:
        return sum(each.busy_s for each in self.moved)

    @property
    def segments(self) -> int:
        return sum(each.segments for each in self.moved)

    @property
    def retransmits(self) -> int:
        return sum(each.retransmits for each in self.moved)

    @property
    def bytes_per_s(self) -> float:
        return self.num_bytes / self.busy_s if self.busy_s else math.inf

    @property
    def loss(self) -> float:
        return self.retransmits / self.segments if self.segments else 0.0

    @property
    def places(self) -> tuple[str, str]:
        """Where it begins and where it ends: two hosts or, on one host, two processes."""
        if self.between_hosts:
            return self.source.host, self.target.host
        return self.source.name, self.target.name


def _comparable(links: Sequence[_Link]) -> list[_Link]:
    """Return the links that carry enough; of several hosts, those between them."""
    carrying = [link for link in links if link.num_bytes >= _LEAST_BYTES]
    between = []
    for link in carrying:
        hosts = {link.source.host, link.target.host}
        if len(hosts) == 2 and "" not in hosts:
            between.append(dataclasses.replace(link, between_hosts=True))
    return between or carrying


def _links(ranks: Sequence[RankSteps], servers: Sequence[ServerLinks], began: float) -> list[_Link]:
    """Return what moved between each two processes of the job since a time."""
    samples: dict[_End, Sequence[LinkSample]] = {}
    for each in ranks:
        samples[_End.of_rank(each.rank, each.host)] = each.links
    for server in servers:
        if server.links:
            end = _End.of_server(server.index, server.links[-1].host)
            samples[end] = server.links
    owner: dict[str, _End] = {}
    for end, of_end in samples.items():
        for sample in of_end:
            for connection in sample.connections:
                owner[connection.local] = end
    links = []
    for source, of_source in samples.items():
        by_target: dict[_End, list[_Moved]] = {}
        for earlier, later in itertools.pairwise(_since(of_source, began)):
            for target, pairs in _pairs(earlier, later, owner).items():
                # A server's file may be left from an earlier job, whose workers are not these.
                if target != source and (source.server is None or target.rank is not None):
                    moved = _Moved.of(pairs, later.time - earlier.time)
                    by_target.setdefault(target, []).append(moved)
        for target, moves in by_target.items():
            links.append(_Link(source, target, moves))
    return links


def _pairs(
    earlier: LinkSample, later: LinkSample, owner: Mapping[str, _End]
) -> dict[_End, list[tuple[Connection | None, Connection]]]:
    """Return the counters of each connection at two samples, by the process at its other end."""
    before = {(each.local, each.remote): each for each in earlier.connections}
    by_target: dict[_End, list[tuple[Connection | None, Connection]]] = {}
    for connection in later.connections:
        target = owner.get(connection.remote) or _End(connection.remote, "")
        pair = before.get((connection.local, connection.remote)), connection
        by_target.setdefault(target, []).append(pair)
    return by_target


def _since(samples: Sequence[LinkSample], began: float) -> Sequence[LinkSample]:
    """Return the samples since the last one before a time; two at least, if there are two."""
    num_before = len([sample for sample in samples if sample.time <= began])
    first = max(0, min(num_before - 1, len(samples) - 2))
    return samples[first:]


# Suspicions


@dataclasses.dataclass(frozen=True)
class _Suspicion:
    """A host or link that may hold up the others."""

    kind: Kind
    ends: Sequence[_End]
    share: Cost  # of the time: what the worst link took longer than at the usual speed
    link: tuple[str, str] | None  # its two ends; None: a whole host
    detail: str


def _lossy(links: Sequence[_Link]) -> _Suspicion | None:
    """Return the host or link that loses packets."""
    lossy = [link for link in links if _loses(link, _without(link, links))]
    if not lossy:
        return None
    worst = max(lossy, key=lambda link: link.loss)
    usual = statistics.median(link.bytes_per_s for link in links)
    detail = f"{worst.loss:.1%} of its segments were sent again; {_against(worst, usual)}"
    return _suspicion(Kind.LOSS, lossy, worst, links, usual, detail)


def _loses(link: _Link, others: Sequence[_Link]) -> bool:
    if not others or link.retransmits < _RETRANSMITS or link.loss < _LOSS_SHARE:
        return False
    return link.loss >= _LOSS_FACTOR * statistics.median_low(other.loss for other in others)


def _slow_host(links: Sequence[_Link]) -> _Suspicion | None:
    """Return the host all of whose links are slow, by the links of the others."""
    places = sorted({place for link in links for place in link.places})
    for place in places:
        own = [link for link in links if place in link.places]
        others = [link for link in links if place not in link.places]
        if len(own) < 2 or not others:
            continue
        usual, slowest = _yardstick(others)
        sent = [link for link in own if link.places[0] == place]
        received = [link for link in own if link.places[1] == place]
        # Each link by itself, and the port that they share: that alone makes links slow, too.
        rates = [link.bytes_per_s for link in own]
        rates += [_port_rate(each) for each in (sent, received) if each]
        is_slow = usual >= _SLOW * max(rates) and slowest >= _APART * max(rates)
        if is_slow and all(_stays_slow(link, usual) for link in own):
            worst = min(own, key=lambda link: link.bytes_per_s)
            ends = _ends_at(place, own)
            return _Suspicion(
                Kind.SLOW_LINK, ends, _lost_share(own, usual), None, _against(worst, usual)
            )
    return None


def _yardstick(links: Sequence[_Link]) -> tuple[float, float]:
    """Return the usual speed of links, and that of the slowest that counts."""
    rates = [link.bytes_per_s for link in links]
    if all(link.between_hosts for link in links):
        # One of two may wait for the slow host: the other one tells what is usual.
        return statistics.median_high(rates), min(rates)
    # Within a host, links are as fast as its cores have time. No single one is a yardstick.
    usual = statistics.median_low(rates)
    return usual, usual


def _port_rate(links: Sequence[_Link]) -> float:
    """Return what moved through a port, in bytes a second, at most.

    Links that share a port are slower for it. They may have been busy at the same time.
    """
    busy_s = max(link.busy_s for link in links)
    num_bytes = sum(link.num_bytes for link in links)
    return num_bytes / busy_s if busy_s else math.inf


def _stays_slow(link: _Link, usual: float) -> bool:
    """Return True if a link was slow from one sample to the next more than once.

    A busy machine holds up a process for a moment.
    """
    times = 0
    for each in link.moved:
        times += each.num_bytes > 0 and each.num_bytes / usual * _SLOW <= each.busy_s
    return times >= _TIMES


def _slow_link(links: Sequence[_Link]) -> _Suspicion | None:
    """Return the slowest link that is slower than the median of the others."""
    slow = []
    for link in links:
        others = [other.bytes_per_s for other in _without(link, links)]
        if not others:
            continue
        # The lower one: of two links, the slower one is not its own yardstick.
        usual = statistics.median_low(others)
        source, target = link.places
        sent = [other for other in links if other.places[0] == source]
        received = [other for other in links if other.places[1] == target]
        # One of two links that share a port may be last each time: then the port is not slow.
        fastest = max(link.bytes_per_s, _port_rate(sent), _port_rate(received))
        if usual >= _SLOW * fastest and _stays_slow(link, usual):
            slow.append(link)
    if not slow:
        return None
    worst = min(slow, key=lambda link: link.bytes_per_s)
    usual = statistics.median(link.bytes_per_s for link in links)
    return _suspicion(Kind.SLOW_LINK, slow, worst, links, usual, _against(worst, usual))


def _suspicion(
    kind: Kind,
    found: Sequence[_Link],
    worst: _Link,
    links: Sequence[_Link],
    usual: float,
    detail: str,
) -> _Suspicion:
    """Return the host whose links all are among those found, else the worst link."""
    share = _lost_share(found, usual)
    for place in worst.places:
        own = [link for link in links if place in link.places]
        is_whole = len(own) >= 2 and all(link in found for link in own)
        if is_whole and all(place in link.places for link in found):
            return _Suspicion(kind, _ends_at(place, own), share, None, detail)
    ends = (worst.source, worst.target)
    return _Suspicion(kind, ends, share, (worst.source.name, worst.target.name), detail)


def _without(link: _Link, links: Sequence[_Link]) -> list[_Link]:
    return [other for other in links if other is not link]


def _ends_at(place: str, links: Sequence[_Link]) -> list[_End]:
    """Return the processes of links that lie at a place."""
    ends: dict[_End, None] = {}
    for link in links:
        for end, at in zip((link.source, link.target), link.places, strict=True):
            if at == place:
                ends[end] = None
    return list(ends)


def _lost_share(links: Sequence[_Link], usual: float) -> Cost:
    """Return the part of the time that the worst link took longer than at the usual speed."""
    costs = []
    for link in links:
        costs.append(mean_cost([each.lost_share(usual) for each in link.moved]))
    return max(costs, key=lambda cost: cost.value)


def _against(link: _Link, usual: float) -> str:
    return f"{_rate(link.bytes_per_s)} against {_rate(usual)} of the median link"


def _rate(bytes_per_s: float) -> str:
    return f"{8 * bytes_per_s / 1e6:,.3g} Mbit/s"
