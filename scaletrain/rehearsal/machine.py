"""A rehearsal's needs on this machine: capabilities, tools, records of clusters."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from scaletrain.errors import UserError
from scaletrain.host.processes import kill_marked, start_ticks

MARK = "SCALETRAIN_CLUSTER"  # in the environment of every process on a host, to find leftovers
SETUP_S = 60.0  # limit of any one command
# ip and tc live in the last two, which an ordinary user's PATH leaves out.
PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])

_CAP_NET_ADMIN = 12
_CAP_SYS_ADMIN = 21
_PACKAGES = {"ip": "iproute2", "tc": "iproute2", "nsenter": "util-linux", "env": "coreutils"}


class Namespace(NamedTuple):
    """The namespaces of one emulated host, or of the switch, and how commands get into them."""

    holder: int  # the process that keeps them alive
    has_user_namespace: bool  # they lie in a user namespace, so this user may make them

    def enter_network(self, *command: str) -> list[str]:
        """Return the command line that runs ``command`` in the network of this namespace."""
        return [*self._nsenter(), "--net", "--", *command]

    def enter_host(self, *command: str) -> list[str]:
        """Return the command line that runs ``command`` as a process of this host."""
        return [*self._nsenter(), "--net", "--uts", "--mount", "--ipc", "--", *command]

    def network_id(self) -> str:
        """Return the kernel's name of the network namespace, such as ``net:[4026532310]``."""
        return os.readlink(f"/proc/{self.holder}/ns/net")

    def _nsenter(self) -> list[str]:
        argv = [tool("nsenter"), f"--target={self.holder}"]
        if self.has_user_namespace:
            # nsenter would set the groups anew, which a user namespace of an ordinary user forbids.
            argv += ["--user", "--preserve-credentials"]
        return argv


def check() -> None:
    """Check that a cluster can be rehearsed on this machine.

    Raises:
        UserError: it cannot; the message says how to get the missing part.
    """
    if not sys.platform.startswith("linux"):
        raise UserError(f"a rehearsal cluster needs Linux (this is {sys.platform})")
    for name, package in _PACKAGES.items():
        if not shutil.which(name, path=PATH):
            raise UserError(f"a rehearsal cluster needs {name} (apt install {package})")
    # Tried for real: systems forbid namespaces in too many ways to look them all up.
    probe = ["unshare", "--net", "--uts", "--mount", "--ipc"]
    if not is_privileged():
        probe += ["--user", "--map-root-user"]
    done = run_tool([*probe, "true"])
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["refused"])[0]
        raise UserError(
            "a rehearsal cluster needs root, or unprivileged user namespaces, which are not"
            f" allowed here ({reason});"
            " an administrator can allow them: sysctl kernel.unprivileged_userns_clone=1, or"
            " kernel.apparmor_restrict_unprivileged_userns=0"
        )


def is_privileged() -> bool:
    """Return True if this process may make namespaces as it is.

    Otherwise it needs a user namespace first. Root in most containers lacks these capabilities.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = re.search(r"^CapEff:\s*(\w+)", status, re.MULTILINE)
    assert line, "every Linux says which capabilities are effective"
    effective = int(line[1], 16)
    may_wire = bool(effective >> _CAP_NET_ADMIN & 1)
    may_mount = bool(effective >> _CAP_SYS_ADMIN & 1)
    return may_wire and may_mount


# Records of clusters. Each owner writes its own at the start and removes it at the end; the next
# start removes those whose owner was killed.


def write_record(cluster: str) -> None:
    """Note that this process owns a cluster, until ``remove_record``."""
    owner = {"owner": os.getpid(), "started": start_ticks(os.getpid())}
    _record(cluster).write_text(json.dumps(owner), encoding="utf-8")


def hosts_file(cluster: str) -> Path:
    """Return the path of the file that a cluster's hosts see as /etc/hosts."""
    return _records() / f"{cluster}.hosts"


def remove_record(cluster: str) -> None:
    """Remove the files that ``write_record`` and the cluster's owner wrote."""
    _record(cluster).unlink(missing_ok=True)
    hosts_file(cluster).unlink(missing_ok=True)


def remove_leftovers() -> list[str]:
    """End the processes that killed owners have left running, and return their clusters' ids.

    Namespaces end with their last process, so only processes can be left. The mark in their
    environment identifies them.
    """
    dead = []
    for record in _records().glob("*.json"):
        try:
            owner = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # another start is removing or writing it right now
            continue
        # The id alone may belong to a newer process by now.
        if start_ticks(owner["owner"]) != owner["started"]:
            dead.append(record.stem)
    for cluster in dead:
        kill_marked(MARK, cluster)
        remove_record(cluster)
    return dead


def _record(cluster: str) -> Path:
    return _records() / f"{cluster}.json"


def _records() -> Path:
    """Return this user's own directory for the records of clusters; make it if it is missing."""
    folder = Path("/tmp") / f"scaletrain-rehearsal-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    # Anybody may create names in /tmp, this one as well.
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(
            f"{folder}: belongs to somebody else; a rehearsal keeps its owner records there"
        )
    return folder


# Calling tools.


def tool(name: str) -> str:
    """Return the path of a tool such as ``tc``, or its name if it is not installed."""
    return shutil.which(name, path=PATH) or name


def run_tool(argv: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end and capture its output, whether it succeeds or not."""
    return subprocess.run(argv, capture_output=True, text=True, timeout=SETUP_S)


def output(argv: Sequence[str]) -> str:
    """Return a tool's output. Raises CalledProcessError if it fails."""
    done = run_tool(argv)
    done.check_returncode()
    return done.stdout


def batch(argv: Sequence[str], commands: Sequence[str]) -> None:
    """Run a tool that reads its commands from standard input, one a line (``ip -batch -``).

    Raises:
        RuntimeError: a command failed.
    """
    lines = "\n".join(commands) + "\n"
    done = subprocess.run(argv, input=lines, capture_output=True, text=True, timeout=SETUP_S)
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(argv)}: {done.stderr.strip()}\n{lines.rstrip()}")
