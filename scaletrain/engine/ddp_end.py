"""The end of DDP, which may wait for ever in torch 2.13.

After ``destroy_process_group``, DDP's reducer is the last holder of the process group and frees it.
Then it waits for gloo's thread while it keeps Python's lock. If that thread still has to free its
last collective, it waits for the lock, and both wait for ever. The Python object of a group
releases the lock in the same place, so it has to be the last to hold the group.
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
