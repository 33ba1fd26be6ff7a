"""Descendants of this process, also after a change of environment, group, session or title.

When a process ends, its children go to the nearest ancestor that adopts orphans, else to process 1.
So an adopting process finds everything that it has started, by following parents.
"""

import contextlib
import ctypes
import itertools
import os
import signal
import time
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

from scaletrain.host.processes import stat_fields

_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37
_SCRIPTS = (".py", ".sh", ".pl", ".rb")


class Descendant(NamedTuple):
    """A process that this one has started, directly or not."""

    pid: int
    group: int
    session: int
    start_ticks: int  # since boot

    @property
    def is_running(self) -> bool:
        """Whether it has not ended, also as a zombie."""
        fields = stat_fields(self.pid)
        return bool(fields) and fields[0] not in ("Z", "X") and int(fields[19]) == self.start_ticks


def adopt_orphans(adopts: bool = True) -> bool:
    """Let this process adopt orphaned descendants, or no longer; return whether it did before.

    It has to reap them then (``reap_adopted``). Does nothing where the C library has no prctl.
    """
    before = ctypes.c_int(0)
    with contextlib.suppress(OSError, AttributeError):
        prctl = ctypes.CDLL(None).prctl
        prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(before), 0, 0, 0)
        prctl(_PR_SET_CHILD_SUBREAPER, int(adopts), 0, 0, 0)
    return bool(before.value)


def descendants(without: Collection[int] = ()) -> list[Descendant]:
    """Return the descendants of this process that run, parents before their children.

    Args:
        without: ids of processes that are left out with all of their descendants.
    """
    children: dict[int, list[int]] = defaultdict(list)
    found: dict[int, Descendant] = {}
    for entry in os.listdir("/proc"):
        fields = stat_fields(int(entry)) if entry.isdigit() else []
        if not fields:
            continue
        pid = int(entry)
        children[int(fields[1])].append(pid)
        if fields[0] not in ("Z", "X"):
            found[pid] = Descendant(pid, int(fields[2]), int(fields[3]), int(fields[19]))
    running = []
    unseen = [os.getpid()]
    while unseen:
        for pid in children[unseen.pop(0)]:
            if pid in without:
                continue
            unseen.append(pid)
            if pid in found:
                running.append(found[pid])
    return running


def adopted(since_ticks: int) -> list[Descendant]:
    """Return the descendants that came to this process when their parent ended.

    Our own children are in our session. Those that another thread started in a new session cannot
    be told apart from adopted ones.

    Args:
        since_ticks: leave out those that started earlier, in clock ticks since boot.
    """
    session = os.getsid(0)
    found = []
    for process in descendants():
        if process.session != session and process.start_ticks >= since_ticks:
            found.append(process)
    return found


def reap_adopted(own: Collection[int]) -> None:
    """Reap children that have ended, except those that this process has started itself.

    Args:
        own: ids of the children that somebody else waits for (``subprocess.Popen``).
    """
    while True:
        try:
            # A look that leaves the status of our own children where it is.
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        # The next call would show the same child again: what lies behind it waits for its turn.
        if ended is None or ended.si_pid in own:
            return
        with contextlib.suppress(ChildProcessError):
            os.waitpid(ended.si_pid, os.WNOHANG)


def end(
    processes: Callable[[], list[Descendant]],
    pause: Callable[[float], None],
    *,
    by_themselves_s: float = 0.5,
    terminated_s: float = 1.0,
) -> dict[int, str]:
    """End processes: first wait, then SIGTERM, then SIGKILL.

    Args:
        processes: returns those that are left. They may start others while they end.
        pause: called with the seconds until the next look; it reaps ended children.
        by_themselves_s: the time for those that end when they notice that their parent is gone.
        terminated_s: the time from SIGTERM to SIGKILL.

    Returns:
        Words for each process that had to be ended, by its id.
    """
    _wait(processes, pause, by_themselves_s)
    ended: dict[int, str] = {}
    for number, limit_s in ((signal.SIGTERM, terminated_s), (signal.SIGKILL, 2.0)):
        until = time.monotonic() + limit_s
        signalled: set[int] = set()
        while time.monotonic() < until:
            left = processes()
            if not left:
                break
            for process in left:
                ended.setdefault(process.pid, describe(process.pid))
                # Each gets SIGTERM once. A process may fork between the look and its end.
                if number == signal.SIGKILL or process.pid not in signalled:
                    signalled.add(process.pid)
                    send(process.pid, signal.SIGCONT)  # a stopped one would not see the next
                    send(process.pid, number)
            pause(0.02)
    return ended


def send(pid: int, number: int) -> None:
    """Send a signal to a process, which may be gone by now, or another user's (sudo)."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def describe(pid: int) -> str:
    """Return words for a process, such as "python upload.py (process 123)".

    Other arguments are left out: they may hold secrets.
    """
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text("utf-8", errors="replace").split("\0")
    except OSError:
        words = [""]
    # A rewritten title is one word with spaces.
    program = words[0].split(" ")[0].rstrip(":")
    name = os.path.basename(program) or "a process"
    for before, word in itertools.pairwise(words):
        if before == "-m":
            name += f" -m {word}"
            break
        if word.endswith(_SCRIPTS):
            name += f" {os.path.basename(word)}"
            break
    return f"{name} (process {pid})"


def _wait(
    processes: Callable[[], list[Descendant]], pause: Callable[[float], None], limit_s: float
) -> None:
    until = time.monotonic() + limit_s
    while processes() and time.monotonic() < until:
        pause(0.02)
