"""A cluster of hosts on this machine: namespaces around a switch, with shaped links.

    with Cluster(hosts=4, bandwidth="1Gbit") as cluster:
        cluster.run(0, ["hostname"])              # h0
        before = cluster.counters()
        cluster.cut(3); cluster.heal(3); cluster.shape(2, "100Mbit")

Host i is called ``h<i>`` and has the address ``cluster.addresses[i]`` on its one interface
``eth0``. It has its own host name, /etc/hosts, /dev/shm and IPC. Files are shared, as on a cluster
with a network file system. Everything on it is EMULATED: all hosts share this machine's cores.
"""

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from scaletrain.errors import UserError
from scaletrain.rehearsal import keeper, links, machine
from scaletrain.rehearsal.links import INTERFACE, Traffic
from scaletrain.rehearsal.machine import Namespace
from scaletrain.units import bits_per_s, seconds

# All addresses lie in one /24 network and differ in the last byte.
MAX_HOSTS = 250

# Libraries need these to use the link between processes, and nothing else.
_ENVIRONMENT = {
    "GLOO_SOCKET_IFNAME": INTERFACE,
    "TP_SOCKET_IFNAME": INTERFACE,
    "NCCL_SOCKET_IFNAME": INTERFACE,
    "NCCL_SHM_DISABLE": "1",
    "NCCL_P2P_DISABLE": "1",
    "HOROVOD_GLOO_IFACE": INTERFACE,
    "UCX_TLS": "tcp,self",  # MPICH would copy between the processes' memories
    "UCX_NET_DEVICES": INTERFACE,
    "OMPI_MCA_btl": "tcp,self",
    # Of the pml components, ob1 is the one that obeys the btl lines.
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl_tcp_if_include": INTERFACE,
}


