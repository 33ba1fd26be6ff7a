"""Process 1 of a container: reaps orphans that have ended, and passes signals on."""

import os
import signal


def stay_behind() -> None:
    """Go on in a child process. This process stays behind and ends with the child's status.

    Call it in process 1, before any thread starts. The kernel gives process 1 all orphans to reap,
    and does not deliver signals to it that it has no handler for.
    """
    numbers = signal.valid_signals()
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    child = os.fork()
    if child == 0:
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        return
    while True:
        received = signal.sigwaitinfo(numbers)
        if received.si_signo == signal.SIGCHLD:
            _reap(child)
        # A terminal sends its signals to the child as well (SI_KERNEL, which is positive).
        elif received.si_code <= 0:
            os.kill(child, received.si_signo)


def _reap(child: int) -> None:
    """Reap everything that has ended; end this process if ``child`` is among it."""
    while True:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)
        if pid == 0:
            return
