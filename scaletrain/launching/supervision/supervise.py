"""Carry out a LaunchPlan, name the first cause of a failure, and leave no process behind.

``run`` starts one more process, the supervisor (``supervisor.py``), which starts everything else.
If either of the two is killed, the other ends the job. The supervisor sees that its standard input
closes; ``run`` adopts all processes that the supervisor had. Workers also die with the supervisor
(PR_SET_PDEATHSIG), so that they do not survive even if both are killed.
"""

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pydantic

from scaletrain.errors import UserError
from scaletrain.host import descendants
from scaletrain.host.forkserver import Forked
from scaletrain.host.processes import (
    kill_marked,
    reset_signals,
    signal_name,
    start_ticks,
    state,
    variables,
)
from scaletrain.launching.job import Job, Program
from scaletrain.launching.plan import LaunchPlan
from scaletrain.launching.supervision import screen, warm
from scaletrain.launching.supervision.screen import Display
from scaletrain.run import job_key
from scaletrain.run.progress import LAUNCH_MARK
from scaletrain.timeouts import COMPANION_STOP_S, MARGIN_S
from scaletrain.world import without_place

# The supervisor reads its order from standard input, as one line of JSON. The number is the
# descriptor of the standard input that it gives to rank 0; -1: none.
Order = tuple[LaunchPlan, Job, Display, int]
_ORDER = pydantic.TypeAdapter(Order)
# Signals that are passed on, SIGINT unless it is ignored. So is SIGHUP, as a SIGTERM, unless it is
# ignored (nohup). SIGUSR2 asks for a checkpoint.
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_HELD = (*FORWARDED, signal.SIGTSTP)  # until the supervisor can answer them
_SUSPEND_S = 1.0  # Ctrl-Z waits this long for the supervisor to stop everything


