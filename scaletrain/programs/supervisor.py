"""The supervisor of a launch: ``python -m scaletrain.programs.supervisor``, started by ``supervise.run`` alone."""

import os
import signal
import sys

from scaletrain.errors import UserError
from scaletrain.launching.supervision.supervise import MARK, ORDER, heed_signals
from scaletrain.launching.supervision.supervisor import Supervisor


def _first_line(fd: int) -> bytes:
    """A line and not a byte more: what comes after it is for the selector."""
    line = b""
    while not line.endswith(b"\n") and (byte := os.read(fd, 1)):
        line += byte
    return line


def main() -> int:
    if MARK not in os.environ:
        raise UserError("this is started by scaletrain, not by hand")
    supervisor = Supervisor(*ORDER.validate_json(_first_line(sys.stdin.fileno())))
    heed_signals(lambda heard, frame: supervisor.signals.append(heard))
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    return supervisor.run()


if __name__ == "__main__":
    sys.exit(main())
