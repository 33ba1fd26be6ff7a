"""Data-parallel PyTorch training where you choose how gradients are exchanged.

scaletrain measures, explains and predicts how well the training scales.
"""

import sys
from typing import Any

from scaletrain._version import __version__

# Names that people import from here, and where they are; found when asked for, so that a command
# needs no torch to print its help.
_EXPORTS = {
    "World": "scaletrain.world",
    "Schedule": "scaletrain.collectives.schedule",
    "Trainer": "scaletrain.training.trainer",
    "Callback": "scaletrain.training.callbacks",
    "Workload": "scaletrain.training.workload",
    "Data": "scaletrain.training.workload",
    "Loss": "scaletrain.training.workload",
    "Mean": "scaletrain.training.workload",
    "Update": "scaletrain.training.workload",
    "attach": "scaletrain.training.attach",
    "join": "scaletrain.training.attach",
    "notebook_launch": "scaletrain.notebook.launch",
    "WorkerError": "scaletrain.notebook.launch",
}
__all__ = [
    "Callback",
    "Data",
    "Loss",
    "Mean",
    "Schedule",
    "Trainer",
    "Update",
    "WorkerError",
    "Workload",
    "World",
    "__version__",
    "attach",
    "join",
    "notebook_launch",
]


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def _register_backends() -> None:
    """Make ``dist.init_process_group("scaletrain")`` work.

    torch calls it when torch is imported (entry point ``torch.backends``).
    """
    from scaletrain.engine import backend

    backend.register()


# torch looks at entry points while it is imported. This is for a torch that was imported before,
# where this package is only on Python's path and has no entry point.
if "torch" in sys.modules and hasattr(sys.modules["torch"], "distributed"):
    _register_backends()
