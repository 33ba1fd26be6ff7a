"""DDP's built-in hook FP16_COMPRESS, whose C++ asks for a future that only C++ can make.

A future that is made in Python holds a Python object, and the hook stops at an internal assertion.
torch has the same hook in Python.
"""

import functools
from typing import Any

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from scaletrain.engine.backend import calls_of


@functools.cache  # once a process
def mend() -> None:
    """Let DDP use the hook in Python on our groups, from now on."""
    register = DistributedDataParallel._register_builtin_comm_hook

    @functools.wraps(register)
    def mended(self: DistributedDataParallel, comm_hook_type: Any) -> None:
        # Not at the top: few scripts use hooks.
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook

        is_fp16 = comm_hook_type == dist.BuiltinCommHookType.FP16_COMPRESS
        if is_fp16 and calls_of(self.process_group) is not None:
            self.register_comm_hook(self.process_group, fp16_compress_hook)
        else:
            register(self, comm_hook_type)

    DistributedDataParallel._register_builtin_comm_hook = mended  # type: ignore[method-assign]
