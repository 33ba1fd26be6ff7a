"""A parameter server: ``python -m scaletrain.programs.parameter_server RUN_DIR INDEX SETTINGS [--until-left]``, SETTINGS as JSON."""

import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
from pathlib import Path

from scaletrain import programs

programs.begin(__name__)

import torch

from scaletrain.errors import UserError
from scaletrain.parameter_server.protocol import memory
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.server.server import Server


def end_with_parent() -> None:
    """Ask the kernel for SIGTERM when the process that started this one ends: no orphans."""
    parent = os.getppid()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        sys.exit(1)


def main(run_dir: Path, index: int, settings: Settings, until_left: bool = False) -> None:
    """Be server ``index`` of the run in ``run_dir``."""
    end_with_parent()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    memory.keep_freed()
    torch.set_num_threads(1)
    torch.optim.SGD(
        [torch.zeros(1)]
    )  # torch imports more for its first optimizer: before workers wait for an answer
    server = Server(settings, run_dir, index)
    programs.done()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, server.stop)
    try:
        server.serve(until_left)
    except UserError as error:
        sys.exit(f"scaletrain: error: {error}")


if __name__ == "__main__":
    main(
        Path(sys.argv[1]),
        int(sys.argv[2]),
        Settings(**json.loads(sys.argv[3])),
        "--until-left" in sys.argv[4:],
    )
