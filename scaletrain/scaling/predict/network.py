"""Networks by name, each with the source of its figures, and the cost of exchanges on them."""

import dataclasses
import functools
from typing import NamedTuple

from scaletrain import plugins
from scaletrain.collectives import cost
from scaletrain.collectives.cost import Link, Network
from scaletrain.errors import UserError, unknown

# Bytes on an Ethernet wire for a byte of TCP payload. Packets have 1500 bytes. Measured between
# network namespaces.
FRAMING = 1.046

# What TCP of a stock kernel moves at most, however fast the port. Horovod used no more than
# 32 Gbit/s of a port of 100 (Zhang et al., NetAI 2020, arXiv 2006.10103; recalled, not re-read).
TCP_GBIT = 32.0

# Bytes that one server receives and sends a second over TCP, both counted: 200 MB in 0.1191 s, as
# measured in benchmarks/results/parameter_server.md (one worker and its server on two cores).
SERVER_BYTES_PER_S = 200e6 / 0.1191

# Where so many hosts send to one port at once, a switch may drop a whole window of one of them. It
# then waits for Linux's shortest retransmission time-out (Vasudevan et al., SIGCOMM 2009; the
# number of senders depends on the switch's buffer and is ASSUMED).
INCAST_SENDERS = 32
INCAST_S = 0.2

LOCAL_LATENCY_S = 5e-6  # between workers of a host; ASSUMED

# Parts in which a message goes through a host and the network side by side: at most what the engine
# uses (``collectives.cutting``).
_PARTS = (1, 2, 4)


@dataclasses.dataclass(frozen=True)
class Fabric:
    """The network of a machine: ports of hosts, links inside a host, and the tree above the hosts.

    Attributes:
        network: the port of each host, and the leaves of a fat tree.
        source: where the figures come from, in words.
        workers_per_host: workers that share a host's port.
        local: the link between workers of a host; None: as fast as the port.
        drops_packets: it carries TCP, whose packets a full switch drops.
        one_level: a collective runs over all workers, host by host, as our engine does; else it
            runs between hosts, whose workers reduce inside first, as in NCCL and ``two_level``.
    """

    network: Network
    source: str
    workers_per_host: int = 1
    local: Link | None = None
    drops_packets: bool = False
    one_level: bool = False

    @property
    def local_link(self) -> Link:
        """The link between workers of a host."""
        return self.local or Link(self.network.latency_s, self.network.bandwidth_bytes_per_s)


def _ethernet(gbit: float, latency_s: float) -> Network:
    return Network(latency_s, gbit * 1e9 / 8 / FRAMING)


def _tcp(gbit: float, latency_s: float, source: str) -> Fabric:
    """Return Ethernet with TCP. Above what a stock kernel moves, a faster port does not help."""
    if gbit > TCP_GBIT:
        network = Network(latency_s, TCP_GBIT * 1e9 / 8)
    else:
        network = _ethernet(gbit, latency_s)
    return Fabric(network, source, drops_packets=True)


