"""Tests of rehearsal/: hosts, their links, faults on them, and that nothing is left behind."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scaletrain.errors import UserError
from scaletrain.rehearsal import Cluster, links, machine
from tests.conftest import require

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("namespaces")]

SERVER = """
import socket, sys, time
listener = socket.create_server(("0.0.0.0", 5000)); print("listening", flush=True)
connection, _ = listener.accept()
total, began = 0, time.monotonic()
while data := connection.recv(1 << 20):
    total += len(data)
print(total, time.monotonic() - began, flush=True)
"""
CLIENT = """
import socket, sys
connection = socket.create_connection((sys.argv[1], 5000), timeout=30)
connection.sendall(bytes(int(sys.argv[2])))
"""


def send(hosts: Cluster, source: int, target: int, size: int) -> tuple[int, float]:
    """Bytes received and seconds, of ``size`` bytes over one TCP connection."""
    server = hosts.start(target, [sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert server.stdout and server.stdout.readline() == "listening\n"
    hosts.run(source, [sys.executable, "-c", CLIENT, hosts.names[target], str(size)])
    output, _ = server.communicate(timeout=60)
    received, taken = output.split()
    return int(received), float(taken)


def can_reach(hosts: Cluster, source: int, target: int) -> bool:
    program = "import socket,sys; s = socket.socket(); s.settimeout(0.5); print(s.connect_ex((sys.argv[1], 9)))"
    answer = hosts.run(source, [sys.executable, "-c", program, hosts.addresses[target]]).stdout
    return int(answer) == 111  # refused: somebody is there


def test_each_host_is_its_own():
    with Cluster(3) as hosts:
        for i in range(3):
            script = "hostname; echo $SCALETRAIN_HOST; pwd; ls /dev/shm; touch /dev/shm/mark; ls -d /sys/class/net"
            lines = hosts.run(i, ["sh", "-c", script]).stdout.split()
            assert lines == [f"h{i}", f"h{i}", os.getcwd(), "/sys/class/net"]
        assert not Path("/dev/shm/mark").exists()
        assert can_reach(hosts, 0, 2)


def test_bandwidth_is_that_of_the_link_and_the_counters_see_every_byte():
    size = 5_000_000
    with Cluster(2, bandwidth="100Mbit") as hosts:
        before = hosts.counters()
        received, taken = send(hosts, 1, 0, size)
        after = hosts.counters()
        assert received == size
        assert 0.9 * size / 12.5e6 < taken < 1.5 * size / 12.5e6
        assert size < after[1].sent_bytes - before[1].sent_bytes < 1.1 * size
        assert size < after[0].received_bytes - before[0].received_bytes < 1.1 * size
        hosts.shape(1, "500Mbit")
        assert send(hosts, 1, 0, size)[1] > 0.9 * size / 12.5e6  # the other end is still slow
        hosts.shape(0, "500Mbit")
        assert send(hosts, 1, 0, size)[1] < 0.5 * size / 12.5e6


def test_a_cut_host_is_gone_until_healed():
    with Cluster(3) as hosts:
        hosts.cut(2)
        assert not can_reach(hosts, 0, 2)
        assert can_reach(hosts, 0, 1)
        hosts.heal(2)
        assert can_reach(hosts, 0, 2)


def test_killing_a_host_ends_its_processes_and_no_others():
    with Cluster(2) as hosts:
        programs = [hosts.start(i, ["sleep", "60"]) for i in (0, 0, 1)]
        deadline = time.monotonic() + 10
        while [len(hosts.processes(i)) for i in (0, 1)] != [2, 1] and time.monotonic() < deadline:
            time.sleep(0.02)
        assert hosts.kill(0) == 2
        assert [program.wait(5) for program in programs[:2]] == [-signal.SIGKILL] * 2
        assert programs[2].poll() is None
    assert programs[2].wait(5) == -signal.SIGKILL


def test_loss_drops_packets_and_tcp_makes_up_for_them(iptables):
    try:
        with Cluster(2, bandwidth="100Mbit", loss=0.1) as hosts:
            received, _ = send(hosts, 0, 1, 5_000_000)
            assert received == 5_000_000
            assert sum(host.dropped_packets for host in hosts.counters()) > 0
            assert hosts.describe()["loss"] == 0.1
    except UserError as refused:
        require("namespaces", False, str(refused))
    with Cluster(2) as hosts:
        assert can_reach(hosts, 0, 1) and hosts.counters()[1].dropped_packets == 0


def test_latency_delays_or_is_refused_by_name():
    """Delay needs netem, which not every kernel has: it is probed, never left out in silence."""
    hosts = Cluster(2, latency="50ms")
    try:
        hosts.__enter__()
    except UserError as refused:
        assert "latency: 0.05 s needs netem, which this kernel does not have" in str(refused)
        assert hosts._keeper is None  # nothing is left of it
        return
    try:
        began = time.monotonic()
        assert can_reach(hosts, 0, 1)
        assert time.monotonic() - began > 0.05
    finally:
        hosts.close()


def test_missing_parts_of_the_kernel_are_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    which = shutil.which
    with monkeypatch.context() as without:
        without.setattr(
            shutil,
            "which",
            lambda name, path=None: None if name == "iptables" else which(name, path=path),
        )
        with pytest.raises(UserError, match="loss: needs iptables"), Cluster(2, loss=0.1):
            pass
    monkeypatch.setattr(links, "has_netem", lambda switch: False)
    with (
        pytest.raises(UserError, match=r"latency: 0\.0001 s needs netem"),
        Cluster(2, latency="100us"),
    ):
        pass


OWNER = """
import subprocess, sys, time
from scaletrain.rehearsal import Cluster
with Cluster(2) as hosts:
    program = hosts.start(1, ["sleep", "300"])
    while "entered" in sys.argv and not hosts.processes(1):
        time.sleep(0.01)
    print(hosts._keeper.pid, program.pid, flush=True)
    time.sleep(300)
