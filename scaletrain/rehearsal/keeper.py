"""The process that keeps a rehearsed cluster's namespaces alive, and ends everything in them when its owner is gone.

Run as a file by ``cluster.Cluster`` (standard library only, so that it starts in milliseconds). Its argument is a JSON object: ``hosts``
(names), ``hosts_file`` (bound over /etc/hosts), ``user`` (whether an own user namespace is needed). It makes one child a host and one for
the switch, each in fresh network, UTS, mount and IPC namespaces, and prints their process ids as JSON. Nothing has a name in the
file system: when the last process of a namespace ends, the kernel removes it with its links.

Ends when standard input closes, when its parent dies, or on SIGTERM: every process in the namespaces gets SIGKILL, the children first. Who
has just entered and finds its host's child alive is thus found here; who finds it dead has to end by itself (``ENTERED``).
"""

import ctypes
import json
import os
import select
import signal
import socket
import sys
import time

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWNET = (
    0x00020000, 0x04000000, 0x08000000, 0x10000000, 0x40000000,
)  # fmt: skip
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
PR_SET_PDEATHSIG, PR_SET_NAME = 1, 15

# What a process that enters runs first: it becomes its command if the host's child (its first argument) still lives.
ENTERED = ("sh", "-c", 'kill -0 "$0" 2>&- && exec "$@"')

_libc = ctypes.CDLL(None, use_errno=True)


def main(request: dict) -> None:
    owner = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    if request["user"]:
        _own_user_namespace()
    switch = _hold("switch", request["hosts_file"])
    hosts = [_hold(name, request["hosts_file"]) for name in request["hosts"]]
    holders = [switch, *hosts]
    # Held open, so that no other namespace gets their numbers before the last process within has ended.
    opened = [os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC) for pid in holders]
    namespaces = {os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in opened}
    try:
        print(json.dumps({"switch": switch, "hosts": hosts}), flush=True)
        while os.getppid() == owner:
            readable, _, _ = select.select([0], [], [], 0.5)
            if readable and not os.read(0, 1):
                return
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for pid in holders:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        kill_within(namespaces)


def kill_within(namespaces: set[str], spare: frozenset[int] = frozenset()) -> int:
    """SIGKILL every process in these network namespaces (``net:[inode]``) until none is left; returns how many there were."""
    killed: set[int] = set()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        found = [pid for pid in processes_within(namespaces) if pid not in spare]
        if not found:
            break
        for pid in found:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            killed.add(pid)
        time.sleep(0.01)
    return len(killed)


def processes_within(namespaces: set[str]) -> list[int]:
    """Live processes (zombies have no namespace) in these network namespaces."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                if os.readlink(f"/proc/{entry}/ns/net") in namespaces:
                    found.append(int(entry))
            except OSError:  # ended, or somebody else's
                continue
    return found


def _hold(name: str, hosts_file: str) -> int:
    """Fork a child into namespaces of its own; it does nothing but keep them. Returns its process id once they are ready."""
    ready, tell = os.pipe()
    pid = os.fork()
    if pid:
        os.close(tell)
        message = os.read(ready, 4096).decode()
        os.close(ready)
        if message != "ready":
            raise SystemExit(f"{name}: {message or 'its keeper died'}")
        return pid
    try:
        _checked(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
        _libc.prctl(PR_SET_NAME, name.encode(), 0, 0, 0)
        _checked(_libc.unshare(CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWNS | CLONE_NEWIPC), "unshare")
        socket.sethostname(name)
        _mount(None, "/", None, MS_REC | MS_PRIVATE)
        _mount(hosts_file, "/etc/hosts", None, MS_BIND)
        # Hosts share no memory: each has a /dev/shm of its own, so no library can pass by the links that way.
        _mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV)
        for scope in ("all", "default"):
            try:
                with open(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6", "w") as file:
                    file.write("1")  # no neighbour discovery in the byte counts
            except OSError:
                pass
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.write(tell, b"ready")
        os.close(tell)
        for descriptor in (0, 1):
            os.close(descriptor)
    except BaseException as error:
        os.write(tell, str(error).encode())
        os._exit(1)
    while True:
        signal.pause()


def _own_user_namespace() -> None:
    """Become root of a fresh user namespace, in which an ordinary user may make network namespaces."""
    uid, gid = os.getuid(), os.getgid()
    _checked(_libc.unshare(CLONE_NEWUSER), "unshare --user")
    for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)


def _mount(source: str | None, target: str, kind: str | None, flags: int) -> None:
    encode = [None if text is None else text.encode() for text in (source, target, kind)]
    _checked(_libc.mount(*encode, ctypes.c_ulong(flags), None), f"mount {target}")


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