_EMULATED = "Ethernet, 4.6 % framing and a round trip of 60 us, as measured on emulated links"
_STOCK_TCP = (
    "TCP of a stock kernel reaches 32 Gbit/s, as Horovod did on 100 (Zhang et al. 2020,"
    " arXiv 2006.10103, recalled)"
)
FABRICS = {
    "100mbit": _tcp(0.1, 60e-6, _EMULATED),
    "1gbit": _tcp(1, 60e-6, _EMULATED),
    "10gbit": _tcp(10, 30e-6, "ASSUMED: line rate less 4.6 % framing; 30 us, a round figure for a kernel's TCP"),
    "25gbit": _tcp(25, 25e-6, "ASSUMED: line rate less 4.6 % framing; 25 us, a round figure for a kernel's TCP"),
    "50gbit": _tcp(50, 25e-6, f"{_STOCK_TCP}; 25 us ASSUMED"),
    "100gbit": _tcp(100, 20e-6, f"{_STOCK_TCP}; 20 us ASSUMED"),
    "25gbit-rdma": Fabric(_ethernet(25, 3e-6), "ASSUMED: RoCE at line rate less 4.6 % framing; 3 us"),
    "50gbit-rdma": Fabric(_ethernet(50, 3e-6), "ASSUMED: RoCE at line rate less 4.6 % framing; 3 us"),
    "100gbit-rdma": Fabric(_ethernet(100, 3e-6), "ASSUMED: RoCE at line rate less 4.6 % framing; 3 us"),
    "infiniband-edr": Fabric(Network(1.5e-6, 12.0e9), "ASSUMED: EDR's 100 Gbit/s less 4 % overhead; 1.5 us, a round figure for MPI over it"),
    "gemini": Fabric(
        Network(1.5e-6, 70e9 * 0.56 / 8),
        "Cray Gemini (Titan) as an effective bandwidth: 70 Gbit/s at 56 %, as Paleo (ICLR 2017) fits FireCaffe's NiN; latency ASSUMED",
    ),
    "dgx1-edr": Fabric(
        Network(2e-6, 4 * 12.0e9), "ASSUMED: 8 GPUs a host, four EDR ports; 30 GB/s a ring direction inside, 12 GB/s a port; latencies",
        workers_per_host=8, local=Link(5e-6, 30e9),
    ),
    "fat-tree-10gbit": Fabric(
        _ethernet(10, 30e-6)._replace(hosts_per_leaf=16, oversubscription=4.0),
        "ASSUMED: 10 Gbit/s leaves of 16 hosts, uplinks oversubscribed 4 to 1", drops_packets=True,
    ),
}  # fmt: skip


def fabric_named(name: str) -> Fabric:
    """Return a known network by its name.

    Raises:
        UserError: the name is not on the list.
    """
    if name not in FABRICS:
        raise unknown("--network", name, FABRICS)
    return FABRICS[name]


# The longest unit first, since ``10Gbit`` ends with ``bit`` and ``1GB`` with ``B``.
_BYTES_PER_S = {
    "kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8, "kb": 1e3, "mb": 1e6, "gb": 1e9,
}  # fmt: skip


def parse_bandwidth(text: str, option: str = "--bandwidth") -> float:
    """Return a bandwidth in bytes per second.

    Args:
        text: as a person typed it.
        option: with which, for the message.

    >>> parse_bandwidth("10Gbit"), parse_bandwidth("1.2GB/s")
    (1250000000.0, 1200000000.0)

    Raises:
        UserError: the text is not a bandwidth.
    """
    lowered = text.strip().lower().removesuffix("/s")
    for unit, scale in _BYTES_PER_S.items():
        if not lowered.endswith(unit):
            continue
        try:
            value = float(lowered.removesuffix(unit)) * scale
        except ValueError:
            break
        if value > 0:
            return value
    raise UserError(
        f"{option}: {text!r} is not allowed"
        " (allowed: a number with kbit, Mbit, Gbit, kB, MB or GB, such as 10Gbit)"
    )


class Servers(NamedTuple):
    """Parameter servers and how they are fed.

    Attributes:
        number: servers that share the model equally.
        largest_share: of the model, in a tensor that one server has alone; 0: all are divided.
        bytes_per_s: what one server receives and sends a second, both counted, over TCP.
        beside_workers: they run on the workers' hosts, not on hosts of their own.
        fed_by_host: a host adds up its workers' gradients and sends the sum, as TensorFlow and
            BytePS do. Our servers are fed by every worker.
    """

    number: int = 1
    largest_share: float = 0.0
    bytes_per_s: float = SERVER_BYTES_PER_S
    beside_workers: bool = False
    fed_by_host: bool = False


OUR_SERVERS = Servers()


