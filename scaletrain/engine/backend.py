"""Makes the backends known to torch.distributed. torch calls this whenever it is imported, so the engine is loaded when a group is made."""

from typing import Any

import torch.distributed as dist


def register() -> None:
    """``scaletrain`` and ``mpi4py``, which is MPI's own allreduce over mpi4py. Safe to call again."""
    for name, create in (("scaletrain", _create), ("mpi4py", _create_over_mpi)):
        if name not in dist.Backend.backend_list:
            dist.Backend.register_backend(name, create, extended_api=True, devices=["cpu", "cuda"])


def _create(backend_options: Any, options: Any) -> dist.ProcessGroup:
    from scaletrain.engine.process_group import Options, ProcessGroup

    o = backend_options
    return ProcessGroup(
        o.store, o.group_rank, o.group_size, o.timeout, options or Options.from_env()
    )


def _create_over_mpi(backend_options: Any, options: Any) -> dist.ProcessGroup:
    from scaletrain.engine.choice import NATIVE
    from scaletrain.engine.process_group import Options

    return _create(backend_options, options or Options(NATIVE, "mpi"))
