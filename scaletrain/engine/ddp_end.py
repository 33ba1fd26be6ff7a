"""The end of DDP, which may wait for ever in torch 2.13.

DDP's reducer frees the process group if it is the last to hold it, as it is after
``destroy_process_group``. It waits for gloo's thread then, and keeps Python's lock. If that thread
was interrupted before it could free its last collective, it waits for the lock itself. The Python
object of a group gives the lock away in the same place, so it has to be the last to hold the group.
"""

import functools
from typing import Any

from torch.nn.parallel import DistributedDataParallel


@functools.cache  # once a process
def mend() -> None:
    """Let every DDP that this process makes from now on end well."""
    init = DistributedDataParallel.__init__

    @functools.wraps(init)
    def mended(self: DistributedDataParallel, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        group_last(self)

    DistributedDataParallel.__init__ = mended  # type: ignore[method-assign]


def group_last(model: DistributedDataParallel) -> None:
    """Let a model's process group be the last of its attributes to be freed."""
    # They are freed in their order.
    model.__dict__["process_group"] = model.__dict__.pop("process_group")