def _hosts(workers: int, fabric: Fabric) -> tuple[int, int]:
    """Return (hosts, workers on each full host) for a number of workers."""
    workers_inside = min(fabric.workers_per_host, workers)
    hosts = -(-workers // workers_inside)
    return hosts, workers_inside


@functools.lru_cache(maxsize=4096)
def allreduce_s(
    collective: str, workers: int, num_bytes: float, fabric: Fabric, segments: int | None = None
) -> float:
    """Return the seconds of an allreduce, costed on the schedule that would run.

    Where several workers share a host, they reduce inside it (reduce-scatter and all-gather over
    the local link), and the collective runs between hosts, whose ports carry the message once. Both
    go on side by side, in as many parts as are fastest. ``Fabric.one_level`` is the other case.

    Args:
        collective: an algorithm, such as ``ring``.
        workers: all workers together.
        num_bytes: size of the message.
        fabric: the network.
        segments: of a pipelined tree; None: the algorithm's default.
    """
    if workers <= 1:
        return 0.0
    if fabric.one_level and fabric.workers_per_host > 1:
        return _one_level_s(collective, workers, num_bytes, fabric, segments)
    hosts, workers_inside = _hosts(workers, fabric)
    if hosts == 1:
        return _inside_host_s(workers_inside, num_bytes, fabric)
    loads = _loads(collective, hosts, fabric.network.hosts_per_leaf, segments)
    choices = []
    for parts in _PARTS if workers_inside > 1 else (1,):
        part_bytes = num_bytes / parts
        inside_s = _inside_host_s(workers_inside, part_bytes, fabric)
        between_s = cost.predict_seconds(loads, part_bytes, fabric.network)  # type: ignore[arg-type]
        # A part is in the host while another is on the network; the slower of the two decides.
        choices.append(inside_s + between_s + (parts - 1) * max(inside_s, between_s))
    return min(choices)


def _one_level_s(
    collective: str, workers: int, num_bytes: float, fabric: Fabric, segments: int | None
) -> float:
    """Return the seconds of an allreduce whose schedule runs over all workers, host by host.

    In each round, messages inside hosts and between them go on side by side: the slower ones count.
    """
    port, local = fabric.network, fabric.local_link
    total_s = 0.0
    # To the schedule, a host is a leaf: what leaves it goes through its port.
    for load in _loads(collective, workers, fabric.workers_per_host, segments):
        round_s = load.messages * local.latency_s
        round_s += load.one_way * num_bytes / local.bandwidth_bytes_per_s
        if load.uplink:
            between_s = load.messages * port.latency_s
            between_s += load.uplink * num_bytes / port.bandwidth_bytes_per_s
            round_s = max(round_s, between_s)
        total_s += load.repeats * round_s
    return total_s


def _inside_host_s(workers: int, num_bytes: float, fabric: Fabric) -> float:
    """Return the seconds of a ring's reduce-scatter and all-gather between a host's workers."""
    if workers <= 1:
        return 0.0
    link = fabric.local_link
    piece_s = num_bytes / workers / link.bandwidth_bytes_per_s
    # 2 (n - 1) rounds of a ring, in each of which a worker sends one n-th.
    return 2 * (workers - 1) * (link.latency_s + piece_s)


@functools.lru_cache(maxsize=4096)
def _loads(
    collective: str, size: int, hosts_per_leaf: int, segments: int | None
) -> tuple[cost.Load, ...]:
    """Return a schedule's loads. They do not depend on speeds: a fit makes each only once."""
    options = {} if segments is None else {"segments": segments}
    if collective == "two_level" and hosts_per_leaf:
        options["ranks_per_host"] = hosts_per_leaf  # as the engine does
    return tuple(cost.loads_by_name(collective, size, hosts_per_leaf, **options))


def has_segments(collective: str) -> bool:
    """Return True if an algorithm cuts the message into segments, whose number is an option."""
    options = plugins.options("collective", collective)
    stated = plugins.companion("collective", collective, "loads")
    return options is not None and "segments" in options.model_fields and stated is not None


@functools.lru_cache(maxsize=4096)
def best_segments(collective: str, workers: int, num_bytes: float, fabric: Fabric) -> int:
    """Return the number of segments, a power of two, with which a pipelined tree is fastest.

    More segments fill the pipeline sooner, but each has its latency. The rounds grow linearly with
    the segments, which two numbers of segments tell, and the bytes of a round shrink with them.
    """
    hosts, _ = _hosts(workers, fabric)
    if hosts <= 1:
        return 1
    network = fabric.network
    few = _loads(collective, hosts, network.hosts_per_leaf, 16)
    more = _loads(collective, hosts, network.hosts_per_leaf, 32)
    num_rounds = sum(load.repeats for load in more)
    rounds_per_segment = (num_rounds - sum(load.repeats for load in few)) / 16
    without_latency = network._replace(latency_s=0.0)
    round_s = cost.predict_seconds(more, num_bytes, without_latency) / num_rounds  # type: ignore[arg-type]

    def seconds(segments: int) -> float:
        rounds = num_rounds + rounds_per_segment * (segments - 32)
        return rounds * (network.latency_s + round_s * 32 / segments)

    return min((2**power for power in range(13)), key=seconds)


def is_crowded(collective: str, workers: int, fabric: Fabric, segments: int | None = None) -> bool:
    """Return True if a round has so many senders to one port that TCP may time out.

    Args:
        collective: an algorithm.
        workers: all workers together.
        fabric: the network.
        segments: as for ``allreduce_s``, so that its loads are made only once.
    """
    hosts, _ = _hosts(workers, fabric)
    if not fabric.drops_packets or hosts <= INCAST_SENDERS:
        return False
    loads = _loads(collective, hosts, fabric.network.hosts_per_leaf, segments)
    return max(load.messages for load in loads) > INCAST_SENDERS


def server_s(
    workers: int,
    num_bytes: float,
    fabric: Fabric,
    servers: Servers = OUR_SERVERS,
    segments: int = 16,
) -> float:
    """Return the seconds until every worker has the new weights from parameter servers.

    This is the star's schedule, streamed: in segments, a server answers one part while the next one
    still arrives. FireCaffe counts |W| p / BW, which is the limit of infinitely many. The slowest
    of three decides: the servers' ports, the workers' ports, and what the processes at both ends
    move. Each feeder exchanges a message with every server, however small. Servers fill leaves of a
    fat tree that no worker uses.

    Args:
        workers: all workers together.
        num_bytes: size of the model.
        fabric: the network.
        servers: the servers.
        segments: parts in which a share is streamed.
    """
    network = fabric.network
    hosts, workers_inside = _hosts(workers, fabric)
    if servers.fed_by_host:
        feeders = hosts
        through_port = num_bytes
        inside_s = _inside_host_s(workers_inside, num_bytes, fabric)
    else:
        feeders = workers
        through_port = workers_inside * num_bytes
        inside_s = 0.0
    at_server = feeders * num_bytes * max(1 / servers.number, servers.largest_share)
    all_hosts = hosts if servers.beside_workers else hosts + servers.number
    at_worker_s = through_port / _port_bytes_per_s(hosts, all_hosts, network)
    at_server_s = at_server / _port_bytes_per_s(servers.number, all_hosts, network)
    if servers.beside_workers:
        # One port carries the traffic of the workers and of the server beside them.
        at_server_s += at_worker_s
    # All ends stream at once: the busiest decides.
    port_s = max(at_server_s, at_worker_s)
    if not network.duplex:
        port_s *= 2
    process_s = 2 * max(at_server, num_bytes) / servers.bytes_per_s
    # Sending hides behind receiving, but for the last segment's answer.
    streamed_s = max(port_s, process_s) * (1 + 1 / segments)
    latencies_s = 2 * network.latency_s * max(feeders, servers.number)
    return inside_s + streamed_s + latencies_s


def _port_bytes_per_s(senders: int, all_hosts: int, network: Network) -> float:
    """Return a host's rate when ``senders`` hosts, which fill leaves, all send out of them at once.

    The uplinks of a leaf may carry less than its ports together.
    """
    bandwidth = network.bandwidth_bytes_per_s
    if not network.hosts_per_leaf or all_hosts <= network.hosts_per_leaf:
        return bandwidth
    leaves = -(-senders // network.hosts_per_leaf)
    return min(bandwidth, leaves * network.uplink_bytes_per_s / senders)
