"""The seconds that a schedule takes on a network of given latency, bandwidth and duplex.

The model goes round by round. A round lasts as long as its busiest link takes,
``messages x latency + bytes / bandwidth``, and rounds follow one another. This is the alpha-beta
model of Hockney (Parallel Computing 1994), used as in Thakur et al., IJHPCA 2005. Links are the
ports of hosts and, in a fat tree, the uplinks of leaves: the bytes that cross each are counted,
since a ring sends one chunk out of a leaf where halving sends those of all its hosts. FireCaffe's
server against its tree (Iandola et al., CVPR 2016, section 4) falls out of it: the centre of the
star handles p - 1 messages each way, the root of the tree log2(p).

>>> ethernet = Network(latency_s=50e-6, bandwidth_bytes_per_s=125e6)
>>> round(predict("ring", 4, 25_000_000, ethernet), 4)
0.3003
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from scaletrain import plugins
from scaletrain.collectives.schedule import Pipeline, Round, Schedule, Transfer

# From this number of ranks on, an algorithm's function ``loads`` is used if it has one.
LOADS_FROM_RANKS = 128


class Link(NamedTuple):
    """One port into a network, or the memory that ranks of one host share."""

    latency_s: float  # per message: software and wire
    bandwidth_bytes_per_s: float  # of each direction; without duplex, of both together
    duplex: bool = True  # sends and receives at the same time, each at full bandwidth


class Network(NamedTuple):
    """Equal ports to a network, which only congests in the uplinks of leaves.

    ``Network(50e-6, 125e6)`` is 1 Gbit/s Ethernet with one rank a host. With ``ranks_per_host``
    above 1, consecutive ranks share a host. Its port carries the messages of all of them to other
    hosts. With ``hosts_per_leaf`` above 0, consecutive hosts share a leaf of a fat tree. Its
    uplinks together are ``oversubscription`` times narrower than the ports of a full leaf.
    """

    latency_s: float  # per message
    bandwidth_bytes_per_s: float  # of each direction; without duplex, of both together
    duplex: bool = True
    ranks_per_host: int = 1
    local: Link | None = (
        None  # for messages inside a host; None: they cost the port's latency alone
    )
    reduce_bytes_per_s: float = float("inf")  # how fast a rank adds received messages
    hosts_per_leaf: int = 0  # 0: one switch joins all hosts
    oversubscription: float = 1.0

    @property
    def uplink_bytes_per_s(self) -> float:
        """The rate of a leaf's uplinks together, in each direction; infinite without leaves."""
        if not self.hosts_per_leaf:
            return float("inf")
        return self.bandwidth_bytes_per_s * self.hosts_per_leaf / self.oversubscription


class Load(NamedTuple):
    """The load of the busiest links in some equal rounds.

    Amounts are fractions of the whole message.
    """

    repeats: int  # number of equal rounds
    messages: int  # the larger of the numbers sent and received, since both go at once
    one_way: float  # the larger of the amounts that a rank sends and receives
    both_ways: float  # their sum
    added: float = 0.0  # the amount that is added on arrival
    uplink: float = 0.0  # the largest amount that leaves or enters a leaf


def loads_of(schedule: Schedule, hosts_per_leaf: int = 0) -> list[Load]:
    """Return the load of every round of an explicit schedule, with one rank a host.

    Args:
        schedule: the schedule.
        hosts_per_leaf: as in ``Network``.
    """
    rounds = schedule.rounds
    return [_load_of(transfers, schedule.num_chunks, hosts_per_leaf) for transfers in rounds]


Uplink = tuple[int, bool]  # a leaf, and whether bytes leave it


def crossings(transfers: Iterable[tuple[int, ...]], hosts_per_leaf: int) -> int:
    """Return how many transfers cross the busiest uplink in its busier direction.

    Args:
        transfers: each begins with the sending and the receiving host.
        hosts_per_leaf: as in ``Network``.
    """
    crossed: Counter[Uplink] = Counter()
    for source, target, *_ in transfers:
        crossed.update(_uplinks(source, target, hosts_per_leaf))
    return max(crossed.values(), default=0)


