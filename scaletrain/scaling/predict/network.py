"""Networks by name, with the source of each figure; and what an algorithm costs on them at any number of workers."""

import dataclasses
import functools

from scaletrain import plugins
from scaletrain.collectives import cost
from scaletrain.collectives.cost import Link, Network
from scaletrain.errors import UserError, unknown

FRAMING = 1.046  # bytes on an Ethernet wire for a byte of TCP payload (1500-byte packets; measured between namespaces)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A known machine's network. ``hosts_per_leaf``: above so many hosts, the fat tree's ``oversubscription`` divides the bandwidth."""

    network: Network
    source: str
    workers_per_host: int = 1
    local: Link | None = None  # between workers of a host
    oversubscription: float = 1.0
    hosts_per_leaf: int = 1


def _ethernet(gbit: float, latency_s: float) -> Network:
    return Network(latency_s, gbit * 1e9 / 8 / FRAMING)


PRESETS = {
    "100mbit": Preset(_ethernet(0.1, 60e-6), "Ethernet, 4.6 % framing and a round trip of 60 us, as measured on emulated links"),
    "1gbit": Preset(_ethernet(1, 60e-6), "Ethernet, 4.6 % framing and a round trip of 60 us, as measured on emulated links"),
    "10gbit": Preset(_ethernet(10, 30e-6), "ASSUMED: line rate less 4.6 % framing; 30 us, a round figure for a kernel's TCP"),
    "25gbit": Preset(_ethernet(25, 25e-6), "ASSUMED: line rate less 4.6 % framing; 25 us, a round figure for a kernel's TCP"),
    "50gbit": Preset(_ethernet(50, 25e-6), "50 Gbit/s a host as in Goyal et al. 2017 (arXiv 1706.02677), less framing; latency ASSUMED"),
    "100gbit": Preset(_ethernet(100, 20e-6), "ASSUMED: line rate less 4.6 % framing; 20 us, a round figure for a kernel's TCP"),
    "infiniband-edr": Preset(Network(1.5e-6, 12.0e9), "ASSUMED: EDR's 100 Gbit/s less 4 % overhead; 1.5 us, a round figure for MPI over it"),
    "gemini": Preset(
        Network(1.5e-6, 70e9 * 0.56 / 8),
        "Cray Gemini (Titan) as an effective bandwidth: 70 Gbit/s at 56 %, as Paleo (ICLR 2017) fits FireCaffe's NiN; latency ASSUMED",
    ),
    "dgx1-edr": Preset(
        Network(2e-6, 4 * 12.0e9), "ASSUMED: 8 GPUs a host, four EDR ports; 30 GB/s a ring direction inside, 12 GB/s a port; latencies",
        workers_per_host=8, local=Link(5e-6, 30e9),
    ),
    "fat-tree-10gbit": Preset(
        _ethernet(10, 30e-6), "ASSUMED: 10 Gbit/s leaves of 16 hosts, uplinks oversubscribed 4 to 1", oversubscription=4, hosts_per_leaf=16
    ),
}  # fmt: skip


def preset(name: str) -> Preset:
    """A network by its name. Raises ``UserError`` for one that is not on the list."""
    if name not in PRESETS:
        raise unknown("--network", name, PRESETS)
    return PRESETS[name]


def parse_bandwidth(text: str) -> float:
    """``10Gbit`` or ``1.2GB`` (a second) as bytes a second."""
    units = {"kbit": 1e3 / 8, "mbit": 1e6 / 8, "gbit": 1e9 / 8, "kb": 1e3, "mb": 1e6, "gb": 1e9}
    lowered = text.strip().lower().removesuffix("/s")
    for unit in sorted(units, key=len, reverse=True):
        if lowered.endswith(unit):
            try:
                value = float(lowered.removesuffix(unit)) * units[unit]
            except ValueError:
                break
            if value > 0:
                return value
    raise UserError(
        f"--bandwidth: {text!r} is not allowed (allowed: a number with kbit, Mbit, Gbit, kB, MB or GB, such as 10Gbit)"
    )


@functools.lru_cache(maxsize=4096)
def allreduce_s(collective: str, workers: int, num_bytes: float, on: Preset) -> float:
    """Seconds an allreduce of ``num_bytes`` takes, costed on the schedule that would run.

    Where several workers share a host they reduce inside it first (reduce-scatter and all-gather over ``local``), and the
    collective runs between hosts, each host's port carrying its message once.
    """
    if workers <= 1:
        return 0.0
    inside = min(on.workers_per_host, workers)
    hosts = -(-workers // inside)
    local_s = 0.0
    if inside > 1:
        link = on.local or Link(on.network.latency_s, on.network.bandwidth_bytes_per_s)
        local_s = (
            2 * (inside - 1) * (link.latency_s + num_bytes / inside / link.bandwidth_bytes_per_s)
        )
    network = on.network
    if on.oversubscription > 1 and hosts > on.hosts_per_leaf:
        network = network._replace(
            bandwidth_bytes_per_s=network.bandwidth_bytes_per_s / on.oversubscription
        )
    return local_s + (_between(collective, hosts, num_bytes, network) if hosts > 1 else 0.0)


@functools.lru_cache(maxsize=4096)
def _loads(collective: str, size: int) -> tuple[cost.Load, ...]:
    """A schedule's loads; they do not depend on the network, so a fit makes each schedule once."""
    factory = plugins.load("collective", collective)
    stated = factory.__globals__.get("loads")
    if stated is not None and size >= 128:
        return tuple(stated(size))
    return tuple(cost.loads_of(factory(size)))


def _between(collective: str, hosts: int, num_bytes: float, network: Network) -> float:
    return cost.predict_seconds(_loads(collective, hosts), num_bytes, network)  # type: ignore[arg-type]


def _port(on: Preset, hosts: int, all_hosts: int) -> float:
    """Bytes a second of each host's port when ``hosts`` that fill leaves send out of them at once: uplinks may have less than the ports."""
    bandwidth = on.network.bandwidth_bytes_per_s
    if all_hosts <= on.hosts_per_leaf or on.oversubscription <= 1:
        return bandwidth
    uplinks = -(-hosts // on.hosts_per_leaf) * on.hosts_per_leaf / on.oversubscription  # in ports
    return bandwidth * min(1.0, uplinks / hosts)


def server_s(
    workers: int, num_bytes: float, on: Preset, servers: int = 1, segments: int = 16
) -> float:
    """Seconds until every worker has the new weights from ``servers`` hosts of their own: the star's schedule, streamed.

    Each server's port receives and sends ``workers`` times its share. In ``segments`` a server answers a part while the next one
    still arrives (FireCaffe counts |W| p / BW: infinitely many). A host's port carries the message once each way for each of its workers.
    Servers fill leaves of a fat tree of their own.
    """
    network = on.network
    inside = min(on.workers_per_host, workers)
    hosts = -(-workers // inside)
    at_server = workers * num_bytes / servers / _port(on, servers, hosts + servers)
    at_worker = inside * num_bytes / _port(on, hosts, hosts + servers)
    port_s = max(at_server, at_worker)
    if not network.duplex:
        port_s *= 2
    return port_s * (1 + 1 / segments) + 2 * network.latency_s * (
        workers if servers == 1 else -(-workers // servers)
    )
