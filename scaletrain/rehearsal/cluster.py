"""A cluster of hosts on this machine: a namespace a host, a switch between them, links of a given bandwidth.

    with Cluster(hosts=4, bandwidth="1Gbit") as cluster:
        cluster.run(0, ["hostname"])              # h0
        before = cluster.counters()
        cluster.cut(3); cluster.heal(3); cluster.shape(2, "100Mbit")

Host i is called ``h<i>``, has the address ``cluster.addresses[i]`` on its one interface ``eth0``, its own host name, /etc/hosts, /dev/shm
and IPC; files are shared, as on a cluster with a network file system. What runs on it is EMULATED: all hosts share this machine's cores.
"""

import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from scaletrain.errors import UserError
from scaletrain.host.processes import start_ticks
from scaletrain.rehearsal import keeper, machine
from scaletrain.rehearsal.links import burst_bytes
from scaletrain.units import bits_per_s, seconds

MAX_HOSTS = 250
INTERFACE = "eth0"
CONGESTION_CONTROL = "reno"

# What libraries must be told so that they use the link, and nothing else, between processes.
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
    "OMPI_MCA_pml": "ob1",
    "OMPI_MCA_btl_tcp_if_include": INTERFACE,
}


class Traffic(NamedTuple):
    """Bytes on a host's link since the cluster began, framing of large packets counted once (the wire carries about 4 % more)."""

    sent_bytes: int
    received_bytes: int
    dropped_packets: int = 0  # on their way into the host, where a loss is asked for


