"""Makes the backends known to torch.distributed.

torch calls ``register`` whenever it is imported. The engine is loaded when a group is created.
"""

import functools
import os
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

if TYPE_CHECKING:
    from scaletrain.engine.group_calls import GroupCalls

_AS = "SCALETRAIN_AS"  # the variable with another name for our backend


def register() -> None:
    """Register the backends ``scaletrain`` and ``mpi4py``. Safe to call again.

    ``mpi4py`` is MPI's own allreduce over mpi4py.

    Raises:
        UserError: the environment gives our backend a name that it cannot have.
    """
    for name, create in (("scaletrain", _create), ("mpi4py", _create_over_mpi)):
        if name not in dist.Backend.backend_list:
            # The extended API hands over ``pg_options``, and the plain one does not.
            dist.Backend.register_backend(name, create, extended_api=True, devices=["cpu", "cuda"])
    other_name = os.environ.get(_AS)
    if other_name == "gloo":
        _take_the_name_gloo()
    elif other_name:
        from scaletrain.errors import UserError  # not at the top: see ``_create``

        raise UserError(f"{_AS}: {other_name} is not allowed (allowed: gloo)")


def _take_the_name_gloo() -> None:
    """Make groups of the backend ``gloo`` ours, under that name. Safe to call again.

    It is for scripts and frameworks that insist on gloo. torch 2.14 looks gloo up among the
    registered backends. Before, it makes its own backends by name, so the function that makes
    groups is wrapped.
    """
    registered = dist.Backend._plugins
    if "GLOO" in registered:
        registered["GLOO"] = registered["SCALETRAIN"]
        return
    make_group = distributed_c10d._new_process_group_helper
    if hasattr(make_group, "__wrapped__"):
        return

    @functools.wraps(make_group)
    def make(group_size: int, group_rank: int, ranks: Any, backend: Any, *rest: Any, **more: Any):
        if str(backend) != "gloo":
            return make_group(group_size, group_rank, ranks, backend, *rest, **more)
        ours = dist.Backend("scaletrain")
        group, store = make_group(group_size, group_rank, ranks, ours, *rest, **more)
        # None: this rank is no member of the group.
        if group in distributed_c10d._world.pg_map:
            distributed_c10d._world.pg_map[group] = ("gloo", store)
            config = distributed_c10d.BackendConfig(dist.Backend("gloo"))
            distributed_c10d._world.pg_backend_config[group] = str(config)
        return group, store

    distributed_c10d._new_process_group_helper = make  # type: ignore[assignment]


def _create(group_options: Any, backend_options: Any) -> Any:
    """Create our end of a group, of the class that this torch calls (collective).

    Args:
        group_options: the ranks of the group and their store, from torch.
        backend_options: ``pg_options`` of ``init_process_group``, or None.
    """
    # Not at the top: every process that imports torch runs this module.
    from scaletrain.engine import ddp_hooks
    from scaletrain.engine.choice import Options
    from scaletrain.engine.process_group import ProcessGroup
    from scaletrain.engine.torch_backend import SUPPORTED, TorchBackend

    ddp_hooks.mend()
    end_of_group = TorchBackend if SUPPORTED else ProcessGroup
    return end_of_group(
        group_options.store,
        group_options.group_rank,
        group_options.group_size,
        group_options.timeout,
        # A script may bring gloo's options.
        backend_options if isinstance(backend_options, Options) else Options.from_env(),
    )


def _create_over_mpi(group_options: Any, backend_options: Any) -> Any:
    from scaletrain.engine.choice import NATIVE, Options

    is_ours = isinstance(backend_options, Options)
    return _create(group_options, backend_options if is_ours else Options(NATIVE, "mpi"))


def calls_of(group: Any) -> "GroupCalls | None":
    """Return our end of a group; None: the group is of another backend.

    >>> calls_of(dist.group.WORLD).record()  # doctest: +SKIP
    {'transport': 'shared_memory', 'collective': 'auto', 'chosen': ...}
    """
    if hasattr(group, "calls"):  # process_group.ProcessGroup
        return group.calls
    for device in group._device_types:
        backend = group._get_backend(device)
        # With TORCH_DISTRIBUTED_DEBUG=DETAIL, torch puts a backend of its own around ours.
        backend = getattr(backend, "wrapped_pg", backend)
        if hasattr(backend, "calls"):  # torch_backend.TorchBackend
            return backend.calls
    return None
