"""What this machine must have for a rehearsal, how its tools are called, and what clusters whose owner was killed have left on it."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from scaletrain.errors import UserError
from scaletrain.host.processes import start_ticks

MARK = "SCALETRAIN_CLUSTER"  # in the environment of everything started on a host: how leftovers are known
SETUP_S = 60.0  # for any one command
_CAP_NET_ADMIN, _CAP_SYS_ADMIN = 12, 21
PATH = os.pathsep.join(
    [os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"]
)  # ip and tc live there


def check() -> None:
    """Raises ``UserError`` if no cluster can be rehearsed here, saying what is missing."""
    if not sys.platform.startswith("linux"):
        raise UserError(f"a rehearsal cluster needs Linux (this is {sys.platform})")
    for tool, package in (
        ("ip", "iproute2"),
        ("tc", "iproute2"),
        ("nsenter", "util-linux"),
        ("env", "coreutils"),
    ):
        if not shutil.which(tool, path=PATH):
            raise UserError(f"a rehearsal cluster needs {tool} (apt install {package})")
    probe = [
        "unshare",
        "--net",
        "--uts",
        "--mount",
        "--ipc",
        *([] if privileged() else ["--user", "--map-root-user"]),
        "true",
    ]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=SETUP_S)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["refused"])[0]
        raise UserError(
            f"a rehearsal cluster needs root, or unprivileged user namespaces, which are not allowed here ({reason});"
            " an administrator can allow them: sysctl kernel.unprivileged_userns_clone=1, or"
            " kernel.apparmor_restrict_unprivileged_userns=0"
        )


def remove_leftovers() -> list[str]:
    """End what owners that were killed have left running; returns their clusters' ids.

    Namespaces end with their last process, so only processes can be left. They are known by the mark in their environment.
    """
    dead = []
    for record in records().glob("*.json"):
        try:
            owner = json.loads(record.read_text(encoding="utf-8"))
        except (OSError, ValueError):  # another start is removing or writing it right now
            continue
        if start_ticks(owner["owner"]) != owner["started"]:
            dead.append(record.stem)
    marks = {f"{MARK}={name}".encode() for name in dead}
    for entry in os.listdir("/proc") if marks else []:
        try:
            if entry.isdigit() and marks & set(
                Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")
            ):
                os.kill(int(entry), signal.SIGKILL)
        except OSError:
            continue
    for name in dead:
        for suffix in ("json", "hosts"):
            (records() / f"{name}.{suffix}").unlink(missing_ok=True)
    return dead


def tool(name: str) -> list[str]:
    return [shutil.which(name, path=PATH) or name]


def records() -> Path:
    """Where owners of clusters leave their records: this user's own folder."""
    folder = Path("/tmp") / f"scaletrain-rehearsal-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise UserError(
            f"{folder}: belongs to somebody else; a rehearsal keeps its owner records there"
        )
    return folder


def privileged() -> bool:
    """Whether this process may make namespaces as it is; otherwise a user namespace of its own is needed (root in most containers)."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    effective = int(re.search(r"^CapEff:\s*(\w+)", status, re.MULTILINE)[1], 16)  # type: ignore[index]
    return all(effective >> capability & 1 for capability in (_CAP_NET_ADMIN, _CAP_SYS_ADMIN))


def output(argv: Sequence[str]) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True, timeout=SETUP_S).stdout


def batch(argv: Sequence[str], commands: Sequence[str]) -> None:
    done = subprocess.run(
        argv, input="\n".join(commands) + "\n", capture_output=True, text=True, timeout=SETUP_S
    )
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(argv)}: {done.stderr.strip()}\n" + "\n".join(commands))