def run(
    plan: LaunchPlan,
    job: Job,
    show: Callable[[str, bool], None] | None = None,
    claim: int = -1,
    display: Display = Display(),  # noqa: B008 (never changed)
) -> int:
    """Carry out a plan and return the exit status.

    It is 0, the first cause's status, 124 for a hang, or 128 + the number of a signal. The
    first cause of a failure is shown once and written to ``RunDir.first_cause``.

    SIGINT, SIGTERM, SIGUSR1 and SIGHUP are passed on to the workers while this runs, if it runs in
    the main thread. SIGUSR2 lets training save and go on. Everything that was started has
    ended when it returns.

    Rank 0 gets this process's standard input, if the plan starts it itself and the job has the
    screen to itself. All other processes have none.

    Args:
        plan: the files to write and the commands to start.
        job: the workers, and the limits that the supervisor holds them to.
        show: called with each line of output, and True if it belongs on standard error. By default
            the output is shown there, byte for byte.
        claim: the descriptor of a claim on the run directory (``run.claim``), which then holds
            until the supervisor has ended, too; -1: none.
        display: the part of the output that is shown; see ``check_display``. ``Logs`` keeps all.
    """
    lines = screen.LineReader(show) if show else None
    own_screen = screen.Screen(display)
    write = lines.write if lines else own_screen.write
    _write_files(plan, job)
    # A launch inside a launch, as in a sweep: the outer one finds these processes, too, since its
    # mark comes first.
    outer_mark = os.environ.get(LAUNCH_MARK, "")
    mark = f"{outer_mark}/{os.getpid()}-{time.monotonic_ns()}".lstrip("/")
    adopted_before = descendants.adopt_orphans()
    environ = {**without_place(os.environ), LAUNCH_MARK: mark, "PYTHONUNBUFFERED": "1"}
    standard_input = _standard_input() if show is None else -1
    descriptors = tuple(number for number in (claim, standard_input) if number >= 0)
    supervisor = warm.start_supervisor(environ, _HELD, descriptors) or subprocess.Popen(
        Program.SUPERVISOR.command(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environ,
        start_new_session=True,  # Ctrl-C at a terminal comes to us alone, and we pass it on
        preexec_fn=_hold_signals,
        pass_fds=descriptors,
    )
    if standard_input >= 0:
        os.close(standard_input)
    assert supervisor.stdin and supervisor.stdout
    started_at = start_ticks(supervisor.pid) or 0
    reported: int | None = None  # the exit status, by the supervisor's last frame
    try:
        with _forwarding(supervisor):
            with contextlib.suppress(BrokenPipeError):
                # The files are written: their texts need not travel.
                without_files = plan._replace(files=())
                order = (without_files, job, display, standard_input)
                supervisor.stdin.write(line_of(order))
                supervisor.stdin.flush()
            for kind, payload in screen.frames(supervisor.stdout):  # type: ignore[arg-type]
                if kind == screen.STATUS:
                    reported = int(payload)
                else:
                    write(kind, payload)
            if lines:
                lines.end()
            status = supervisor.wait()
    finally:
        # This tells a supervisor that still runs to end everything (``Processes.orphaned``).
        supervisor.stdin.close()
        if supervisor.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                supervisor.wait(_end_s(plan))
        kill_marked(LAUNCH_MARK, mark)
        # Where a batch system runs the job, it may go on without us.
        if plan.store_address:
            job_key.forget(job.run_dir)
        supervisor.wait()
        if reported is None:
            _end_adopted(started_at)
        descendants.adopt_orphans(adopted_before)
        supervisor.stdout.close()
    # The kernel's word is lost if this process ignores SIGCHLD, or if other code in it waits for
    # all children: it is 0 then.
    if reported is not None:
        return reported
    if status >= 0:
        return status or 1  # it ended without its last frame
    ended = f"scaletrain: the supervisor was ended by {signal_name(-status)}"
    (show or own_screen.say)(f"{ended}; its workers were stopped", True)
    return 128 - status


def line_of(order: Order) -> bytes:
    """Return an order as a line of JSON. Names that are not UTF-8 survive."""
    return json.dumps(_ORDER.dump_python(order, mode="json")).encode() + b"\n"


def order_of(line: bytes) -> Order:
    """Return the order in a line that ``line_of`` wrote.

    Raises:
        ValueError: the line is not whole.
    """
    return _ORDER.validate_python(json.loads(line))


def _write_files(plan: LaunchPlan, job: Job) -> None:
    """Make the run directory, and write the plan's files."""
    for path, text in plan.files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
    job.run_dir.mkdir(parents=True, exist_ok=True)


def _standard_input() -> int:
    """Return a copy of the descriptor of our standard input; -1 if there is none to give.

    A job in the background must leave a person's typing to the shell.
    """
    with contextlib.suppress(OSError):
        if not os.isatty(0) or os.tcgetpgrp(0) == os.getpgrp():
            return os.dup(0)
    return -1


def check_display(plan: LaunchPlan, display: Display) -> None:
    """Raise ``UserError`` if a choice needs each rank's own output and the launcher mixes it."""
    for command in plan.commands:
        if display.show != "all" and command.rank is None and not command.labels:
            raise UserError(
                f"--show: {display.show!r} is not allowed here: {command.name} does not tell the"
                " output of its workers apart (allowed: all)"
            )


def _end_s(plan: LaunchPlan) -> float:
    """Return the seconds that the supervisor takes to end once its listener is gone."""
    longest = max([command.stop_s for command in plan.commands], default=0.0)
    # Companions end after the workers.
    companions = COMPANION_STOP_S if plan.companions or plan.store_address else 0.0
    return longest + companions + MARGIN_S


def _end_adopted(since_ticks: int) -> None:
    """End the descendants that a killed supervisor has left. Other launches stay."""
    seen: set[int] = set()

    def left() -> list[descendants.Descendant]:
        found = []
        for process in descendants.adopted(since_ticks):
            if LAUNCH_MARK not in variables(process.pid):
                found.append(process)
                seen.add(process.pid)
        return found

    def pause(seconds: float) -> None:
        time.sleep(seconds)
        for pid in seen:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    descendants.end(left, pause, by_themselves_s=0.0)


def _hold_signals() -> None:
    """Hold signals back in the supervisor's process until ``heed_signals``.

    Python takes a moment to start. A signal that comes in the meantime waits instead of ending it.
    """
    reset_signals(blocked=_HELD)


def heed_signals(handler: Callable[[int, Any], None]) -> None:
    """Call ``handler``, in the supervisor, for signals since its start and from now on.

    Ctrl-Z does not get there: it stops everything on the spot.
    """
    for number in FORWARDED:
        signal.signal(number, handler)
    signal.signal(signal.SIGTSTP, lambda number, frame: _suspend_everything())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD)


def _suspend_everything() -> None:
    """Stop all processes of the launch and this one, the supervisor, until it gets SIGCONT."""
    suspended = []
    for process in descendants.descendants():
        # One that a person has stopped stays so.
        if state(process.pid) != "T":
            suspended.append(process)
            descendants.send(process.pid, signal.SIGSTOP)
    os.kill(os.getpid(), signal.SIGSTOP)
    for process in suspended:
        descendants.send(process.pid, signal.SIGCONT)


@contextlib.contextmanager
def _forwarding(supervisor: subprocess.Popen[bytes] | Forked) -> Iterator[None]:
    """Pass signals on to the supervisor while the body runs.

    Only a main thread may set handlers; in another thread nothing is passed on.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def forward(number: int, frame: Any) -> None:
        supervisor.send_signal(signal.SIGTERM if number == signal.SIGHUP else number)

    # A shell script starts its background jobs with SIGINT ignored: the terminal's Ctrl-C is not
    # meant for them. nohup does the same with SIGHUP.
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2]
    for number in (signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            numbers.append(number)
    before = {number: signal.signal(number, forward) for number in numbers}

    def suspend(number: int, frame: Any) -> None:
        supervisor.send_signal(signal.SIGTSTP)
        until = time.monotonic() + _SUSPEND_S
        while state(supervisor.pid) != "T" and time.monotonic() < until:
            time.sleep(0.01)
        # As the terminal meant it: the shell sees that this process has stopped.
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        # Here the process goes on, after `fg` or `bg`.
        signal.signal(signal.SIGTSTP, suspend)
        supervisor.send_signal(signal.SIGCONT)

    if signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL:
        before[signal.SIGTSTP] = signal.signal(signal.SIGTSTP, suspend)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