def _uplinks(source: int, target: int, hosts_per_leaf: int) -> tuple[Uplink, ...]:
    """Return the uplinks that a message between two hosts crosses."""
    if not hosts_per_leaf:
        return ()
    from_leaf = source // hosts_per_leaf
    to_leaf = target // hosts_per_leaf
    return () if from_leaf == to_leaf else ((from_leaf, True), (to_leaf, False))


def _load_of(transfers: Round, num_chunks: int, hosts_per_leaf: int) -> Load:
    num_sent = Counter(transfer.src for transfer in transfers)
    num_received = Counter(transfer.dst for transfer in transfers)
    num_added = Counter(transfer.dst for transfer in transfers if transfer.add)
    busiest = max(*num_sent.values(), *num_received.values())
    # Without duplex, the two directions of a port share its bandwidth.
    busiest_of_both = max((num_sent + num_received).values())
    most_added = max(num_added.values(), default=0)
    pairs = {(transfer.src, transfer.dst) for transfer in transfers}
    return Load(
        repeats=1,
        messages=_most_messages(pairs),
        one_way=busiest / num_chunks,
        both_ways=busiest_of_both / num_chunks,
        added=most_added / num_chunks,
        uplink=crossings(transfers, hosts_per_leaf) / num_chunks,
    )


Span = tuple[int, int]  # the first period of a pipeline, and the one after the last


def pipelined_loads(pipeline: Pipeline, segments: int, hosts_per_leaf: int = 0) -> list[Load]:
    """Return the loads of a pipeline's schedule without making the schedule.

    In every round a port carries one chunk each way, so only three things differ: whether a rank
    sends and receives, whether one adds, and how many chunks cross an uplink.

    Args:
        pipeline: the transfers of a segment and their rounds.
        segments: parts of the message.
        hosts_per_leaf: as in ``Network``.
    """
    by_color: list[list[tuple[Transfer, Span]]] = [[] for _ in range(pipeline.period)]
    for transfer, start in zip(pipeline.transfers, pipeline.starts, strict=True):
        # A transfer is repeated for every segment, one period after the other.
        first = start // pipeline.period
        by_color[start % pipeline.period].append((transfer, (first, first + segments)))
    rounds: Counter[tuple[bool, bool, int]] = Counter()
    for repeated in by_color:
        rounds.update(_pipelined_rounds(repeated, hosts_per_leaf))
    share = 1 / pipeline.num_chunks(segments)
    loads = []
    for (is_both, is_added, crossed), count in rounds.items():
        both_ways = 2 * share if is_both else share
        added = share if is_added else 0.0
        loads.append(Load(count, 1, share, both_ways, added, crossed * share))
    return loads


def _pipelined_rounds(
    repeated: Sequence[tuple[Transfer, Span]], hosts_per_leaf: int
) -> list[tuple[bool, bool, int]]:
    """Return the rounds of one place in a pipeline's period that are not idle.

    Args:
        repeated: the transfers at this place, and from when to when each is repeated.
        hosts_per_leaf: as in ``Network``.

    Returns:
        For each round, whether a rank sends and receives, whether one adds, and how many chunks
        cross the busiest uplink.
    """
    added = []
    crossed = []
    received = {}
    for transfer, span in repeated:
        received[transfer.dst] = span
        if transfer.add:
            added.append(span)
        for uplink in _uplinks(transfer.src, transfer.dst, hosts_per_leaf):
            crossed.append((uplink, span))
    both = []
    for transfer, (begin, end) in repeated:
        other_begin, other_end = received.get(transfer.src, (end, end))
        if max(begin, other_begin) < min(end, other_end):
            both.append((max(begin, other_begin), min(end, other_end)))
    filled = [span for _, span in repeated]
    length = max((end for _, end in filled), default=0)
    is_both = _is_covered(both, length)
    is_added = _is_covered(added, length)
    crossings_in = _busiest(crossed, length)
    rounds = []
    for index, is_filled in enumerate(_is_covered(filled, length)):
        if is_filled:
            rounds.append((is_both[index], is_added[index], crossings_in[index]))
    return rounds


