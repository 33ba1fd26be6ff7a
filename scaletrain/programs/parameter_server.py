"""A parameter server, as a process of its own.

    python -m scaletrain.programs.parameter_server RUN_DIR INDEX SETTINGS [--until-left]

SETTINGS is JSON (``Settings.to_json``). With ``--until-left`` the server ends when all workers have
left, otherwise on SIGTERM or SIGINT.
"""

import logging
import signal
import sys
from pathlib import Path

from scaletrain import programs

programs.begin(__name__)  # before torch is imported

import torch

from scaletrain.errors import UserError
from scaletrain.host.processes import die_with_parent
from scaletrain.parameter_server.protocol import memory
from scaletrain.parameter_server.protocol.settings import Settings
from scaletrain.parameter_server.server.server import Server


def main(run_dir: Path, index: int, settings: Settings, until_left: bool = False) -> None:
    """Be server ``index`` of the run in ``run_dir`` (see ``Server.serve`` for ``until_left``)."""
    die_with_parent(signal.SIGTERM)  # no orphans
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    # Gradients come in messages of megabytes: their memory is used again and again.
    memory.keep_freed()
    torch.set_num_threads(1)
    # For its first optimizer torch imports more modules. Do it before workers wait for an answer.
    torch.optim.SGD([torch.zeros(1)])
    server = Server(settings, run_dir, index)
    programs.done()
    # Once the server is there to be stopped. A signal before that ends the process, which has
    # nothing to save yet.
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
        Settings.from_json(sys.argv[3]),
        until_left="--until-left" in sys.argv[4:],
    )
