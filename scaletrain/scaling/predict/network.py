"""Networks by name, each with the source of its figures, and the cost of exchanges on them."""

import dataclasses
import functools

from scaletrain import plugins
from scaletrain.collectives import cost
from scaletrain.collectives.cost import Link, Network
from scaletrain.errors import UserError, unknown

# Bytes on an Ethernet wire for a byte of TCP payload. Packets have 1500 bytes. Measured between
# network namespaces.
FRAMING = 1.046


@dataclasses.dataclass(frozen=True)
class Fabric:
    """The network of a machine: ports of hosts, links inside a host, and the tree above the hosts.

    Attributes:
        network: the port of each host.
        source: where the figures come from, in words.
        workers_per_host: workers that share a host's port.
        local: the link between workers of a host; None: as fast as the port.
        oversubscription: by which factor a leaf's uplinks are narrower than its ports together.
        hosts_per_leaf: hosts below one leaf of a fat tree. Traffic between more hosts than that
            shares the uplinks.
    """

    network: Network
    source: str
    workers_per_host: int = 1
    local: Link | None = None
    oversubscription: float = 1.0
    hosts_per_leaf: int = 1


def _ethernet(gbit: float, latency_s: float) -> Network:
    return Network(latency_s, gbit * 1e9 / 8 / FRAMING)


FABRICS = {
    "100mbit": Fabric(_ethernet(0.1, 60e-6), "Ethernet, 4.6 % framing and a round trip of 60 us, as measured on emulated links"),
    "1gbit": Fabric(_ethernet(1, 60e-6), "Ethernet, 4.6 % framing and a round trip of 60 us, as measured on emulated links"),
    "10gbit": Fabric(_ethernet(10, 30e-6), "ASSUMED: line rate less 4.6 % framing; 30 us, a round figure for a kernel's TCP"),
    "25gbit": Fabric(_ethernet(25, 25e-6), "ASSUMED: line rate less 4.6 % framing; 25 us, a round figure for a kernel's TCP"),
    "50gbit": Fabric(_ethernet(50, 25e-6), "50 Gbit/s a host as in Goyal et al. 2017 (arXiv 1706.02677), less framing; latency ASSUMED"),
    "100gbit": Fabric(_ethernet(100, 20e-6), "ASSUMED: line rate less 4.6 % framing; 20 us, a round figure for a kernel's TCP"),
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
        _ethernet(10, 30e-6), "ASSUMED: 10 Gbit/s leaves of 16 hosts, uplinks oversubscribed 4 to 1", oversubscription=4, hosts_per_leaf=16
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


def parse_bandwidth(text: str) -> float:
    """Return a bandwidth in bytes per second.

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
        f"--bandwidth: {text!r} is not allowed"
        " (allowed: a number with kbit, Mbit, Gbit, kB, MB or GB, such as 10Gbit)"
    )


def _hosts(workers: int, fabric: Fabric) -> tuple[int, int]:
    """Return (hosts, workers on each full host) for a number of workers."""
    workers_inside = min(fabric.workers_per_host, workers)
    hosts = -(-workers // workers_inside)
    return hosts, workers_inside


@functools.lru_cache(maxsize=4096)
def allreduce_s(collective: str, workers: int, num_bytes: float, fabric: Fabric) -> float:
    """Return the seconds of an allreduce, costed on the schedule that would run.

    Where several workers share a host, they reduce inside it first (reduce-scatter and all-gather
    over the local link). The collective then runs between hosts, and each host's port carries the
    message once.

    Args:
        collective: an algorithm without options, such as ``ring``.
        workers: all workers together.
        num_bytes: size of the message.
        fabric: the network.
    """
    if workers <= 1:
        return 0.0
    hosts, workers_inside = _hosts(workers, fabric)
    seconds = _inside_host_s(workers_inside, num_bytes, fabric)
    if hosts > 1:
        network = _between_hosts(hosts, fabric)
        loads = _loads(collective, hosts)
        seconds += cost.predict_seconds(loads, num_bytes, network)  # type: ignore[arg-type]
    return seconds


def _inside_host_s(workers: int, num_bytes: float, fabric: Fabric) -> float:
    """Return the seconds of a ring's reduce-scatter and all-gather between a host's workers."""
    if workers <= 1:
        return 0.0
    port = Link(fabric.network.latency_s, fabric.network.bandwidth_bytes_per_s)
    link = fabric.local or port
    piece_s = num_bytes / workers / link.bandwidth_bytes_per_s
    # 2 (n - 1) rounds of a ring, in each of which a worker sends one n-th.
    return 2 * (workers - 1) * (link.latency_s + piece_s)


def _between_hosts(hosts: int, fabric: Fabric) -> Network:
    """Return the network as a collective between so many hosts finds it."""
    network = fabric.network
    # Hosts below one leaf reach each other without an uplink.
    if fabric.oversubscription <= 1 or hosts <= fabric.hosts_per_leaf:
        return network
    bandwidth = network.bandwidth_bytes_per_s / fabric.oversubscription
    return network._replace(bandwidth_bytes_per_s=bandwidth)


@functools.lru_cache(maxsize=4096)
def _loads(collective: str, size: int) -> tuple[cost.Load, ...]:
    """Return a schedule's loads. They do not depend on the network: a fit makes each only once."""
    stated = plugins.companion("collective", collective, "loads")
    if stated is not None and size >= cost.LOADS_FROM_RANKS:
        return tuple(stated(size))
    schedule = plugins.load("collective", collective)
    return tuple(cost.loads_of(schedule(size)))


def server_s(
    workers: int, num_bytes: float, fabric: Fabric, servers: int = 1, segments: int = 16
) -> float:
    """Return the seconds until every worker has the new weights from parameter servers.

    This is the star's schedule, streamed. Each server has a host of its own, and its port receives
    and sends ``workers`` times the server's share. In segments, a server answers one part while the
    next one still arrives; FireCaffe counts |W| p / BW, which is the limit of infinitely many. The
    port of a host with several workers carries the message once each way for each of them. Servers
    fill leaves of a fat tree that no worker uses.

    Args:
        workers: all workers together.
        num_bytes: size of the model.
        fabric: the network.
        servers: number of servers, each with an equal share of the model.
        segments: parts in which a share is streamed.
    """
    network = fabric.network
    hosts, workers_inside = _hosts(workers, fabric)
    all_hosts = hosts + servers
    server_port = _port_bytes_per_s(servers, all_hosts, fabric)
    worker_port = _port_bytes_per_s(hosts, all_hosts, fabric)
    at_server_s = workers * num_bytes / servers / server_port
    at_worker_s = workers_inside * num_bytes / worker_port
    # Both ends stream at once: the busier port decides.
    port_s = max(at_server_s, at_worker_s)
    if not network.duplex:
        port_s *= 2
    messages = -(-workers // servers)
    # Sending hides behind receiving, but for the last segment's answer.
    return port_s * (1 + 1 / segments) + 2 * network.latency_s * messages


def _port_bytes_per_s(senders: int, all_hosts: int, fabric: Fabric) -> float:
    """Return a host's rate when ``senders`` hosts, which fill leaves, all send out of them at once.

    The uplinks of a leaf may carry less than its ports together.
    """
    bandwidth = fabric.network.bandwidth_bytes_per_s
    if all_hosts <= fabric.hosts_per_leaf or fabric.oversubscription <= 1:
        return bandwidth
    leaves = -(-senders // fabric.hosts_per_leaf)
    uplinks = leaves * fabric.hosts_per_leaf / fabric.oversubscription  # in ports
    return bandwidth * min(1.0, uplinks / senders)