def _is_covered(spans: Sequence[Span], length: int) -> list[bool]:
    """Return, for each period, whether a span covers it."""
    changes = [0] * (length + 1)
    for begin, end in spans:
        changes[begin] += 1
        changes[end] -= 1
    return [count > 0 for count in accumulate(changes[:-1])]


def _busiest(spans: Sequence[tuple[Uplink, Span]], length: int) -> list[int]:
    """Return, for each period, how many spans cover it on the uplink that has the most there."""
    if not spans:
        return [0] * length
    changes: list[list[tuple[Uplink, int]]] = [[] for _ in range(length + 1)]
    for link, (begin, end) in spans:
        changes[begin].append((link, 1))
        changes[end].append((link, -1))
    covers: Counter[Uplink] = Counter()  # uplink -> spans that cover the present period
    links_with: Counter[int] = Counter()  # number of spans -> uplinks that have so many
    most = 0
    busiest = []
    for now in changes[:-1]:
        for link, change in now:
            links_with[covers[link]] -= 1
            covers[link] += change
            links_with[covers[link]] += 1
            most = max(most, covers[link])
        while most and links_with[most] <= 0:
            most -= 1
        busiest.append(most)
    return busiest


def predict_seconds(schedule: Schedule | Sequence[Load], num_bytes: int, network: Network) -> float:
    """Return the seconds that an allreduce takes.

    Args:
        schedule: its schedule; or its loads, for schedules that are too large to write down, with
            one rank a host.
        num_bytes: size of the message.
        network: the network between the ranks.

    Raises:
        ValueError: loads and several ranks a host.
    """
    if isinstance(schedule, Schedule):
        if network.ranks_per_host > 1:
            chunk_bytes = num_bytes / schedule.num_chunks
            return sum(
                _round_on_hosts(transfers, chunk_bytes, network) for transfers in schedule.rounds
            )
        schedule = loads_of(schedule, network.hosts_per_leaf)
    elif network.ranks_per_host > 1:
        raise ValueError(
            "loads say nothing about hosts: give the schedule itself when ranks_per_host is above 1"
        )
    return sum(load.repeats * _round_seconds(load, num_bytes, network) for load in schedule)


def _round_seconds(load: Load, num_bytes: int, network: Network) -> float:
    """Return the seconds of one round with one rank a host."""
    share = load.one_way if network.duplex else load.both_ways
    port_s = share * num_bytes / network.bandwidth_bytes_per_s
    uplink_s = load.uplink * num_bytes / network.uplink_bytes_per_s
    return (
        load.messages * network.latency_s
        + max(port_s, uplink_s)
        + load.added * num_bytes / network.reduce_bytes_per_s
    )


def predict(
    collective: str, size: int, num_bytes: int, network: Network, **options: object
) -> float:
    """Return the ``predict_seconds`` of an algorithm by its name, for any number of ranks.

    Where a schedule grows fast with the ranks, its file states the loads in a function ``loads``
    beside ``schedule``, with the same options and ``hosts_per_leaf``. It is used from 128 ranks up,
    where the explicit schedule is slow to make. A test keeps the two equal.

    Args:
        collective: the algorithm.
        size: number of ranks.
        num_bytes: size of the message.
        network: the network between the ranks.
        options: of the algorithm.
    """
    # ``loads`` does not take several ranks a host into account.
    if size >= LOADS_FROM_RANKS and network.ranks_per_host == 1:
        return predict_seconds(
            loads_by_name(collective, size, network.hosts_per_leaf, **options), num_bytes, network
        )
    schedule = plugins.load("collective", collective)
    return predict_seconds(schedule(size, **options), num_bytes, network)


