"""Carries out a LaunchPlan: starts it, watches it, names the first cause when it fails, and leaves no process behind.

``run`` starts one more process, the supervisor (``supervisor.py``), which starts everything else. Whichever of the two is killed, the
other ends the job: the supervisor sees its standard input close; ``run`` finds what was started by the mark in its environment.
Workers also die with the supervisor (PR_SET_PDEATHSIG), so that nothing survives even when both are killed.
"""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pydantic

from scaletrain.host.processes import kill_marked
from scaletrain.launching.job import Job, Program
from scaletrain.launching.plan import LaunchPlan
from scaletrain.launching.supervision.first_cause import signal_name

MARK = "SCALETRAIN_LAUNCH"  # every process of a launch carries it; nested launches append theirs
ORDER = pydantic.TypeAdapter(
    tuple[LaunchPlan, Job]
)  # what the supervisor is told on its standard input, as a line of JSON
FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR1,
)  # and SIGHUP, as SIGTERM, unless it is ignored (nohup)
_END_S = 6.0  # how long the supervisor may take to end once nobody listens


def run(plan: LaunchPlan, job: Job, show: Callable[[str, bool], None] | None = None) -> int:
    """Carry out a plan and return the exit status: 0, that of the first cause, 124 for a hang, 128 + signal.

    The first cause of a failure is shown once and written to ``RUN_DIR/failure.json``. SIGINT, SIGTERM, SIGUSR1 and a hang-up are
    passed on to the workers while this runs (in the main thread). Everything that was started has ended when this returns.

    Args:
        show: called with each line of output, and whether it belongs on standard error. Default: print it there.
    """
    show = show or _print
    for path, text in plan.files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    job.run_dir.mkdir(parents=True, exist_ok=True)
    mark = f"{os.environ.get(MARK, '')}/{os.getpid()}-{time.monotonic_ns()}".lstrip("/")
    supervisor = subprocess.Popen(
        Program.SUPERVISOR.command(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, MARK: mark, "PYTHONUNBUFFERED": "1"},
        start_new_session=True,  # Ctrl-C at a terminal comes to us alone, and we pass it on
        preexec_fn=_hold_signals,
    )
    assert supervisor.stdin and supervisor.stdout
    try:
        with _forwarding(supervisor):
            with contextlib.suppress(BrokenPipeError):
                supervisor.stdin.write(ORDER.dump_json((plan._replace(files=()), job)) + b"\n")
                supervisor.stdin.flush()
            for line in supervisor.stdout:
                show(line[1:].decode(errors="replace").rstrip("\r\n"), line[:1] == b"2")
            status = supervisor.wait()
    finally:
        supervisor.stdin.close()
        if supervisor.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                supervisor.wait(_END_S)
        kill_marked(MARK, mark)
        supervisor.wait()
        supervisor.stdout.close()
    if status < 0:
        show(
            f"scaletrain: the supervisor was ended by {signal_name(-status)}; its workers were stopped",
            True,
        )
    return 128 - status if status < 0 else status


def _hold_signals() -> None:
    """In the supervisor's process, until ``heed_signals``: what comes before it can listen waits instead of ending it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)


def heed_signals(handler: Callable[[int, Any], None]) -> None:
    """In the supervisor: call ``handler`` for signals that came since it was started, and from now on."""
    for number in FORWARDED:
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, FORWARDED)


def _print(line: str, error: bool) -> None:
    with contextlib.suppress(BrokenPipeError):
        print(line, file=sys.stderr if error else sys.stdout, flush=True)


@contextlib.contextmanager
def _forwarding(supervisor: subprocess.Popen[bytes]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, frame: Any) -> None:
        supervisor.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    before = {
        number: signal.signal(number, forward)
        for number in (*FORWARDED, *[signal.SIGHUP] * (not ignored))
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
