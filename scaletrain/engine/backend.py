"""Makes the backends known to torch.distributed.

torch calls ``register`` whenever it is imported. The engine is loaded when a group is created.
"""

from typing import Any

import torch.distributed as dist


def register() -> None:
    """Register the backends ``scaletrain`` and ``mpi4py``. Safe to call again.

    ``mpi4py`` is MPI's own allreduce over mpi4py.
    """
    for name, create in (("scaletrain", _create), ("mpi4py", _create_over_mpi)):
        if name not in dist.Backend.backend_list:
            # The extended API hands over ``pg_options``, and the plain one does not.
            dist.Backend.register_backend(name, create, extended_api=True, devices=["cpu", "cuda"])


def _create(group_options: Any, backend_options: Any) -> dist.ProcessGroup:
    """Create a process group. torch calls it on every rank (collective).

    Args:
        group_options: the ranks of the group and their store, from torch.
        backend_options: ``pg_options`` of ``init_process_group``, or None.
    """
    # Not at the top: every process that imports torch runs this module.
    from scaletrain.engine.process_group import Options, ProcessGroup

    return ProcessGroup(
        group_options.store,
        group_options.group_rank,
        group_options.group_size,
        group_options.timeout,
        # A script may bring gloo's options.
        backend_options if isinstance(backend_options, Options) else Options.from_env(),
    )


def _create_over_mpi(group_options: Any, backend_options: Any) -> dist.ProcessGroup:
    from scaletrain.engine.choice import NATIVE
    from scaletrain.engine.process_group import Options

    is_ours = isinstance(backend_options, Options)
    return _create(group_options, backend_options if is_ours else Options(NATIVE, "mpi"))
