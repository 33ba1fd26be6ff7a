"""Emulated links: cables between hosts and a switch, with a bandwidth, a delay and a loss.

Every host has one interface, ``eth0``. Its cable ends at port ``p<host>`` of a bridge in the
switch's own namespace. A cut pulls the cable out of the bridge.
"""

import shutil
from collections.abc import Sequence
from typing import NamedTuple

from scaletrain.errors import UserError
from scaletrain.rehearsal import machine
from scaletrain.rehearsal.machine import Namespace

INTERFACE = "eth0"
CONGESTION_CONTROL = "reno"
_QUEUE_BYTES = 1 << 26  # of a link, at least; a queue that never drops lets TCP slow down by itself
_LARGE_PACKET_BYTES = 72 * 1024  # one of TCP's large packets, with the framing of its 45 parts


class Traffic(NamedTuple):
    """Bytes on a host's link since the cluster began.

    The framing of a large packet counts once; the wire carries about 4 % more.
    """

    sent_bytes: int
    received_bytes: int
    dropped_packets: int = 0  # on their way into the host; counted only where a loss is set


def burst_bytes(rate: float) -> int:
    """Return the size of a link's token bucket: 2 ms of its rate, in bytes.

    It holds at least one of TCP's large packets. A smaller bucket takes those apart, and then 16
    busy hosts send more small packets than two cores can pass on.

    Args:
        rate: of the link, in bits per second.
    """
    return max(round(rate / 8 * 0.002), _LARGE_PACKET_BYTES)


# Cables.


def wire(switch: Namespace, hosts: Sequence[Namespace], addresses: Sequence[str]) -> None:
    """Build the switch, put a cable from each host into it, and give each host its address."""
    commands = [
        "link add switch type bridge mcast_snooping 0",
        "link set switch up",
        "link set lo up",
    ]
    for host, namespace in enumerate(hosts):
        peer = f"peer name {INTERFACE} netns {namespace.holder}"
        commands.append(f"link add {_port(host)} type veth {peer}")
        commands.append(f"link set {_port(host)} master switch up")
    _ip(switch, commands)
    for namespace, address in zip(hosts, addresses, strict=True):
        commands = [
            "link set lo up",
            f"addr add {address}/24 dev {INTERFACE}",
            f"link set {INTERFACE} up",
        ]
        _ip(namespace, commands)
        _choose_congestion_control(namespace)


def unplug(switch: Namespace, host: int) -> None:
    """Pull a host's cable out of the switch. Packets vanish; connections stay open."""
    _ip(switch, [f"link set {_port(host)} nomaster"])


def plug(switch: Namespace, host: int) -> None:
    """Put a host's cable back."""
    _ip(switch, [f"link set {_port(host)} master switch"])


def transferred_bytes(switch: Namespace, num_hosts: int) -> list[tuple[int, int]]:
    """Return (sent, received) bytes of every host so far, as the switch counts them."""
    text = machine.output(switch.enter_network("cat", "/proc/net/dev"))
    counters = {}
    for line in text.splitlines():
        interface, colon, counts = line.partition(":")
        if colon:
            counters[interface.strip()] = counts.split()
    transferred = []
    for host in range(num_hosts):
        # Field 0 is the bytes received, field 8 the bytes sent (proc(5)).
        fields = counters[_port(host)]
        # The switch receives what the host sends.
        transferred.append((int(fields[0]), int(fields[8])))
    return transferred


# Bandwidth, delay and loss.


def shape(
    switch: Namespace, namespace: Namespace, host: int, rate: float | None, delay_s: float = 0.0
) -> None:
    """Give a host's link a bandwidth in both directions, and a delay on the way to the host.

    Args:
        rate: in bits per second; None leaves the link unshaped.
        delay_s: one way, in seconds. It is on one end only, so host to host it counts once.
    """
    _shape_end(switch, _port(host), rate, delay_s)
    _shape_end(namespace, INTERFACE, rate, 0.0)


def has_netem(switch: Namespace) -> bool:
    """Return True if the kernel can delay packets. Probed, since no list of modules tells."""
    qdisc = ["qdisc", "replace", "dev", "lo", "root", "netem", "delay", "1ms"]
    probe = switch.enter_network(machine.tool("tc"), *qdisc)
    return machine.run_tool(probe).returncode == 0


def drop_at_random(namespace: Namespace, probability: float) -> None:
    """Drop packets where they enter the host. Without netem that takes iptables.

    Raises:
        UserError: there is no iptables, or it cannot drop at random here.
    """
    if not shutil.which("iptables", path=machine.PATH):
        raise UserError("loss: needs iptables (apt install iptables)")
    rule = f"-A INPUT -i {INTERFACE} -m statistic --mode random --probability {probability} -j DROP"
    argv = [machine.tool("iptables"), *rule.split()]
    done = machine.run_tool(namespace.enter_network(*argv))
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[0]
        raise UserError(f"loss: this kernel's iptables cannot drop at random: {reason}")


def dropped_packets(namespace: Namespace) -> int:
    """Return how many packets ``drop_at_random`` has dropped on one host."""
    options = ["--list", "INPUT", "--verbose", "--exact", "--numeric"]
    text = machine.output(namespace.enter_network(machine.tool("iptables"), *options))
    for line in text.splitlines():
        # The columns are packets, bytes, target, ...
        fields = line.split()
        if "DROP" in fields[2:3]:
            return int(fields[0])
    raise RuntimeError(f"iptables lists no rule that drops packets:\n{text}")


def _port(host: int) -> str:
    """Return the name of a host's port of the switch."""
    return f"p{host}"


def _shape_end(namespace: Namespace, device: str, rate: float | None, delay_s: float) -> None:
    tc = machine.tool("tc")
    commands = []
    if rate:
        # Half a second of the rate, in bytes.
        limit = max(round(rate / 8 * 0.5), _QUEUE_BYTES)
        bucket = f"rate {rate:.0f}bit burst {burst_bytes(rate)} limit {limit}"
        commands.append(f"qdisc replace dev {device} root handle 1: tbf {bucket}")
    else:
        # It fails where the link was never shaped, which is just as good.
        machine.run_tool(namespace.enter_network(tc, "qdisc", "del", "dev", device, "root"))
    if delay_s:
        # With a rate, the delay goes inside the token bucket, in place of its queue.
        parent = "parent 1:1" if rate else "root"
        # netem's own limit of 1000 packets would drop some at high rates.
        delay = f"delay {delay_s * 1e6:.0f}us limit 100000"
        commands.append(f"qdisc replace dev {device} {parent} netem {delay}")
    if commands:
        machine.batch(namespace.enter_network(tc, "-batch", "-"), commands)


def _choose_congestion_control(namespace: Namespace) -> None:
    """Choose Reno, which a namespace may always choose.

    The machine's own may be BBR, which guesses a token bucket's rate and paces below it: exchanges
    in both directions then took 10 % longer, and varied. Where /proc/sys is not writable, the
    machine's own stays.
    """
    script = f"echo {CONGESTION_CONTROL} > /proc/sys/net/ipv4/tcp_congestion_control"
    machine.run_tool(namespace.enter_network("sh", "-c", script))


def _ip(namespace: Namespace, commands: list[str]) -> None:
    machine.batch(namespace.enter_network(machine.tool("ip"), "-batch", "-"), commands)
