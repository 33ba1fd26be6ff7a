"""What a schedule costs on a network: seconds predicted from latency, bandwidth, duplex and the hosts that ranks share.

The model is round by round: a round lasts as long as its busiest port, ``messages x latency + bytes / bandwidth`` (the alpha-beta model of
Hockney, as in Thakur et al., IJHPCA 2005), and rounds follow one another. FireCaffe's server against its tree (section 4) falls out of it:
the star's centre handles p - 1 messages each way, the tree's root log2(p).
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from scaletrain import plugins
from scaletrain.collectives.schedule import Schedule

# Bandwidth-optimal: where the pieces stay large, several parts of a message go through these schedules side by side, so that one is on the
# wire while another is added.
SIDE_BY_SIDE = ("ring", "halving_doubling", "direct", "two_level")
_PARTS, _SMALL_BYTES = 4, 128 << 10  # pieces below it cost more by their number than by their bytes
PIECE_BYTES = 512 << 10  # in which a message travels over TCP: one is added while the next arrives
# There, messages from this size on are answered by a receipt where their sender turns to another rank next (``schedule.in_turn``).
RECEIPTS_FROM_BYTES = 1 << 20
# From this number of ranks on, an algorithm's function ``loads`` is used where it has one.
LOADS_FROM_RANKS = 128


def parts(collective: str, size: int, num_bytes: float) -> int:
    """In how many parts side by side the engine sends a message through an algorithm that a person chose."""
    return (
        max(1, min(_PARTS, int(num_bytes) // (size * _SMALL_BYTES)))
        if collective in SIDE_BY_SIDE
        else 1
    )


class Link(NamedTuple):
    """One port into a network, or the memory that ranks of one host share."""

    latency_s: float  # per message: software and wire
    bandwidth_bytes_per_s: float  # of each direction; without duplex, of both together
    duplex: bool = True  # sends and receives at the same time, each at full bandwidth


class Network(NamedTuple):
    """Equal ports to a network that never congests inside. ``Network(50e-6, 125e6)`` is 1 Gbit/s Ethernet, one rank a host.

    With ``ranks_per_host`` above 1, consecutive ranks share a host: its port carries what all of them send to other hosts, and messages inside
    use ``local`` (default: cost nothing but the port's latency).
    """

    latency_s: float
    bandwidth_bytes_per_s: float
    duplex: bool = True
    ranks_per_host: int = 1
    local: Link | None = None
    reduce_bytes_per_s: float = float("inf")  # how fast a rank adds what it received


class Load(NamedTuple):
    """``repeats`` equal rounds: what passes through the busiest port in each, as messages and as fractions of the whole message."""

    repeats: int
    messages: int  # the larger of those sent and those received, since both go at once
    one_way: float  # the larger of what a rank sends and what it receives
    both_ways: float  # their sum
    added: float = 0.0  # what is added on arrival


def loads_of(schedule: Schedule) -> list[Load]:
    """The load of every round of an explicit schedule, with one rank a host."""
    found = []
    for transfers in schedule.rounds:
        out: dict[int, int] = defaultdict(int)
        into: dict[int, int] = defaultdict(int)
        adds: dict[int, int] = defaultdict(int)
        pairs = set()
        for t in transfers:
            out[t.src] += 1
            into[t.dst] += 1
            adds[t.dst] += t.add
            pairs.add((t.src, t.dst))
        found.append(
            Load(
                1,
                _most_messages(pairs),
                max(*out.values(), *into.values()) / schedule.num_chunks,
                max(out[rank] + into[rank] for rank in {*out, *into}) / schedule.num_chunks,
                max(adds.values()) / schedule.num_chunks,
            )
        )
    return found


def predict_seconds(schedule: Schedule | Sequence[Load], num_bytes: int, network: Network) -> float:
    """Seconds that an allreduce of ``num_bytes`` takes. Loads stand for schedules too large to write down, with one rank a host.

    Raises:
        ValueError: loads and several ranks a host.
    """
    if isinstance(schedule, Schedule):
        if network.ranks_per_host > 1:
            return sum(
                _round_on_hosts(schedule, index, num_bytes, network)
                for index in range(len(schedule.rounds))
            )
        schedule = loads_of(schedule)
    elif network.ranks_per_host > 1:
        raise ValueError(
            "loads say nothing about hosts: give the schedule itself when ranks_per_host is above 1"
        )
    return sum(
        load.repeats
        * (
            load.messages * network.latency_s
            + (load.one_way if network.duplex else load.both_ways)
            * num_bytes
            / network.bandwidth_bytes_per_s
            + load.added * num_bytes / network.reduce_bytes_per_s
        )
        for load in schedule
    )


def predict(
    collective: str, size: int, num_bytes: int, network: Network, **options: object
) -> float:
    """``predict_seconds`` of an algorithm by its name, for any number of ranks.

    Algorithms whose schedule grows with the square of the ranks state their loads in a function ``loads(size)`` beside
    ``schedule``; it is read from 128 ranks up, where the explicit schedule is slow to make (a test keeps the two equal).
    """
    if size >= LOADS_FROM_RANKS and network.ranks_per_host == 1 and not options:
        loads = plugins.companion("collective", collective, "loads")
        if loads is not None:
            return predict_seconds(loads(size), num_bytes, network)
    schedule = plugins.load("collective", collective)
    return predict_seconds(schedule(size, **options), num_bytes, network)


def _wire_s(link: Link, sent: float, received: float) -> float:
    return (max(sent, received) if link.duplex else sent + received) / link.bandwidth_bytes_per_s


def _round_on_hosts(schedule: Schedule, index: int, num_bytes: int, network: Network) -> float:
    """One round in which several ranks share a host's port."""
    chunk = num_bytes / schedule.num_chunks
    port_out: dict[int, float] = defaultdict(float)
    port_in: dict[int, float] = defaultdict(float)
    memory_out: dict[int, float] = defaultdict(float)
    memory_in: dict[int, float] = defaultdict(float)
    adds: dict[int, float] = defaultdict(float)
    between, within = set(), set()
    for t in schedule.rounds[index]:
        source, target = t.src // network.ranks_per_host, t.dst // network.ranks_per_host
        if source == target:
            within.add((t.src, t.dst))
            memory_out[t.src] += chunk
            memory_in[t.dst] += chunk
        else:
            between.add((t.src, t.dst))
            port_out[source] += chunk
            port_in[target] += chunk
        adds[t.dst] += chunk * t.add
    longest = 0.0
    if between:
        link = Link(network.latency_s, network.bandwidth_bytes_per_s, network.duplex)
        hosts = {*port_out, *port_in}
        volume = max(_wire_s(link, port_out[host], port_in[host]) for host in hosts)
        longest = _most_messages(between) * link.latency_s + volume
    if within and network.local:
        volume = max(
            _wire_s(network.local, memory_out[rank], memory_in[rank])
            for rank in {*memory_out, *memory_in}
        )
        longest = max(longest, _most_messages(within) * network.local.latency_s + volume)
    elif within:
        longest = max(longest, network.latency_s)
    return longest + max(adds.values()) / network.reduce_bytes_per_s


def _most_messages(pairs: set[tuple[int, int]]) -> int:
    """Chunks between the same two ranks travel as one message; the busiest rank's count in its busier direction."""
    out: dict[int, int] = defaultdict(int)
    into: dict[int, int] = defaultdict(int)
    for src, dst in pairs:
        out[src] += 1
        into[dst] += 1
    return max(*out.values(), *into.values())
