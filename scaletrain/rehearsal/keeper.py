"""The process that keeps a rehearsed cluster's namespaces alive, and empties them.

``cluster.Cluster`` runs it as a file; it uses the standard library only, so that it starts in
milliseconds. Its argument is a JSON object: ``hosts`` (names), ``hosts_file`` (bound over
/etc/hosts), ``user`` (true if it needs a user namespace). It makes one child for each host and one
for the switch, each in fresh network, UTS, mount and IPC namespaces, and prints their process ids
as JSON. Nothing has a name in the file system: when the last process of a namespace ends, the
kernel removes it with its links.

It ends when standard input closes, when its parent dies, or on SIGTERM. Then it sends SIGKILL to
every process in the namespaces, the children first. A process may be entering a host at that
moment: if it found the host's child alive, the keeper finds it here; if it found the child dead,
it has to end by itself (``ENTERED``).
"""

import ctypes
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

# From the kernel's headers sched.h, mount.h and prctl.h.
CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWNET = 0x40000000
MS_NOSUID = 2
MS_NODEV = 4
MS_BIND = 1 << 12
MS_REC = 1 << 14
MS_PRIVATE = 1 << 18
PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15

# The first program of a process that enters a host: it becomes its command, if the host's child
# (its first argument) still lives.
ENTERED = ("sh", "-c", 'kill -0 "$0" 2>&- && exec "$@"')

_KILL_S = 10.0  # after this long, processes that SIGKILL does not end are left to the kernel
_LOOK_S = 0.5  # between looks at the parent
_libc = ctypes.CDLL(None, use_errno=True)


def main(names: Sequence[str], hosts_file: str, needs_user_namespace: bool) -> None:
    """Make the namespaces, print the ids of their holders, and wait for the end."""
    # Noted first: when the parent has died, this returns somebody else's id.
    owner = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # Before the forks, so that all holders lie in it.
    if needs_user_namespace:
        _enter_user_namespace()
    switch = _fork_holder("switch", hosts_file)
    hosts = [_fork_holder(name, hosts_file) for name in names]
    holders = [switch, *hosts]
    # Held open, so that no other namespace gets their numbers before the last process within ends.
    opened = [os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC) for pid in holders]
    namespaces = {os.readlink(f"/proc/self/fd/{descriptor}") for descriptor in opened}
    try:
        print(json.dumps({"switch": switch, "hosts": hosts}), flush=True)
        _wait_for_end(owner)
    finally:
        # A second SIGTERM must not interrupt the cleaning up.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for pid in holders:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        kill_within(namespaces)


def kill_within(namespaces: set[str], spare: frozenset[int] = frozenset()) -> int:
    """Send SIGKILL to every process in these network namespaces until none is left.

    Args:
        namespaces: their names, such as ``net:[4026532310]``.
        spare: processes to leave alone.

    Returns:
        How many processes there were.
    """
    killed: set[int] = set()
    deadline = time.monotonic() + _KILL_S
    while time.monotonic() < deadline:
        living = [pid for pid in processes_within(namespaces) if pid not in spare]
        if not living:
            break
        for pid in living:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
            killed.add(pid)
        time.sleep(0.01)
    return len(killed)


def processes_within(namespaces: set[str]) -> list[int]:
    """Return the live processes in these network namespaces. Zombies have no namespace."""
    pids = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            namespace = os.readlink(f"/proc/{entry}/ns/net")
        except OSError:  # it ended, or belongs to somebody else
            continue
        if namespace in namespaces:
            pids.append(int(entry))
    return pids


def _wait_for_end(owner: int) -> None:
    """Return when standard input closes or the parent is no longer ``owner``."""
    # Standard input alone is not enough: a fork of the parent may keep the pipe open.
    while os.getppid() == owner:
        readable, _, _ = select.select([0], [], [], _LOOK_S)
        if readable and not os.read(0, 1):
            return


def _fork_holder(name: str, hosts_file: str) -> int:
    """Fork a child into namespaces of its own, where it does nothing but keep them.

    Returns:
        The child's process id, once the namespaces are ready.
    """
    ready, report = os.pipe()
    pid = os.fork()
    if pid == 0:
        _hold(name, hosts_file, report)
    # While this process holds the writing end, too, a child that dies would leave it reading.
    os.close(report)
    message = os.read(ready, 4096).decode()
    os.close(ready)
    if message != "ready":
        raise SystemExit(f"{name}: {message or 'its keeper died'}")
    return pid


def _hold(name: str, hosts_file: str, report: int) -> NoReturn:
    """Be the child: move into fresh namespaces, report "ready" or an error, and wait."""
    try:
        # First of all: from here on, the keeper's death takes this process along.
        _checked(_libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")
        _libc.prctl(PR_SET_NAME, name.encode(), 0, 0, 0)
        _checked(_libc.unshare(CLONE_NEWNET | CLONE_NEWUTS | CLONE_NEWNS | CLONE_NEWIPC), "unshare")
        socket.sethostname(name)
        # Private, or the mounts below would spread to the machine itself.
        _mount(None, "/", None, MS_REC | MS_PRIVATE)
        _mount(hosts_file, "/etc/hosts", None, MS_BIND)
        # Hosts share no memory. Each has a /dev/shm of its own, so that no library can get around
        # the links that way.
        _mount("tmpfs", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV)
        _disable_ipv6()
        # The keeper's own handler came along with the fork.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.write(report, b"ready")
        os.close(report)
        for descriptor in (0, 1):  # the owner waits for both to close
            os.close(descriptor)
    except BaseException as error:
        os.write(report, str(error).encode())
        os._exit(1)
    while True:
        signal.pause()


def _disable_ipv6() -> None:
    """Keep neighbour discovery out of the byte counts, where /proc/sys is writable."""
    for scope in ("all", "default"):
        try:
            with open(f"/proc/sys/net/ipv6/conf/{scope}/disable_ipv6", "w") as file:
                file.write("1")
        except OSError:
            pass


def _enter_user_namespace() -> None:
    """Become root of a fresh user namespace, where any user may make network namespaces."""
    uid = os.getuid()
    gid = os.getgid()
    _checked(_libc.unshare(CLONE_NEWUSER), "unshare --user")
    # The kernel lets an ordinary user map a group only after this.
    _write_own("setgroups", "deny")
    _write_own("uid_map", f"0 {uid} 1")
    _write_own("gid_map", f"0 {gid} 1")


def _write_own(name: str, text: str) -> None:
    with open(f"/proc/self/{name}", "w") as file:
        file.write(text)


def _mount(source: str | None, target: str, kind: str | None, flags: int) -> None:
    arguments = [None if text is None else text.encode() for text in (source, target, kind)]
    _checked(_libc.mount(*arguments, ctypes.c_ulong(flags), None), f"mount {target}")


def _checked(result: int, call: str) -> None:
    """Raise OSError if a system call failed."""
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


if __name__ == "__main__":
    request = json.loads(sys.argv[1])
    main(request["hosts"], request["hosts_file"], request["user"])
