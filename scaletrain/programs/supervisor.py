"""The supervisor of a launch: ``python -m scaletrain.programs.supervisor``.

Only ``supervise.run`` starts it. It reads its order, a line of JSON, from standard input.
"""

import os
import signal
import sys

from scaletrain.errors import UserError
from scaletrain.host.descendants import adopt_orphans
from scaletrain.launching.supervision.supervise import heed_signals, order_of
from scaletrain.launching.supervision.supervisor import Supervisor
from scaletrain.run.progress import LAUNCH_MARK


def main() -> int:
    """Carry out the order; return the exit status."""
    if LAUNCH_MARK not in os.environ:
        raise UserError("this is started by scaletrain, not by hand")
    plan, job, display, standard_input = order_of(_first_line(sys.stdin.fileno()))
    adopt_orphans()
    supervisor = Supervisor(plan, job, display, standard_input)
    heed_signals(lambda number, frame: supervisor.signals.append(number))
    # If the reader of our output is gone, a write fails and we go on to end the workers.
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    status = supervisor.run()
    supervisor.report_status(status)
    return status


def _first_line(fd: int) -> bytes:
    """Read a line and not a byte more: the selector must see the bytes after it."""
    line = b""
    while not line.endswith(b"\n"):
        # Unbuffered. Later the end of this input says that the listener is gone.
        byte = os.read(fd, 1)
        # The starter ended before it wrote its order: an incomplete line does not validate.
        if not byte:
            break
        line += byte
    return line


if __name__ == "__main__":
    sys.exit(main())
