"""A server that has torch loaded, and forks processes that begin with it (``host.forkserver``).

``python -m scaletrain.programs.forkserver MODULE ... DESCRIPTOR``. It loads the modules that it is
to run, beside torch, and takes orders from the descriptor.
"""

import importlib
import os
import socket
import sys
from collections.abc import Sequence

from scaletrain import programs

programs.begin(__name__)  # before torch is imported

import torch
import torch._dynamo  # optimizers and DDP import it when the first one is made
import torch.nn.parallel

from scaletrain.host import forking
from scaletrain.host.forkserver import Order

# Variables of one process that are read when they are needed, after everything is loaded. All
# others may decide what an import does: OMP_NUM_THREADS, CUDA_VISIBLE_DEVICES, PYTHONPATH, LD_*.
_OF_A_PROCESS = {
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "TORCHELASTIC_USE_AGENT_STORE", "PYTHONUNBUFFERED",
}  # fmt: skip
_OURS = "SCALETRAIN_"
_AT_IMPORT = "SCALETRAIN_AS"  # of ours, the one that is read when torch is imported


def main(modules: Sequence[str], descriptor: int) -> Order:
    """Load the modules and serve. Return in every process that is forked."""
    for module in modules:
        importlib.import_module(module)
    # A BLAS library may have started threads; it ends them before a fork.
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    control = socket.socket(fileno=descriptor)
    obstacle = _obstacle()
    if obstacle:
        forking.refuse(control, obstacle)
        sys.exit(1)
    programs.done()
    return forking.serve(control, _may_differ)


def _obstacle() -> str:
    """Return why a fork of this process would not work; empty if it would."""
    if forking.threads():
        return "an import has started threads"
    if torch.cuda.is_initialized():
        return "an import has initialised CUDA"
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # of the listing itself
            continue
        if target.startswith("/dev/nvidia"):
            return f"an import has opened {target}"
    return ""


def _may_differ(name: str) -> bool:
    return name in _OF_A_PROCESS or (name.startswith(_OURS) and name != _AT_IMPORT)


if __name__ == "__main__":
    forking.run(main(sys.argv[1:-1], int(sys.argv[-1])))