class Cluster:
    """``hosts`` emulated hosts. Made on ``__enter__``, gone after ``__exit__`` with every process on them.

    They go as well when this process dies, however it dies. Needs Linux, iproute2, util-linux, and root or unprivileged user namespaces.

    Args:
        hosts: how many, 1 to 250.
        bandwidth: of each link, in each direction, as ``tc`` writes it (``1Gbit``, ``100Mbit``); ``None``: unshaped.
        latency: one way, host to host (``100us``, ``1ms``); needs the kernel's netem.
        loss: probability that a packet is dropped on its way into a host. TCP's large packets, up to 64 KB, count as one.

    Raises:
        UserError: something that was asked for cannot be had on this machine; says what is missing.
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
        self.bandwidth, self.latency_s, self.loss = bandwidth, seconds(latency), loss
        self._bits_per_s = bits_per_s(bandwidth) if bandwidth else None
        self.id = secrets.token_hex(4)
        self.names = tuple(f"h{i}" for i in range(hosts))
        self.addresses = tuple(f"10.77.0.{i + 1}" for i in range(hosts))
        self._user = not machine.privileged()
        self._keeper: subprocess.Popen[str] | None = None
        self._switch, self._pids = 0, (0,) * hosts

    # --- life ---------------------------------------------------------------------------------------------------------------------

    def __enter__(self) -> "Cluster":
        machine.check()
        machine.remove_leftovers()
        record = machine.records() / f"{self.id}.json"
        hosts_file = machine.records() / f"{self.id}.hosts"
        lines = ["127.0.0.1 localhost"]
        for address, name in zip(self.addresses, self.names, strict=True):
            # IPv6 sockets see the second form; without it each accepted connection would wait for a name server.
            lines += [f"{address} {name}", f"::ffff:{address} {name}"]
        hosts_file.write_text("\n".join(lines) + "\n", encoding="utf-8")
        record.write_text(
            json.dumps({"owner": os.getpid(), "started": start_ticks(os.getpid())}),
            encoding="utf-8",
        )
        request = {"hosts": self.names, "hosts_file": str(hosts_file), "user": self._user}
        self._keeper = subprocess.Popen(
            [sys.executable, "-I", keeper.__file__, json.dumps(request)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        try:
            assert self._keeper.stdout and self._keeper.stderr
            answer = self._keeper.stdout.readline()
            if not answer:
                raise UserError(
                    f"the rehearsal cluster could not be made: {self._keeper.stderr.read().strip()}"
                )
            made = json.loads(answer)
            self._switch, self._pids = made["switch"], tuple(made["hosts"])
            self._wire()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process on the hosts, then the hosts."""
        if self._keeper:
            assert self._keeper.stdin and self._keeper.stdout and self._keeper.stderr
            self._keeper.stdin.close()
            try:
                self._keeper.wait(machine.SETUP_S)
            except subprocess.TimeoutExpired:  # its death takes the namespaces' holders along
                self._keeper.kill()
                self._keeper.wait()
            self._keeper.stdout.close()
            self._keeper.stderr.close()
            self._keeper = None
        for suffix in ("json", "hosts"):
            (machine.records() / f"{self.id}.{suffix}").unlink(missing_ok=True)

    # --- running --------------------------------------------------------------------------------------------------------------------

    def environment(self, host: int) -> dict[str, str]:
        """Variables that a process on this host is started with (``command`` sets them)."""
        return {**_ENVIRONMENT, "SCALETRAIN_HOST": self.names[host], machine.MARK: self.id}

    def command(
        self, host: int, argv: Sequence[str], env: Mapping[str, str] | None = None
    ) -> tuple[str, ...]:
        """The command line that runs ``argv`` on a host, in this directory; the process started is ``argv`` itself (no fork)."""
        variables = self.environment(host) | dict(env or {})
        assignments = [f"{key}={value}" for key, value in variables.items()]
        entered = (*self._enter(self._pids[host], True), *keeper.ENTERED, str(self._pids[host]))
        return (*entered, "env", f"--chdir={os.getcwd()}", *assignments, *argv)

    def start(
        self, host: int, argv: Sequence[str], env: Mapping[str, str] | None = None, **popen: Any
    ) -> subprocess.Popen:
        """``subprocess.Popen`` on a host; ``env`` is added to this process's environment."""
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
        """``subprocess.run`` on a host, with text output captured; raises CalledProcessError and TimeoutExpired."""
        options: dict[str, Any] = {"capture_output": True, "text": True, "check": True} | popen
        return subprocess.run(self.command(host, argv, env), timeout=timeout_s, **options)

    def processes(self, host: int) -> list[int]:
        """Process ids of what runs on a host."""
        namespace = os.readlink(f"/proc/{self._pids[host]}/ns/net")
        return [pid for pid in keeper.processes_within({namespace}) if pid != self._pids[host]]

    # --- links ----------------------------------------------------------------------------------------------------------------------

    def counters(self) -> list[Traffic]:
        """Each host's traffic so far, counted at the switch."""
        text = machine.output([*self._enter(self._switch), "cat", "/proc/net/dev"])
        fields = {
            line.split(":")[0].strip(): line.split(":")[1].split()
            for line in text.splitlines()
            if ":" in line
        }
        dropped = [self._dropped(pid) for pid in self._pids] if self.loss else [0] * len(self.names)
        return [
            Traffic(int(fields[f"p{i}"][0]), int(fields[f"p{i}"][8]), n)
            for i, n in enumerate(dropped)
        ]

    def cut(self, host: int) -> None:
        """Pull a host's cable at the switch: packets vanish, connections stay open, nobody is told."""
        self._ip(self._switch, [f"link set p{host} nomaster"])

    def heal(self, host: int) -> None:
        """Put the cable back."""
        self._ip(self._switch, [f"link set p{host} master switch"])

    def shape(self, host: int, bandwidth: str | None) -> None:
        """Give a host's link another bandwidth, in both directions."""
        rate = bits_per_s(bandwidth) if bandwidth else None
        self._tc(self._switch, f"p{host}", rate)
        self._tc(self._pids[host], INTERFACE, rate)

    def kill(self, host: int) -> int:
        """SIGKILL everything on a host, as if its power failed; returns how many processes there were."""
        namespace = os.readlink(f"/proc/{self._pids[host]}/ns/net")
        return keeper.kill_within({namespace}, spare=frozenset({self._pids[host]}))

    def describe(self) -> dict[str, Any]:
        """What is emulated, for records and reports."""
        return {
            "emulated": True,
            "kind": "hosts in network namespaces of one machine",
            "hosts": len(self.names),
            "bandwidth": self.bandwidth or "unshaped",
            "bandwidth_bytes_per_s": self._bits_per_s / 8 if self._bits_per_s else None,
            "latency_s": self.latency_s,
            "loss": self.loss,
            "cores": len(os.sched_getaffinity(0)),
        }

    # --- wiring ---------------------------------------------------------------------------------------------------------------------

    def _wire(self) -> None:
        links = [
            "link add switch type bridge mcast_snooping 0",
            "link set switch up",
            "link set lo up",
        ]
        for i, pid in enumerate(self._pids):
            links += [
                f"link add p{i} type veth peer name {INTERFACE} netns {pid}",
                f"link set p{i} master switch up",
            ]
        self._ip(self._switch, links)
        for i, pid in enumerate(self._pids):
            self._ip(
                pid,
                [
                    "link set lo up",
                    f"addr add {self.addresses[i]}/24 dev {INTERFACE}",
                    f"link set {INTERFACE} up",
                ],
            )
            self._steady_tcp(pid)
        delay = self.latency_s > 0 and self._has_netem()
        if self.latency_s > 0 and not delay:
            raise UserError(
                f"latency: {self.latency_s:g} s needs netem, which this kernel does not have (allowed here: 0;"
                " elsewhere: modprobe sch_netem)"
            )
        for i, pid in enumerate(self._pids):
            self._tc(self._switch, f"p{i}", self._bits_per_s, self.latency_s)
            self._tc(pid, INTERFACE, self._bits_per_s)
            if self.loss:
                self._drop(pid)

    def _tc(self, pid: int, device: str, rate: float | None, delay_s: float = 0.0) -> None:
        commands = []
        if rate:
            # The queue never drops: TCP slows down by itself.
            burst = burst_bytes(rate)
            limit = max(round(rate / 8 * 0.5), 1 << 26)
            commands.append(
                f"qdisc replace dev {device} root handle 1: tbf rate {rate:.0f}bit burst {burst} limit {limit}"
            )
        else:
            subprocess.run(
                [*self._enter(pid), *machine.tool("tc"), "qdisc", "del", "dev", device, "root"],
                capture_output=True,
            )
        if delay_s:
            parent = "parent 1:1" if rate else "root"
            commands.append(
                f"qdisc replace dev {device} {parent} netem delay {delay_s * 1e6:.0f}us limit 100000"
            )
        if commands:
            machine.batch([*self._enter(pid), *machine.tool("tc"), "-batch", "-"], commands)

    def _steady_tcp(self, pid: int) -> None:
        """Reno, which a namespace may always choose. The machine's own may be BBR, which guesses a token bucket's rate and paces below it:
        exchanges in both directions then took 10 % longer, and varied. Where /proc/sys is not writable the machine's own stays."""
        choose = f"echo {CONGESTION_CONTROL} > /proc/sys/net/ipv4/tcp_congestion_control"
        subprocess.run(
            [*self._enter(pid), "sh", "-c", choose], capture_output=True, timeout=machine.SETUP_S
        )

    def _has_netem(self) -> bool:
        probe = [
            *self._enter(self._switch),
            *machine.tool("tc"),
            "qdisc",
            "replace",
            "dev",
            "lo",
            "root",
            "netem",
            "delay",
            "1ms",
        ]
        return subprocess.run(probe, capture_output=True, timeout=machine.SETUP_S).returncode == 0

    def _drop(self, pid: int) -> None:
        """Packets are dropped where they enter the host. Without netem that takes iptables."""
        if not shutil.which("iptables", path=machine.PATH):
            raise UserError("loss: needs iptables (apt install iptables)")
        rule = (
            f"-A INPUT -i {INTERFACE} -m statistic --mode random --probability {self.loss} -j DROP"
        )
        done = subprocess.run(
            [*self._enter(pid), *machine.tool("iptables"), *rule.split()],
            capture_output=True,
            text=True,
            timeout=machine.SETUP_S,
        )
        if done.returncode != 0:
            raise UserError(
                f"loss: this kernel's iptables cannot drop at random: {done.stderr.strip().splitlines()[0]}"
            )

    def _dropped(self, pid: int) -> int:
        text = machine.output(
            [
                *self._enter(pid),
                *machine.tool("iptables"),
                "--list",
                "INPUT",
                "--verbose",
                "--exact",
                "--numeric",
            ]
        )
        return next(
            int(line.split()[0]) for line in text.splitlines() if "DROP" in line.split()[2:3]
        )

    def _enter(self, pid: int, all_namespaces: bool = False) -> list[str]:
        user = ["--user", "--preserve-credentials"] if self._user else []
        more = ["--uts", "--mount", "--ipc"] if all_namespaces else []
        return [*machine.tool("nsenter"), f"--target={pid}", *user, "--net", *more, "--"]

    def _ip(self, pid: int, commands: list[str]) -> None:
        machine.batch([*self._enter(pid), *machine.tool("ip"), "-batch", "-"], commands)
