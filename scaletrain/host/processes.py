"""Processes of this host: which are alive, which carry a mark, how they end.

Everything is read from /proc. psutil would add the boot time to a process's start, so a figure that
another process has noted would move with the clock.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_END_S = 10  # that a process has after SIGTERM


def start_ticks(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None if it has ended.

    Id and start together identify a process for good: the kernel uses ids again, but not starts. A
    zombie has ended.
    """
    fields = stat_fields(pid)
    if not fields or fields[0] in ("Z", "X"):
        return None
    return int(fields[19])  # field 22 in proc(5)


def state(pid: int) -> str:
    """Return the state letter of a process ("R", "S", "T", "Z", ...); empty if there is none."""
    fields = stat_fields(pid)
    return fields[0] if fields else ""


@functools.cache
def machine() -> str:
    """Return a short name for the processes that this one can see.

    Two processes that get the same name mean the same process by the same id, whatever their hosts
    are called: emulated hosts share the processes of a machine, containers do not. A machine that
    starts again gets another name. Empty: the kernel does not tell.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        ids = os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""
    return hashlib.sha256(f"{boot} {ids}".encode()).hexdigest()[:16]


def handles_signal(pid: int, number: int) -> bool:
    """Return True if the process has a handler for a signal, which would otherwise end it."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("SigCgt:"):
                # Bit n - 1 stands for signal n.
                caught = int(line.split()[1], 16)
                return bool(caught >> (number - 1) & 1)
    return False


def signal_name(number: int) -> str:
    """Return the name of a signal, such as "SIGKILL"."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def telling_line(output: str, otherwise: str) -> str:
    """Return the line that tells most about a command that has failed.

    Args:
        output: of the program. The last line with the word "error" is the one, else the last.
        otherwise: returned if it printed nothing.
    """
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [otherwise])[-1]


def oom_kills() -> int | None:
    """Return how many processes this host's kernel has killed for lack of memory.

    It counts since the host has booted. None: the kernel does not say.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return None


def marked(variable: str, mark: str) -> list[int]:
    """Return the processes with ``variable=mark``, or a mark below it, in their environment.

    Nested marks are separated by slashes: ``a/b`` lies below ``a``. Zombies have no environment.
    """
    pids = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        found = variables(int(entry)).get(variable, "")
        if found == mark or found.startswith(f"{mark}/"):
            pids.append(int(entry))
    return pids


def variables(pid: int) -> dict[str, str]:
    """Return the environment that a process started with.

    It is empty for a process that has ended or belongs to another user.
    """
    try:
        text = Path(f"/proc/{pid}/environ").read_text("utf-8", errors="surrogateescape")
    except OSError:
        return {}
    pairs = [entry.partition("=") for entry in text.split("\0")]
    return {name: value for name, _, value in pairs if name}


def kill_marked(variable: str, mark: str) -> None:
    """Send SIGKILL to every marked process except this one, until none is left."""
    # About a second. A marked process may fork between the look and its end, so look again.
    for _ in range(50):
        left = [pid for pid in marked(variable, mark) if pid != os.getpid()]
        if not left:
            return
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


@contextlib.contextmanager
def ended(started: Sequence[subprocess.Popen]) -> Iterator[None]:
    """End processes after the body, whether it succeeds or not; kill those that ignore SIGTERM."""
    try:
        yield
    finally:
        for process in started:
            if process.poll() is None:
                process.terminate()
        for process in started:
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def reset_signals(blocked: Collection[int] = ()) -> None:
    """Give this process the signals that a program expects at its start.

    Its starter may ignore or block some, and programs inherit both. With SIGCHLD ignored, a
    failed child has status 0; with SIGTERM blocked, nothing is stopped in good order.

    SIGHUP stays ignored if it is, for nohup.

    Args:
        blocked: signals that stay blocked.
    """
    for number in signal.valid_signals():
        if number != signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def dies_with_parent(number: int) -> Callable[[], None]:
    """Return a ``preexec_fn``: the child gets signal ``number`` when its parent thread ends.

    The child starts with the usual signals (``reset_signals``). The signal comes however the parent
    ends. If the parent is gone already, the child ends at once.
    """
    parent = os.getpid()
    # Looked up here: between fork and exec, loading a library may block for ever.
    prctl = ctypes.CDLL(None, use_errno=True).prctl

    def before_exec() -> None:
        reset_signals()
        prctl(_PR_SET_PDEATHSIG, number)
        # If the parent ended before the call above, no signal will come.
        if os.getppid() != parent:
            os._exit(1)

    return before_exec


def die_with_parent(number: int) -> None:
    """Let this process get signal ``number`` when the thread that started it ends.

    For programs with any starter (see ``dies_with_parent`` for the starter's side). Exits if the
    parent ended meanwhile. Does nothing where the C library has no prctl.
    """
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        sys.exit(1)


def stat_fields(pid: int | str) -> list[str]:
    """Return the fields of /proc/PID/stat after the command's name; empty without a process.

    The list begins with field 3 of proc(5), the state.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return []
    # The name stands in parentheses and may hold spaces and parentheses of its own.
    return text.rpartition(")")[2].split()
