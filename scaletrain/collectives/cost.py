"""The seconds that a schedule takes on a network of given latency, bandwidth and duplex.

The model goes round by round. A round lasts as long as its busiest port takes,
``messages x latency + bytes / bandwidth``, and rounds follow one another. This is the alpha-beta
model of Hockney (Parallel Computing 1994), used as in Thakur et al., IJHPCA 2005. FireCaffe's
server against its tree (Iandola et al., CVPR 2016, section 4) falls out of it: the centre of the
star handles p - 1 messages each way, the root of the tree log2(p).

>>> ethernet = Network(latency_s=50e-6, bandwidth_bytes_per_s=125e6)
>>> round(predict("ring", 4, 25_000_000, ethernet), 4)
0.3003
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from scaletrain import plugins
from scaletrain.collectives.schedule import Round, Schedule

# From this number of ranks on, an algorithm's function ``loads`` is used if it has one.
LOADS_FROM_RANKS = 128


class Link(NamedTuple):
    """One port into a network, or the memory that ranks of one host share."""

    latency_s: float  # per message: software and wire
    bandwidth_bytes_per_s: float  # of each direction; without duplex, of both together
    duplex: bool = True  # sends and receives at the same time, each at full bandwidth


class Network(NamedTuple):
    """Equal ports to a network that never congests inside.

    ``Network(50e-6, 125e6)`` is 1 Gbit/s Ethernet with one rank a host. With ``ranks_per_host``
    above 1, consecutive ranks share a host. Its port carries the messages of all of them to other
    hosts.
    """

    latency_s: float  # per message
    bandwidth_bytes_per_s: float  # of each direction; without duplex, of both together
    duplex: bool = True
    ranks_per_host: int = 1
    local: Link | None = (
        None  # for messages inside a host; None: they cost the port's latency alone
    )
    reduce_bytes_per_s: float = float("inf")  # how fast a rank adds received messages


class Load(NamedTuple):
    """The load of the busiest port in some equal rounds.

    Amounts are fractions of the whole message.
    """

    repeats: int  # number of equal rounds
    messages: int  # the larger of the numbers sent and received, since both go at once
    one_way: float  # the larger of the amounts that a rank sends and receives
    both_ways: float  # their sum
    added: float = 0.0  # the amount that is added on arrival


def loads_of(schedule: Schedule) -> list[Load]:
    """Return the load of every round of an explicit schedule, with one rank a host."""
    return [_load_of(transfers, schedule.num_chunks) for transfers in schedule.rounds]


def _load_of(transfers: Round, num_chunks: int) -> Load:
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
    )


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
        schedule = loads_of(schedule)
    elif network.ranks_per_host > 1:
        raise ValueError(
            "loads say nothing about hosts: give the schedule itself when ranks_per_host is above 1"
        )
    return sum(load.repeats * _round_seconds(load, num_bytes, network) for load in schedule)


def _round_seconds(load: Load, num_bytes: int, network: Network) -> float:
    """Return the seconds of one round with one rank a host."""
    share = load.one_way if network.duplex else load.both_ways
    return (
        load.messages * network.latency_s
        + share * num_bytes / network.bandwidth_bytes_per_s
        + load.added * num_bytes / network.reduce_bytes_per_s
    )


def predict(
    collective: str, size: int, num_bytes: int, network: Network, **options: object
) -> float:
    """Return the ``predict_seconds`` of an algorithm by its name, for any number of ranks.

    Where a schedule grows with the square of the ranks, its file states the loads in a function
    ``loads(size)`` beside ``schedule``. It is used from 128 ranks up, where the explicit schedule
    is slow to make. A test keeps the two equal.

    Args:
        collective: the algorithm.
        size: number of ranks.
        num_bytes: size of the message.
        network: the network between the ranks.
        options: of the algorithm.
    """
    # ``loads`` takes neither options nor hosts into account.
    if size >= LOADS_FROM_RANKS and network.ranks_per_host == 1 and not options:
        loads = plugins.companion("collective", collective, "loads")
        if loads is not None:
            return predict_seconds(loads(size), num_bytes, network)
    schedule = plugins.load("collective", collective)
    return predict_seconds(schedule(size, **options), num_bytes, network)


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
        longest = between.seconds(port)
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
