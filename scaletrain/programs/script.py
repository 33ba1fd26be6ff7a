"""Run a person's own script as one worker.

``python -m scaletrain.programs.script RUN_DIR script.py arguments``. Under every launcher the
script finds RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT, so that
``torch.distributed.init_process_group()`` works as it stands. If it raises, the traceback is
recorded and shown once.
"""

import os
import runpy
import sys
from datetime import timedelta
from pathlib import Path

from scaletrain import programs

programs.begin(__name__)  # before torch is imported

from scaletrain.engine import rendezvous
from scaletrain.errors import UserError
from scaletrain.run import progress
from scaletrain.world import World

_MEET = timedelta(seconds=120)  # for rank 0 to come up under mpirun, srun and horovodrun
# Frames of these files run the script and explain nothing. The second is "<frozen runpy>".
_RUNNER_FILES = (__file__, runpy.run_path.__code__.co_filename)


def main(run_dir: Path, script: str, arguments: list[str]) -> None:
    """Run the script as ``__main__``, and report how it ended."""
    world = World.from_env()
    with progress.reporting(run_dir, world, _RUNNER_FILES):
        # Inside `reporting`, so that the mistake is shown once and not by every rank.
        if not Path(script).is_file():
            raise UserError(f"{script}: there is no such file")
        os.environ.update(variables(world, run_dir))
        # From here on the script promises no signs of life, and silence is not taken for a hang.
        progress.alive(progress.SCRIPT)
        # As `python script.py` sets them: the script may read its arguments, and import its
        # neighbours.
        sys.argv = [script, *arguments]
        sys.path[0] = str(Path(script).resolve().parent)
        programs.done()
        runpy.run_path(script, run_name="__main__")


def variables(world: World, run_dir: Path) -> dict[str, str]:
    """Return variables that torch.distributed needs and the launcher did not set.

    Where rank 0 must be found, every rank has to call this.
    """
    # Our launcher chose this process to serve the store: the other ranks already try to join it.
    if rendezvous.STORE_FD in os.environ:
        rendezvous.serve()
    # The launcher has said everything: nothing of it is overruled.
    if "MASTER_ADDR" in os.environ and "MASTER_PORT" in os.environ and "RANK" in os.environ:
        return {}
    store = rendezvous.connect(world, run_dir, _MEET)
    world = rendezvous.place(world, store)
    address, port = rendezvous.address_of(store)
    return {
        "RANK": str(world.rank),
        "WORLD_SIZE": str(world.size),
        "LOCAL_RANK": str(world.local_rank),
        "LOCAL_WORLD_SIZE": str(world.local_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
        # torch's env:// then joins the store that runs there, on every rank. Without it, rank 0
        # would try to serve another one at the same port.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
    except UserError as mistake:
        # It came before the worker could report it: the variables that say its rank are wrong.
        print(f"scaletrain: error: {mistake}", file=sys.stderr)
        sys.exit(2)