"""


def gone(pid: int, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize("program", ["entering", "entered"])
def test_kill_9_of_the_owner_leaves_nothing(program: str):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, program], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout
    keeper_pid, pid = map(int, owner.stdout.readline().split())
    owner.kill()
    owner.wait()
    assert gone(keeper_pid, 5) and gone(pid, 5)
    assert len(machine.remove_leftovers()) == 1  # its record
    assert machine.remove_leftovers() == []


def test_leftovers_of_a_killed_owner_and_keeper_are_removed_at_the_next_start():
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, "entered"], stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout
    keeper_pid, program = map(int, owner.stdout.readline().split())
    os.kill(keeper_pid, signal.SIGKILL)
    owner.kill()
    owner.wait()
    assert not gone(program, 0.3)  # nobody is left to end it
    with Cluster(1):
        assert gone(program, 5)


def test_without_privileges_in_a_user_namespace():
    program = """
from scaletrain.rehearsal import Cluster
with Cluster(2, bandwidth="100Mbit") as hosts:
    print(hosts._has_user_namespace, hosts.run(1, ["hostname"]).stdout.strip(), hosts.counters()[0].sent_bytes >= 0)
    hosts.cut(1)
"""
    drop = [] if os.geteuid() else ["setpriv", "--bounding-set=-all,+setfcap", "--inh-caps=-all"]
    done = subprocess.run(
        [*drop, sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    if done.returncode and "not allowed here" in done.stderr:
        require("namespaces", False, done.stderr.strip().splitlines()[-1])
    assert done.stdout == "True h1 True\n", done.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bandwidth": "fast"}, "bandwidth: 'fast' is not a rate"),
        ({"bandwidth": "0Gbit"}, "bandwidth: '0Gbit' is not a rate"),
        ({"latency": "5"}, "latency: '5' is not a duration"),
        ({"loss": 1.0}, "loss: 1.0 is not allowed"),
        ({"hosts": 0}, "hosts: 0 is not allowed"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(UserError, match=message):
        Cluster(**({"hosts": 2} | options))
