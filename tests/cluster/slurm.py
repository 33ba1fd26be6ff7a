"""A real SLURM on this machine for the tests: munged, slurmctld and a slurmd for each emulated
node, all in a folder of their own.

Nothing under /etc is read or written. ``with Slurm(folder, nodes=4) as slurm:
subprocess.run(["srun", ...], env=slurm.env)``. Nodes n0, n1, ... have a core each, k0, k1 and k2
too, t0 two; g0 has two and two GPUs (character devices that do nothing). With ``network``, a
rehearsal cluster, each node is a host of its own, and so commands must be run on one of them
(``run`` does).
"""

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from scaletrain.rehearsal import Cluster

_LIBC = ctypes.CDLL(None)
DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")

CONF = """
ClusterName=test
SlurmctldHost={controller}
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
TmpFS={folder}/tmp-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SwitchType=switch/none
MpiDefault=none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
JobRequeue=1
KillWait=5
MinJobAge=60
SlurmctldTimeout=30
SlurmdTimeout=8
InactiveLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1,requeue_delay=1
{nodes}
PartitionName=low Nodes={hosts} Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=20
PartitionName=high Nodes={hosts} MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""
MORE = """PartitionName=gpu Nodes=g0 MaxTime=INFINITE State=UP PreemptMode=OFF
PartitionName=killed Nodes=k[0-2] MaxTime=INFINITE State=UP PreemptMode=OFF
PartitionName=timed Nodes=t0 MaxTime=INFINITE State=UP PreemptMode=OFF"""


def missing() -> list[str]:
    """What this machine lacks for it; empty when it can be started."""
    lacking = [
        name
        for name in DAEMONS
        if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None
    ]
    return lacking + ([] if os.geteuid() == 0 else ["root"])


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def _ended_with_us() -> None:
    """A daemon of a test run that is killed ends, too (PR_SET_PDEATHSIG)."""
    _LIBC.prctl(1, signal.SIGTERM)


class Slurm:
    def __init__(self, folder: Path, nodes: int = 4, network: Cluster | None = None):
        self.folder, self.network = folder, network
        self.nodes = [f"n{i}" for i in range(nodes)] + (
            [] if network else ["k0", "k1", "k2", "t0", "g0"]
        )
        self.daemons: dict[str, subprocess.Popen] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for name in (
            "state",
            *(f"tmp-{node}" for node in self.nodes),
        ):  # PMIx keeps its sockets in a node's own tmp
            (folder / name).mkdir()
        host = socket.gethostname()
        port, *ports = [6817, *[6818] * nodes] if network else _free_ports(len(self.nodes) + 1)
        lines = []
        for i, name in enumerate(self.nodes):
            address = network.addresses[i] if network else "127.0.0.1"
            size = {"t0": "CPUs=2", "g0": "CPUs=2 Gres=gpu:2"}.get(name, "CPUs=1")
            real = network.names[i] if network else host
            lines.append(
                f"NodeName={name} NodeHostname={real} NodeAddr={address} Port={ports[i]} {size} RealMemory=4000 State=UNKNOWN"
            )
        if not network:
            lines.append(MORE)
            self._make_gpus(2)
        controller = (
            f"{network.names[0]}({network.addresses[0]})" if network else f"{host}(127.0.0.1)"
        )
        hosts, lines = f"n[0-{nodes - 1}]", "\n".join(lines)
        text = CONF.format(
            controller=controller, port=port, folder=folder, nodes=lines, hosts=hosts
        )
        (folder / "slurm.conf").write_text(text)
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith("SLURM_")},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin",
        }

    def _make_gpus(self, count: int) -> None:
        """Devices such as /dev/null, that SLURM hands out as if they were GPUs."""
        for i in range(count):
            os.mknod(self.folder / f"gpu{i}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(
            f"NodeName=g0 Name=gpu File={self.folder}/gpu[0-{count - 1}]\n"
        )

    def __enter__(self) -> "Slurm":
        try:
            self._start_all()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start_all(self) -> None:
        key, munge = self.folder / "munge.key", self.folder / "munge.socket"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        self.folder.chmod(0o755)
        paths = {"key-file": key, "socket": munge, "pid-file": self.folder / "munged.pid"}
        paths |= {"log-file": self.folder / "munged.log", "seed-file": self.folder / "munged.seed"}
        self._start(
            "munged", "munged", "--foreground", "--force", *(f"--{k}={v}" for k, v in paths.items())
        )
        self._until(munge.exists, "munged's socket")
        self.start_controller("-c")
        for node in self.nodes:
            self.start_node(node)
        self._until(lambda: self._sinfo().count("idle") == len(self.nodes), "idle nodes")

    def start_controller(self, *arguments: str) -> None:
        self._start(
            "slurmctld", "slurmctld", "-D", "-f", str(self.folder / "slurm.conf"), *arguments
        )

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node, "-f", str(self.folder / "slurm.conf"))

    def kill(self, name: str) -> None:
        """``kill -9`` of one daemon: "slurmctld", or a node such as "n2"."""
        self.daemons[name].kill()
        self.daemons.pop(name).wait()

    def save_state(self) -> None:
        """Have slurmctld write down which jobs there are, which it does seconds later else: a
        killed one would forget the last of them.
        """
        asked = time.time()
        self.run("scontrol", "reconfigure")
        state = self.folder / "state" / "job_state"
        self._until(lambda: state.exists() and state.stat().st_mtime > asked, "saved state")

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.SubprocessError, OSError):
            self.run("scancel", "--user=root", "--signal=KILL", "--full", timeout=5)
        for name in sorted(self.daemons, key=lambda name: name == "munged"):
            self.daemons[name].terminate()
            try:
                self.daemons[name].wait(5)
            except subprocess.TimeoutExpired:
                self.daemons[name].kill()
                self.daemons[name].wait()
        self._end_step_daemons()

    def _end_step_daemons(self) -> None:
        """slurmstepd has no parent; it is ours when it was started with our configuration."""
        for entry in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if (
                    f"SLURM_CONF={self.folder}".encode()
                    in Path(f"/proc/{entry}/environ").read_bytes()
                ):
                    os.kill(int(entry), signal.SIGKILL) if int(entry) != os.getpid() else None

    def run(self, *command: str, timeout: float = 30) -> str:
        """The output of a SLURM command; raises when it fails."""
        done = subprocess.run(
            self.on(command), env=self.env, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
        return done.stdout

    def on(self, command: Sequence[str], node: str = "n0") -> Sequence[str]:
        """The command line that runs a command on a node's host, where nodes are hosts of their
        own.
        """
        return self.network.command(self.nodes.index(node), command) if self.network else command

    def state(self, job: str) -> dict[str, str]:
        text = self.run("scontrol", "show", "job", "-o", job)
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def _sinfo(self) -> str:
        command = self.on(["sinfo", "-h", "-N", "-o", "%N %T"])
        found = subprocess.run(
            command, env=self.env, capture_output=True, text=True, timeout=20
        ).stdout
        return " ".join(sorted(set(found.splitlines())))

    def _start(self, name: str, *command: str) -> None:
        log = open(self.folder / f"{name}.out", "a")  # noqa: SIM115 (the daemon keeps it)
        env = {**self.env, "SLURMD_NODENAME": name} if command[0] == "slurmd" else self.env
        self.daemons[name] = subprocess.Popen(
            self.on(command, name if name in self.nodes else "n0"), env=env, stdin=subprocess.DEVNULL,
            stdout=log, stderr=log, start_new_session=True, preexec_fn=_ended_with_us,
        )  # fmt: skip
        log.close()

    def _until(self, condition, what: str, timeout_s: float = 20) -> None:
        until = time.monotonic() + timeout_s
        while not condition():
            dead = [name for name, daemon in self.daemons.items() if daemon.poll() is not None]
            assert not dead, f"{dead} ended: {(self.folder / f'{dead[0]}.out').read_text()[-2000:]}"
            assert time.monotonic() < until, (
                f"SLURM: no {what} after {timeout_s} s: {self._sinfo()}"
            )
            time.sleep(0.1)