def loads_by_name(
    collective: str, size: int, hosts_per_leaf: int = 0, **options: object
) -> list[Load]:
    """Return an algorithm's loads: stated ones for large schedules, else those of the schedule.

    Args:
        collective: the algorithm.
        size: number of ranks, one a host.
        hosts_per_leaf: as in ``Network``.
        options: of the algorithm.
    """
    stated = plugins.companion("collective", collective, "loads")
    # Segments make a schedule of few ranks large, too.
    if stated is not None and (size >= LOADS_FROM_RANKS or options):
        loads: list[Load] = stated(size, hosts_per_leaf=hosts_per_leaf, **options)
        return loads
    schedule = plugins.load("collective", collective)
    return loads_of(schedule(size, **options), hosts_per_leaf)


def _wire_s(link: Link, sent: float, received: float) -> float:
    """Return the seconds that these bytes take on a link."""
    volume = max(sent, received) if link.duplex else sent + received
    return volume / link.bandwidth_bytes_per_s


class _PortTraffic:
    """The messages of one round on links of one kind.

    Ends are hosts (for ports) or ranks (for memory).
    """

    def __init__(self) -> None:
        self.pairs: set[tuple[int, int]] = set()  # (sender, receiver) ranks
        self._sent: dict[int, float] = defaultdict(float)  # bytes, by end
        self._received: dict[int, float] = defaultdict(float)

    def add(self, pair: tuple[int, int], source: int, target: int, num_bytes: float) -> None:
        """Add a chunk between a pair of ranks that goes from one end to another."""
        self.pairs.add(pair)
        self._sent[source] += num_bytes
        self._received[target] += num_bytes

    def seconds(self, link: Link) -> float:
        """Return the seconds until the busiest end is done."""
        slowest = 0.0
        for end in {*self._sent, *self._received}:
            slowest = max(slowest, _wire_s(link, self._sent[end], self._received[end]))
        # Latency by rank, since each process handles its own messages; bytes by end, since ranks
        # of a host share its port.
        return _most_messages(self.pairs) * link.latency_s + slowest


def _round_on_hosts(transfers: Round, chunk_bytes: float, network: Network) -> float:
    """Return the seconds of one round in which several ranks share a host's port."""
    between = _PortTraffic()  # through the ports of the hosts
    crossing = 0
    if network.hosts_per_leaf:
        hosts = []
        for src, dst, *_ in transfers:
            hosts.append((src // network.ranks_per_host, dst // network.ranks_per_host))
        crossing = crossings(hosts, network.hosts_per_leaf)
    within = _PortTraffic()  # through the memory of the hosts
    added: dict[int, float] = defaultdict(float)  # bytes, by rank
    for src, dst, _, add in transfers:
        source = src // network.ranks_per_host
        target = dst // network.ranks_per_host
        if source == target:
            within.add((src, dst), src, dst, chunk_bytes)
        else:
            between.add((src, dst), source, target, chunk_bytes)
        if add:
            added[dst] += chunk_bytes
    # Ports and memory work side by side: the slower of the two counts.
    longest = 0.0
    if between.pairs:
        port = Link(network.latency_s, network.bandwidth_bytes_per_s, network.duplex)
        longest = max(
            between.seconds(port),
            network.latency_s + crossing * chunk_bytes / network.uplink_bytes_per_s,
        )
    if within.pairs and network.local:
        longest = max(longest, within.seconds(network.local))
    elif within.pairs:
        longest = max(longest, network.latency_s)
    return longest + max(added.values(), default=0.0) / network.reduce_bytes_per_s


def _most_messages(pairs: set[tuple[int, int]]) -> int:
    """Return the number of messages of the busiest rank in its busier direction.

    Chunks between the same two ranks travel as one message.
    """
    num_sent = Counter(src for src, _ in pairs)
    num_received = Counter(dst for _, dst in pairs)
    return max(*num_sent.values(), *num_received.values())