class Cluster:
    """Emulated hosts. They exist from ``__enter__`` to ``__exit__``.

    Every process on them ends with them. They also end when this process dies, however it dies.
    Needs Linux, iproute2, util-linux, and root or unprivileged user namespaces.

    Args:
        hosts: how many, 1 to 250.
        bandwidth: of each link, in each direction, as ``tc`` writes it (``1Gbit``, ``100Mbit``);
            None leaves the links unshaped.
        latency: one way, host to host (``100us``, ``1ms``). Needs the kernel's netem.
        loss: probability that a packet is dropped on its way into a host. TCP's large packets, up
            to 64 KB, count as one.

    Raises:
        UserError: an argument is not allowed, or ``__enter__`` finds that this machine lacks
            something, which the message names.
    """

    def __init__(
        self, hosts: int, *, bandwidth: str | None = "1Gbit", latency: str = "0", loss: float = 0.0
    ):
        if not 1 <= hosts <= MAX_HOSTS:
            raise UserError(f"hosts: {hosts} is not allowed (allowed: 1 to {MAX_HOSTS})")
        if not 0 <= loss < 1:
            raise UserError(
                f"loss: {loss} is not allowed (allowed: a probability, from 0 to below 1)"
            )
        self.bandwidth = bandwidth
        self.latency_s = seconds(latency)
        self.loss = loss
        self.id = secrets.token_hex(4)
        self.names = tuple(f"h{host}" for host in range(hosts))
        self.addresses = tuple(f"10.77.0.{host + 1}" for host in range(hosts))
        self._bits_per_s = bits_per_s(bandwidth) if bandwidth else None
        self._has_user_namespace = not machine.is_privileged()
        # Set by __enter__.
        self._keeper: subprocess.Popen[str] | None = None
        self._switch = Namespace(0, self._has_user_namespace)
        self._hosts: list[Namespace] = []

    # Beginning and end.

    def __enter__(self) -> "Cluster":
        machine.check()
        machine.remove_leftovers()
        self._write_hosts_file()
        # Before the first process exists: whatever kills this one, the next start finds the record.
        machine.write_record(self.id)
        try:
            self._start_keeper()
            self._wire()
        except BaseException:
            # Python calls no ``__exit__`` if ``__enter__`` fails, even by Ctrl-C.
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process on the hosts, then the hosts."""
        if self._keeper:
            assert self._keeper.stdin and self._keeper.stdout and self._keeper.stderr
            # The keeper ends the hosts when its standard input closes.
            self._keeper.stdin.close()
            try:
                self._keeper.wait(machine.SETUP_S)
            except subprocess.TimeoutExpired:  # its death takes the namespaces' holders along
                self._keeper.kill()
                self._keeper.wait()
            self._keeper.stdout.close()
            self._keeper.stderr.close()
            self._keeper = None
        machine.remove_record(self.id)

    # Processes on the hosts.

    def environment(self, host: int) -> dict[str, str]:
        """Return the variables that ``command`` sets for a process on this host."""
        return {**_ENVIRONMENT, "SCALETRAIN_HOST": self.names[host], machine.MARK: self.id}

    def command(
        self, host: int, argv: Sequence[str], env: Mapping[str, str] | None = None
    ) -> tuple[str, ...]:
        """Return the command line that runs ``argv`` on a host, in the working directory.

        The process that it starts becomes ``argv`` itself; nothing forks.
        """
        variables = self.environment(host) | dict(env or {})
        assignments = [f"{key}={value}" for key, value in variables.items()]
        namespace = self._hosts[host]
        # Whoever enters a mount namespace lands in its root directory.
        become = [*keeper.ENTERED, str(namespace.holder), "env", f"--chdir={os.getcwd()}"]
        return tuple(namespace.enter_host(*become, *assignments, *argv))

    def start(
        self, host: int, argv: Sequence[str], env: Mapping[str, str] | None = None, **popen: Any
    ) -> subprocess.Popen:
        """Start a process on a host (``subprocess.Popen``); ``env`` is added to its environment."""
        return subprocess.Popen(self.command(host, argv, env), **popen)

    def run(
        self,
        host: int,
        argv: Sequence[str],
        env: Mapping[str, str] | None = None,
        *,
        timeout_s: float = 60.0,
        **popen: Any,
    ) -> subprocess.CompletedProcess:
        """Run a command on a host to its end (``subprocess.run``), and capture its text output.

        Raises:
            CalledProcessError: it failed.
            TimeoutExpired: it took longer than ``timeout_s``.
        """
        options: dict[str, Any] = {"capture_output": True, "text": True, "check": True} | popen
        return subprocess.run(self.command(host, argv, env), timeout=timeout_s, **options)

    def processes(self, host: int) -> list[int]:
        """Return the ids of the processes that run on a host."""
        namespace = self._hosts[host]
        pids = keeper.processes_within({namespace.network_id()})
        return [pid for pid in pids if pid != namespace.holder]

    def is_idle(self) -> bool:
        """Return True if nothing runs on any host."""
        return not any(self.processes(host) for host in range(len(self.names)))

    def kill(self, host: int) -> int:
        """Send SIGKILL to every process on a host, as if its power failed.

        Returns:
            How many processes there were.
        """
        namespace = self._hosts[host]
        # The holder stays: the host itself would vanish with it.
        return keeper.kill_within({namespace.network_id()}, spare=frozenset({namespace.holder}))

    # Links.

    def counters(self) -> list[Traffic]:
        """Return each host's traffic so far, counted at the switch."""
        traffic = []
        transferred = links.transferred_bytes(self._switch, len(self.names))
        for namespace, (sent, received) in zip(self._hosts, transferred, strict=True):
            dropped = links.dropped_packets(namespace) if self.loss else 0
            traffic.append(Traffic(sent, received, dropped))
        return traffic

    def cut(self, host: int) -> None:
        """Pull a host's cable at the switch: packets vanish, connections stay open."""
        links.unplug(self._switch, host)

    def heal(self, host: int) -> None:
        """Put the cable back."""
        links.plug(self._switch, host)

    def shape(self, host: int, bandwidth: str | None) -> None:
        """Give a host's link another bandwidth, in both directions."""
        rate = bits_per_s(bandwidth) if bandwidth else None
        links.shape(self._switch, self._hosts[host], host, rate)

    def describe(self) -> dict[str, Any]:
        """Describe the emulation as JSON, for records and reports."""
        return {
            "emulated": True,
            "kind": "hosts in network namespaces of one machine",
            "hosts": len(self.names),
            "bandwidth": self.bandwidth,
            "bandwidth_bytes_per_s": self._bits_per_s / 8 if self._bits_per_s else None,
            "latency_s": self.latency_s,
            "loss": self.loss,
            "cores": len(os.sched_getaffinity(0)),
        }

    # Steps of the beginning.

    def _write_hosts_file(self) -> None:
        """Write the file that the hosts see as /etc/hosts."""
        lines = ["127.0.0.1 localhost"]
        for address, name in zip(self.addresses, self.names, strict=True):
            lines.append(f"{address} {name}")
            # IPv6 sockets see this form. Without it each accepted connection would wait for a
            # name server.
            lines.append(f"::ffff:{address} {name}")
        machine.hosts_file(self.id).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def _start_keeper(self) -> None:
        """Start the process that makes the namespaces and keeps them alive (``keeper``)."""
        request = {
            "hosts": self.names,
            "hosts_file": str(machine.hosts_file(self.id)),
            "user": self._has_user_namespace,
        }
        # A session of its own: signals of the terminal, such as Ctrl-C, are for this process alone.
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", keeper.__file__, json.dumps(request)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._keeper.stdout and self._keeper.stderr
        line = self._keeper.stdout.readline()
        if not line:
            reason = self._keeper.stderr.read().strip()
            raise UserError(f"the rehearsal cluster could not be made: {reason}")
        holders = json.loads(line)
        self._switch = Namespace(holders["switch"], self._has_user_namespace)
        self._hosts = [Namespace(pid, self._has_user_namespace) for pid in holders["hosts"]]

    def _wire(self) -> None:
        links.wire(self._switch, self._hosts, self.addresses)
        if self.latency_s > 0 and not links.has_netem(self._switch):
            raise UserError(
                f"latency: {self.latency_s:g} s needs netem, which this kernel does not have"
                " (allowed here: 0; elsewhere: modprobe sch_netem)"
            )
        for host, namespace in enumerate(self._hosts):
            links.shape(self._switch, namespace, host, self._bits_per_s, self.latency_s)
            if self.loss:
                links.drop_at_random(namespace, self.loss)
